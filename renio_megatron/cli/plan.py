"""`renio plan`: estimate, without a GPU, of whether a recipe's run fits into memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from rich.console import Console

from renio_megatron.config import ParallelConfig
from renio_megatron.config.load import check_models, check_world, load_recipe
from renio_megatron.config.schema import DistillationConfig
from renio_megatron.config.teachers import teacher_words
from renio_megatron.errors import ConfigError
from renio_megatron.tools.plan.memory import RESERVE, plan_memory
from renio_megatron.tools.plan.models import PlannedModel, read_model
from renio_megatron.tools.plan.search import MOST_CHANGES, Remedy, search
from renio_megatron.tools.plan.table import plan_table
from renio_megatron.tools.plan.workload import workload

DOES_NOT_FIT = 3
"""Exit code where the rank with the largest need exceeds the given memory."""


def plan(path: str, overrides: Sequence[str], *, world_size: int | None, memory_gib: float | None) -> int:
    """Prints the plan of a distillation recipe; returns 0 where it fits or no memory is given, else `DOES_NOT_FIT`.

    Args:
        path, overrides: as for `renio train`.
        world_size: GPUs of the job, including those that only score; None: one copy of each model.
        memory_gib: memory of each GPU.
    """
    recipe = load_recipe("train", path, overrides)
    config = recipe.config
    assert isinstance(config, DistillationConfig)
    ranks = world_size or config.fewest_ranks
    check_world(config, ranks)
    check_models(config)
    planned, teachers = _models(config)
    found = plan_memory(config, planned, teachers, ranks)
    memory = None if memory_gib is None else memory_gib * 2**30
    reserve = RESERVE * (memory or 0)

    console = Console()
    for text in (
        *recipe.dropped_lines(),
        _layout(config, ranks),
        _work(config, ranks),
        *_notes(config, planned, teachers),
    ):
        console.print(text, highlight=False, soft_wrap=True, markup=False)
    console.print(plan_table(found, memory, reserve))
    if memory is None:
        return 0
    largest = max(found, key=lambda rank: rank.peak)
    fits = largest.peak + reserve <= memory
    console.print(
        f"{'It fits' if fits else 'It does not fit'}: the largest rank needs {largest.peak / 2**30:.1f} GiB of "
        f"{memory / 2**30:g} GiB, of which {reserve / 2**30:.1f} GiB are kept in reserve.",
        highlight=False,
        soft_wrap=True,
    )
    if fits:
        return 0

    def accepts(remedy: Remedy) -> bool:
        """Whether the command fits with a remedy, and not with less of it."""
        found = [_fits(path, _with(overrides, some), ranks, memory - reserve) for some in _and_less(remedy.arguments)]
        return found == [True, *[False] * len(remedy.arguments)]

    given = [_key(text) for text in overrides]
    remedy, least = search(config, planned, teachers, ranks, memory - reserve, accepts, given)
    if remedy is None and given:
        remedy, least = search(config, planned, teachers, ranks, memory - reserve, accepts)
    for text in _advice(remedy, least, ranks, given):
        console.print(text, highlight=False, soft_wrap=True, markup=False)
    return DOES_NOT_FIT


def _key(argument: str) -> str:
    return argument.partition("=")[0].strip()


def _with(overrides: Sequence[str], more: Sequence[str]) -> list[str]:
    """A command's settings with some more, which replace those of the same keys."""
    keys = {_key(text) for text in more}
    return [*(text for text in overrides if _key(text) not in keys), *more]


def _and_less(arguments: Sequence[str]) -> Iterator[list[str]]:
    """All of them, and all but each one."""
    yield list(arguments)
    for left_out in arguments:
        yield [one for one in arguments if one != left_out]


def _fits(path: str, overrides: Sequence[str], ranks: int, limit: float) -> bool | None:
    """Whether a recipe's run fits; None where it cannot be started."""
    try:
        config = load_recipe("train", path, overrides).config
        assert isinstance(config, DistillationConfig)
        check_world(config, ranks)
        check_models(config)
    except ConfigError:
        return None
    student, teachers = _models(config)
    return max(rank.peak for rank in plan_memory(config, student, teachers, ranks)) <= limit


def _advice(remedy: Remedy | None, least: Remedy, ranks: int, given: Sequence[str]) -> list[str]:
    if remedy is None:
        return [
            f"No {MOST_CHANGES} settings of batches, recomputation, layouts and places make it fit on {ranks} GPUs; at "
            f"the least, with {' '.join(least.arguments)}, it needs {least.peak / 2**30:.1f} GiB. Take more GPUs "
            "(--gpus), adapters (lora.r), or shorter completions."
        ]
    replaced = ", ".join(key for key in remedy.settings if key in given)
    how = f"add, in the place of {replaced}" if replaced else "add"
    return [f"It fits, with {remedy.peak / 2**30:.1f} GiB, where you {how}:", f"  {' '.join(remedy.arguments)}"]


def _models(config: DistillationConfig) -> tuple[PlannedModel, dict[str, PlannedModel]]:
    """The student with its adapters, and the teachers by their names."""
    student = read_model(config.model, "model")
    teachers = {
        one.name: student if one.settings.model is None else read_model(one.settings.model, one.setting("model"))
        for one in config.teachers
    }
    return replace(student, lora=config.lora), teachers


def _layout(config: DistillationConfig, ranks: int) -> str:
    parallel, trainers = config.parallel, ranks - config.num_teacher_ranks
    more = [
        text
        for text, is_so in (
            ("distributed optimizer", parallel.use_distributed_optimizer),
            (_dtype(config.train.bf16), True),
            (f"recompute {config.train.recompute_granularity}", config.train.recompute_granularity is not None),
            (f"adapters of rank {config.lora.r} on {', '.join(config.lora.names)}", config.lora.r is not None),
            (f"teacher in {_dtype(config.teacher.bf16)}", config.teacher.bf16 not in (None, config.train.bf16)),
        )
        if is_so
    ]
    if any(one.has_own_layout for one in config.teachers):
        more.append(f"teacher {teacher_words(parallel, config.teacher, trainers)}")
    on = f"{ranks} ranks" if trainers == ranks else f"{trainers} of {ranks} ranks"
    named = (f"{one.name + ': ' if one.name else ''}{one.settings.model or 'itself'}" for one in config.teachers)
    return f"{config.model} learns from {', '.join(named)}; {on}: {parallel.describe(trainers)}; {', '.join(more)}"


def _dtype(bf16: bool | None) -> str:
    return "bf16" if bf16 else "fp32"


def _work(config: DistillationConfig, ranks: int) -> str:
    work = workload(config, config.teachers[0], ranks)
    return (
        f"longest: prompt {config.data.max_prompt_length} + completion {config.rollout.max_completion_length} tokens; "
        f"{work.student.shape.tokens} tokens of a micro-batch on a rank, {work.student.rows} of them completion; "
        f"{work.sampled} sequences sampled together"
    )


def _notes(config: DistillationConfig, student: PlannedModel, teachers: Mapping[str, PlannedModel]) -> list[str]:
    """Notes on the assumptions and limits of this plan."""
    notes = []
    if config.lora.r is not None and any(one.kind == "initial" for one in config.teachers):
        which = "teacher" if len(config.teachers) == 1 else "teacher of kind `initial`"
        notes.append(f"note: the {which} is the student without its adapters; it has no parameters of its own.")
    if len(config.teachers) > 1:
        notes.append("note: each teacher is counted as if all sequences of a step were its own.")
    models = [(student, config.parallel), *((teachers[one.name], one.parallel) for one in config.teachers)]
    notes += dict.fromkeys(_experts(model, parallel) for model, parallel in models if model.experts is not None)
    if config.parallel.context_parallel_size > 1:
        notes.append(
            "note: context parallelism masks its attention; where torch has no fused kernel for masked grouped queries "
            "it keeps a matrix of scores, which is not counted."
        )
    return notes


def _experts(model: PlannedModel, parallel: ParallelConfig) -> str:
    assert model.experts is not None
    here = model.experts.num_experts // parallel.expert_model_parallel_size
    cut = f", each cut over {parallel.expert_tensor_ranks} ranks" if parallel.expert_tensor_ranks > 1 else ""
    load = " Tokens are taken to be spread evenly over the ranks' experts; a busier rank's passes need more."
    return (
        f"note: {model.name} is a mixture of {model.experts.num_experts} experts, of which a rank has {here} in each "
        f"layer{cut}.{load if parallel.expert_model_parallel_size > 1 else ''}"
    )
