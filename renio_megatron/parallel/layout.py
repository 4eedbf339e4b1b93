"""Parallel layout of a rank: its place on every mesh axis, its device and its backend. No Megatron here."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Axis:
    """A rank's place on one mesh axis.

    Attributes:
        size, rank: ranks on the axis, and this one's index among them.
        group: the process group along the axis; None where nothing is distributed.
        ranks: global ranks along the axis, in order.
    """

    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None
    ranks: tuple[int, ...] = (0,)

    @property
    def is_first(self) -> bool:
        """Whether this rank is the first on the axis."""
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        """Whether this rank is the last on the axis."""
        return self.rank == self.size - 1


@dataclass(frozen=True)
class ParallelLayout:
    """A rank's place in the world and on all mesh axes.

    Attributes:
        rank, world_size: global rank, and number of ranks.
        tensor, pipeline, data, context: the axes; `data` never holds context-parallel ranks.
        expert_model, expert_tensor, expert_data: the axes of a stage's experts: over different experts, within one, and
            over copies of the same. They partition the same ranks as tensor, context and data do.
        expert_tensor_and_model: all ranks that hold one copy of a stage's experts.
        device: the device on which this rank computes.
        rendezvous_seconds: time from this rank's call to join the world until all ranks had joined.
        is_teacher_rank: whether this rank only scores, in a world of such ranks.
    """

    rank: int = 0
    world_size: int = 1
    tensor: Axis = Axis()
    pipeline: Axis = Axis()
    data: Axis = Axis()
    context: Axis = Axis()
    expert_model: Axis = Axis()
    expert_tensor: Axis = Axis()
    expert_data: Axis = Axis()
    expert_tensor_and_model: Axis = Axis()
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rendezvous_seconds: float = 0.0
    is_teacher_rank: bool = False

    @property
    def sizes(self) -> dict[str, int]:
        """Ranks on each axis, by the axis's usual abbreviation."""
        axes = {"TP": self.tensor, "PP": self.pipeline, "CP": self.context, "DP": self.data, "EP": self.expert_model}
        return {name: axis.size for name, axis in axes.items()}

    @property
    def is_main(self) -> bool:
        """Whether this rank reports for the job: logs, metrics, files."""
        return self.rank == 0 and not self.is_teacher_rank
