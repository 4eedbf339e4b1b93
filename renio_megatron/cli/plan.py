"""`renio plan`: whether a recipe's run fits into memory, without torch and without a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console

from renio_megatron.config import RunConfig, check_models, check_world, load_recipe
from renio_megatron.errors import ConfigError
from renio_megatron.layout_rules import has_own_layout
from renio_megatron.plan.memory import RESERVE, plan_memory, workload
from renio_megatron.plan.models import PlannedModel, read_model
from renio_megatron.report.plan_table import plan_table

DOES_NOT_FIT = 3
"""The exit code where the largest rank needs more than there is."""


def plan(path: str, overrides: Sequence[str], *, world_size: int | None, memory_gib: float | None) -> int:
    """Prints the plan of a distillation recipe; 0 where it fits or no memory is given, otherwise `DOES_NOT_FIT`.

    Args:
        path, overrides: as for `renio train`.
        world_size: GPUs of the job; None: one copy of the model.
        memory_gib: of each GPU.
    """
    config = load_recipe("train", path, overrides).config
    assert isinstance(config, RunConfig)
    if config.teacher.routes:
        raise ConfigError(
            "renio plan does not count several teachers (teacher.routes). Plan with the largest of them as the only "
            "one: teacher.kind and teacher.model in their place."
        )
    if has_own_layout(config.parallel, config.teacher):
        raise ConfigError(
            "renio plan does not count a teacher in a layout of its own yet. Plan with teacher.ranks=colocated and the "
            "keys of teacher.parallel null: that is the memory where both models are cut alike."
        )
    if config.teacher.bf16 not in (None, config.train.bf16):
        raise ConfigError(
            f"renio plan does not count a teacher's pass in another dtype yet (teacher.bf16={config.teacher.bf16}). "
            "Plan with teacher.bf16=null."
        )
    ranks = world_size or config.parallel.model_ranks
    check_world(config, ranks)
    check_models(config)
    student = read_model(config.model, "model")
    teacher = student if config.teacher.model is None else read_model(config.teacher.model, "teacher.model")
    _check_experts(config, student)
    found = plan_memory(config, replace(student, lora=config.lora), teacher, ranks)
    memory = None if memory_gib is None else memory_gib * 2**30
    reserve = RESERVE * (memory or 0)

    console = Console()
    for text in (_layout(config, ranks), _work(config, ranks), *_notes(config, teacher)):
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
    return 0 if fits else DOES_NOT_FIT


def _check_experts(config: RunConfig, student: PlannedModel) -> None:
    """Raises `ConfigError` for layouts of experts that the plan does not count."""
    parallel = config.parallel
    if student.experts is not None:
        raise ConfigError(
            f"renio plan does not count a trained mixture of experts yet (model: {student.architecture.family}). Plan "
            "for it as a teacher of a dense student: that counts its weights and a forward pass."
        )
    if (parallel.expert_model_parallel_size, parallel.expert_tensor_ranks) != (1, parallel.tensor_model_parallel_size):
        raise ConfigError(
            f"renio plan does not count experts on different ranks yet (parallel.expert_model_parallel_size="
            f"{parallel.expert_model_parallel_size}, expert_tensor_parallel_size={parallel.expert_tensor_ranks}). Plan "
            "with 1 and null: it counts all experts, cut over the tensor-parallel ranks."
        )


def _layout(config: RunConfig, ranks: int) -> str:
    parallel = config.parallel
    sizes = {
        "TP": parallel.tensor_model_parallel_size,
        "PP": parallel.pipeline_model_parallel_size,
        "VPP": parallel.virtual_pipeline_model_parallel_size or 1,
        "CP": parallel.context_parallel_size,
        "DP": ranks // parallel.model_ranks,
    }
    layout = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1 or name == "TP")
    more = [
        text
        for text, is_so in (
            ("sequence parallelism", parallel.sequence_parallel),
            ("distributed optimiser", parallel.use_distributed_optimizer),
            ("bf16" if config.train.bf16 else "fp32", True),
            (f"recompute {config.train.recompute_granularity}", config.train.recompute_granularity is not None),
            (f"adapters of rank {config.lora.r} on {', '.join(config.lora.names)}", config.lora.r is not None),
        )
        if is_so
    ]
    return f"{config.model} learns from {config.teacher.model or 'itself'}; {ranks} ranks: {layout}; {', '.join(more)}"


def _work(config: RunConfig, ranks: int) -> str:
    work = workload(config, ranks)
    return (
        f"longest: prompt {config.data.max_prompt_length} + completion {config.rollout.max_completion_length} tokens; "
        f"{work.pieces.tokens} tokens of a micro-batch on a rank, {work.rows} of them completion; "
        f"{work.sampled} sequences sampled together"
    )


def _notes(config: RunConfig, teacher: PlannedModel) -> list[str]:
    """What the reader must know of this plan."""
    notes = []
    if config.lora.r is not None and config.teacher.kind == "initial":
        notes.append("note: the teacher is the student without its adapters; it has no parameters of its own.")
    if teacher.experts is not None:
        notes.append(
            f"note: {teacher.name} is a mixture of {teacher.experts.count} experts. All are counted, cut over the "
            "tensor-parallel ranks."
        )
    if config.parallel.context_parallel_size > 1:
        notes.append(
            "note: context parallelism masks its attention; where torch has no fused kernel for masked grouped queries "
            "it keeps a matrix of scores, which is not counted."
        )
    return notes
