"""A stage in pieces, and what each of them is told."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from gpu_check.record import Record


@dataclass(frozen=True)
class Setting:
    """Where a stage runs.

    Attributes:
        device: a CUDA device, or the CPU at toy size.
        toy: everything as small as it can be.
        folder: for files that a later piece, or a later command, reads.
    """

    device: torch.device
    toy: bool
    folder: Path

    @property
    def is_cuda(self) -> bool:
        """Whether there is a GPU."""
        return self.device.type == "cuda"


@dataclass(frozen=True)
class Unit:
    """A piece of a stage. `run` writes its measurements as it goes, and raises where something is wrong: the other
    pieces run all the same."""

    name: str
    run: Callable[[Record, Setting], None]


class Wrong(Exception):
    """A measurement that is outside its limit."""


def require(record: Record, name: str, value: float, limit: float, unit: str = "1") -> None:
    """Writes a measurement with its limit, and raises `Wrong` where it is above, or is no number."""
    record.add(name, value, unit, limit=limit)
    if not value <= limit:
        raise Wrong(f"{name}: {value:.3g} {unit} is above {limit:.3g}")


def seconds(run: Callable[[], object], device: torch.device, repeats: int = 10) -> float:
    """Median time of a call after 3 more, by CUDA events; on a CPU by its clock."""
    from loss_bench.measure import Clock

    clock = Clock(device)
    laps = [clock.seconds(run, lambda found: None)[0] for _ in range(repeats + 3)]
    return statistics.median(laps[3:])
