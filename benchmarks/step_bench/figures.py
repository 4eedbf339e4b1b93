"""What a step is measured against: the operations that it must do, and the memory that `renio plan` counts."""

from __future__ import annotations

from renio_megatron.config import DataConfig, LossConfig, RolloutConfig, TeacherConfig, TrainConfig
from renio_megatron.config.schema import DistillationConfig
from renio_megatron.models.architecture import Architecture
from renio_megatron.tools.plan.memory import plan_memory
from renio_megatron.tools.plan.models import PlannedModel
from step_bench.models import forward_flops, layer_parameters
from step_bench.roles import Workload

PLANNED = {
    "rollout": ("sampling",),
    "teacher": ("teacher", "ordering", "exchange"),
    "train": ("scores", "loss", "backward", "step"),
}
"""A phase of the measurement -> those of the plan."""


def planned_bytes(student: Architecture, teacher: Architecture, work: Workload, *, bf16: bool = True) -> dict[str, int]:
    """What `renio plan` counts on one rank at the largest moment of each phase, bytes."""
    config = DistillationConfig(
        model="student",
        teacher=TeacherConfig(kind="separate", model="teacher"),
        data=DataConfig(max_prompt_length=work.prompt),
        rollout=RolloutConfig(max_completion_length=work.completion),
        loss=LossConfig(),
        train=TrainConfig(bf16=bf16, global_batch_size=work.sequences, max_tokens_per_micro_batch=work.max_tokens),
        output_dir="nowhere",
    )
    models = PlannedModel("student", student), {"": PlannedModel("teacher", teacher)}
    (rank,) = plan_memory(config, *models, 1)
    held = sum(rank.held.values())
    return {
        phase: held + max((sum(rank.phases[name].values()) for name in names if name in rank.phases), default=0)
        for phase, names in PLANNED.items()
    }


def phase_flops(student: Architecture, teacher: Architecture, work: Workload) -> dict[str, float]:
    """Model operations of each phase: forward passes, three times that for training; nothing recomputed is counted.

    The loss makes the teacher's logits a second time; that belongs to training.
    """
    length, rows = work.prompt + work.completion - 1, work.drawn
    theirs = forward_flops(teacher, work.sequences, length, rows)
    loss_head = 2.0 * rows * teacher.vocab_size * teacher.hidden_size
    mine = forward_flops(student, work.sequences, length, rows)
    return {"rollout": mine, "teacher": theirs, "train": 3 * mine + loss_head}


def decode_bytes(student: Architecture, sequences: int, context: int) -> float:
    """The fewest bytes that a decoding pass reads in bf16: all weights once, and the keys and values of its context."""
    weights = layer_parameters(student) + student.vocab_size * student.hidden_size
    cache = 2 * student.num_layers * student.num_query_groups * student.kv_channels * sequences * context
    return 2.0 * (weights + cache)
