"""The canaries of a run: what its settings and files say of its first step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from renio_megatron.config.schema import DistillationConfig
from renio_megatron.models.ends import Ends
from renio_megatron.parallel.layout import ParallelLayout
from renio_megatron.runner.inputs import RunInputs
from renio_megatron.training.canaries import Canaries
from renio_megatron.training.canary_findings import Expected

_THOUGHT, _CLOSED = "<think>", "</think>"


def build_canaries(
    config: DistillationConfig, inputs: RunInputs, layout: ParallelLayout, report: Callable[[str], None] | None = None
) -> Canaries | None:
    """The canaries of a run; None where they are switched off."""
    if config.canaries == "off":
        return None
    known = range(len(inputs.tokenizer))  # other tokens the student cannot write
    ends = {
        name: {token for token in one.ends.token_ids if token in known and token not in inputs.ends.token_ids}
        for name, one in inputs.teachers.items()
    }
    of_all = Ends(tuple(sorted(set().union(*ends.values()))))
    expected = Expected(
        precision=_precision(config),
        is_same_model=_is_same_model(config, inputs),
        boundary_remedy=_boundary_remedy(inputs),
        ends=inputs.ends.describe(inputs.tokenizer),
        teacher_ends=of_all.describe(inputs.tokenizer),
    )
    stops = config.canaries == "stop"
    return Canaries(layout, config.loss, config.head, expected, teacher_ends=ends, stops=stops, report=report)


def _precision(config: DistillationConfig) -> str:
    """The coarsest of the models' precisions."""
    if config.precision.fp8 is not None or any(one.precision.fp8 is not None for one in config.teachers):
        return "fp8"
    is_bf16 = config.train.bf16 or any(one.bf16 for one in config.teachers)
    return "bf16" if is_bf16 or config.head.logits_dtype == "bf16" else "fp32"


def _is_same_model(config: DistillationConfig, inputs: RunInputs) -> bool:
    """Whether every teacher begins as the student: the same weights, in the same precision, no adapter that is not
    new."""
    if config.lora.adapter is not None:
        return False
    return all(
        inputs.teachers[one.name].weights == inputs.weights
        and one.settings.adapter is None
        and (one.bf16, one.precision.fp8) == (config.train.bf16, config.precision.fp8)
        for one in config.teachers
    )


def _boundary_remedy(inputs: RunInputs) -> str:
    """What to do where a teacher expects something else than a completion's first token."""
    prompt = inputs.stream.distinct(1)[0]
    student, teacher = (_thinks(ids, inputs.tokenizer) for ids in (prompt.student_ids, prompt.teacher_ids))
    if student is False and teacher is not False:
        return (
            f"The student's prompt closes its thought ({_CLOSED}), and the teacher's does not: a teacher that thinks "
            f"expects {_THOUGHT} first. Set data.teacher_enable_thinking=false, or data.enable_thinking=true; the "
            "paper's script runs it as it is."
        )
    if teacher is False and student is not False:
        return (
            f"The teacher's prompt closes its thought ({_CLOSED}), and the student's does not. Set both "
            "data.enable_thinking and data.teacher_enable_thinking alike."
        )
    return (
        "See how both prompts end (`renio preview`): with the assistant's header, in the words of the models' own chat "
        "template, and alike in spaces, line breaks and thoughts."
    )


def _thinks(token_ids: Sequence[int], tokenizer: Any) -> bool | None:
    """Whether a prompt's last thought is open (True) or closed (False); None: it has none."""
    text = tokenizer.decode(list(token_ids[-16:]), skip_special_tokens=False)
    opened, closed = text.rfind(_THOUGHT), text.rfind(_CLOSED)
    return None if max(opened, closed) < 0 else opened > closed
