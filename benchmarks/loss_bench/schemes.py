"""Every way to compute the loss, in one table: what it can do and the function that does it.

A scheme's `forward` takes a `Problem` and returns the whole loss, tied to the problem's leaves; backward is autograd's
call, the same for all. The peers' schemes were written for this benchmark from the mathematics that their sources
describe (`peers.py`); Liger-Kernel is called itself.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import linear

from loss_bench import peers
from loss_bench.problem import WEIGHTING, Cell, Problem
from renio_megatron import LossConfig, distillation_loss

Forward = Callable[[Problem], torch.Tensor]
KL = ("forward KL", "reverse KL")
ALL = (*KL, "JSD")


@dataclass(frozen=True)
class Scheme:
    """One row of a table.

    Attributes:
        name: as it is printed.
        forward: the loss of a problem, a scalar with a gradient.
        kind: `logits`, or `linear` where hidden states and heads are given.
        divergences: those it has.
        clip: whether it bounds the entries.
        shards: whether the vocabulary may be cut over ranks.
        weights: `computed` (ReNIO's, from the same logits), `given` (finished ones), `none` (a plain mean).
        overwrites: whether the student's logits are destroyed, so that each repetition needs new ones.
        missing: why it cannot run here, in two words; None where it can.
        prepare: what is to be done once for a cell, such as compiling; returns the forward to use.
        is_narrow: whether it is the row of a scheme that keeps something in 16 bits where the inputs have 16.
    """

    name: str
    forward: Forward
    kind: str = "logits"
    divergences: tuple[str, ...] = ALL
    clip: bool = True
    shards: bool = True
    weights: str = "computed"
    overwrites: bool = False
    missing: Callable[[torch.device], str | None] = lambda device: None
    prepare: Callable[[Forward], Forward] = lambda forward: forward
    is_narrow: bool = False

    def refusal(self, cell: Cell, device: torch.device) -> str | None:
        """Why there is no such row, in two words; None where there is."""
        if cell.divergence not in self.divergences:
            return f"no {cell.divergence}"
        if cell.clip is not None and not self.clip:
            return "no clip"
        if cell.tp > 1 and not self.shards:
            return "no shards"
        if self.is_narrow and cell.dtype.itemsize > 2:
            return "fp32 inputs"
        return self.missing(device)


def expression(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    token_ids: torch.Tensor,
    owner: torch.Tensor,
    lengths: torch.Tensor,
    beta: float,
    clip: float | None,
    upcast: bool = True,
) -> torch.Tensor:
    """The reference expression with ReNIO's weights, as one writes it in PyTorch: log-softmax of both models (in fp32
    with `upcast`, else in the logits' dtype), entries by `kl_div`, clamp, sum, means."""
    dtype = torch.promote_types(student_logits.dtype, torch.float32) if upcast else student_logits.dtype
    student = student_logits.log_softmax(-1, dtype=dtype)
    teacher = teacher_logits.log_softmax(-1, dtype=dtype)
    entries = peers.divergence_entries(student, teacher, beta)
    if clip is not None:
        entries = entries.clamp(min=0.0, max=clip)
    with torch.no_grad():
        ratio = (student - teacher).gather(1, token_ids[:, None])[:, 0].to(lengths.dtype).clamp(max=WEIGHTING.ceiling)
        pivotal = ratio >= WEIGHTING.threshold
        count = torch.zeros_like(lengths).index_add(0, owner, pivotal.to(ratio.dtype))
        total = torch.zeros_like(lengths).index_add(0, owner, torch.where(pivotal, ratio, 0.0))
        raw = (total / count.clamp(min=1) / WEIGHTING.temperature).exp()
        weights = (raw / raw.mean()).clamp(max=WEIGHTING.cap)
        scale = (weights / lengths / len(lengths))[owner]
    return (scale * entries.sum(-1)).sum()


def _expression_arguments(problem: Problem) -> tuple[Any, ...]:
    lengths = torch.full_like(problem.weights, problem.cell.tokens / problem.num_sequences)
    return problem.token_ids, problem.owner, lengths, problem.cell.beta, problem.cell.clip


def _eager(problem: Problem, *, upcast: bool = True, function: Any = expression) -> torch.Tensor:
    arguments = _expression_arguments(problem)
    return function(problem.student_logits, problem.teacher_logits, *arguments, upcast)


def _eager_linear(problem: Problem) -> torch.Tensor:
    student = linear(problem.student_hidden, problem.student_head)
    with torch.no_grad():
        teacher = linear(problem.teacher_hidden, problem.teacher_head)
    return expression(student, teacher, *_expression_arguments(problem))


def _compile(forward: Forward) -> Forward:
    """`forward` with the expression compiled for one shape."""
    torch._dynamo.reset()
    compiled = torch.compile(expression, dynamic=False)
    return lambda problem: forward(problem, function=compiled)  # type: ignore[call-arg]


def _ours(
    problem: Problem, student: torch.Tensor, teacher: torch.Tensor, *, overwrite: bool, given: bool = False
) -> torch.Tensor:
    return distillation_loss(
        student,
        teacher,
        problem.token_ids,
        problem.owner,
        problem.num_sequences,
        _loss_config(problem),
        WEIGHTING,
        problem.shard,
        weights=problem.weights if given else None,
        overwrite_logits=overwrite,
    ).loss


def _loss_config(problem: Problem) -> LossConfig:
    return LossConfig(beta=problem.cell.beta, entry_clip=problem.cell.clip)


def _ours_after_linear(problem: Problem) -> torch.Tensor:
    student = linear(problem.student_hidden, problem.student_head)
    with torch.no_grad():
        teacher = linear(problem.teacher_hidden, problem.teacher_head)
    return _ours(problem, student, teacher, overwrite=True, given=True)


def fused_linear(problem: Problem, dtype: torch.dtype, chunk_size: int | None = None) -> Any:
    """The whole output of our fused form, with weights given."""
    from renio_megatron.losses.linear_distillation import linear_distillation_loss

    return linear_distillation_loss(
        problem.student_hidden,
        problem.student_head,
        problem.teacher_hidden,
        problem.teacher_head,
        problem.token_ids,
        problem.owner,
        problem.num_sequences,
        _loss_config(problem),
        WEIGHTING,
        problem.shard,
        weights=problem.weights,
        chunk_size=chunk_size,
        logits_dtype=dtype,
    )


def declared_buffers(cell: Cell, dtype: torch.dtype, chunk_size: int) -> int:
    """Bytes that our fused form says it allocates beside its results."""
    from renio_megatron.losses.linear_distillation import buffer_bytes

    return buffer_bytes(cell.tokens, cell.width, cell.dtype, logits_dtype=dtype, chunk_size=chunk_size)


def _without_linear_loss(device: torch.device) -> str | None:
    return None if importlib.util.find_spec("renio_megatron.losses.linear_distillation") else "not there"


def _without_liger(device: torch.device) -> str | None:
    if importlib.util.find_spec("liger_kernel") is None:
        return "not installed"
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # slow: for tests of correctness without a GPU
    return None if device.type == "cuda" or is_interpreted else "no GPU"


def _without_compiler(device: torch.device) -> str | None:
    if device.type == "cuda":
        return None if importlib.util.find_spec("triton") else "no triton"
    return None if any(shutil.which(name) for name in ("c++", "g++", "clang++")) else "no compiler"


EAGER = Scheme("eager", _eager, shards=False)
OURS = Scheme(
    "ours, overwriting",
    lambda p: _ours(p, p.student_logits, p.teacher_logits, overwrite=True),
    overwrites=True,
)
COMPILED = Scheme("torch.compile", _eager, shards=False, prepare=_compile, missing=_without_compiler)
LIGER_JSD = Scheme(
    "Liger jsd", lambda p: peers.liger_jsd(p, upcast=True), clip=False, shards=False, weights="none",
    missing=_without_liger,
)  # fmt: skip
LIGER_JSD_NATIVE = Scheme(
    "Liger jsd, 16-bit log-probs", lambda p: peers.liger_jsd(p, upcast=False), clip=False, shards=False,
    weights="none", missing=_without_liger, is_narrow=True,
)  # fmt: skip
FUSED_LIGER = Scheme(
    "Liger fused_linear_jsd", peers.liger_fused_linear_jsd, "linear", clip=False, shards=False, weights="none",
    missing=_without_liger,
)  # fmt: skip
FUSED = {
    dtype: Scheme(
        f"ours, fused linear, {name} logits",
        lambda p, dtype=dtype: fused_linear(p, dtype).loss,  # type: ignore[misc]
        "linear",
        weights="given",
        missing=_without_linear_loss,
        is_narrow=dtype == torch.bfloat16,
    )
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32"))
}

SCHEMES = (
    EAGER,
    Scheme("eager, 16-bit log-probs", lambda p: _eager(p, upcast=False), shards=False, is_narrow=True),
    COMPILED,
    Scheme("Megatron KD", peers.megatron_kd, divergences=KL, clip=False, weights="given"),
    Scheme("NeMo-RL", peers.nemo_rl, divergences=("reverse KL",), clip=False, weights="given"),
    Scheme("DeepSpeed", peers.deepspeed, divergences=("forward KL",), clip=False, weights="given"),
    LIGER_JSD,
    LIGER_JSD_NATIVE,
    Scheme("ours", lambda p: _ours(p, p.student_logits, p.teacher_logits, overwrite=False)),
    OURS,
    Scheme("eager linear", _eager_linear, "linear", shards=False),
    FUSED_LIGER,
    Scheme("linear, then ours", _ours_after_linear, "linear", weights="given"),
    *FUSED.values(),
)
