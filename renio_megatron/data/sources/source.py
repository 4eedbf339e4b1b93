"""Records of problems, and sources that yield them in the order of use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from renio_megatron.config import DataConfig
from renio_megatron.errors import DataError
from renio_megatron.types import Record

SPLITS = ("train", "eval")


EVAL_SEED_OFFSET = 2**31  # reasoning-gym seeds item i with seed + i: neighboring seeds would share problems


@dataclass(frozen=True)
class Source:
    """The records of one split, in the order in which they are used.

    Attributes:
        name: name in `data.source`.
        read: index -> record; the index is in [0, size) where the source is finite.
        grader: name of the grader that fits.
        size: number of records; None: endless.
        shuffle_seed: seed of the order; each epoch of a finite source has its own permutation. None: file order.
        has_answers: whether all records have an answer (a source where only some have one is refused).
        has_all_solutions: whether every record is known to have a solution; the others are checked as they are read.
        notices: sentences about how its records are read.
        contents: returns a digest of its rows, where no path of the recipe leads to them; else None.
        score: its own scoring of (given answer, right answer, metadata), 1.0 for right; None where it has none.
    """

    name: str
    read: Callable[[int], Record]
    grader: str
    size: int | None = None
    shuffle_seed: int | None = None
    has_answers: bool = True
    has_all_solutions: bool = False
    score: Callable[[str, str, Mapping[str, Any]], float] | None = None
    notices: tuple[str, ...] = ()
    contents: Callable[[], str] | None = None

    def record(self, position: int) -> Record:
        """The record at `position` (0, 1, 2, ...) of the endless order; a pure function of position and seed."""
        if self.size is None:
            return self.read(position)
        epoch, offset = divmod(position, self.size)
        if self.shuffle_seed is not None:
            offset = int(_permutation(self.size, self.shuffle_seed, epoch)[offset])
        return self.read(offset)

    def require_solutions(self, reason: str) -> None:
        """Raises `DataError` naming the first record of a finite source that has no solution, or an empty one."""
        if not self.has_all_solutions:
            for index in range(self.size or 1):
                solution_of(self.read(index), reason)


def solution_of(record: Record, reason: str) -> str:
    """The record's solution; raises `DataError` with the `reason` that needs one where there is none, or no text."""
    if record.solution is None or not record.solution.strip():
        found = "no solution" if record.solution is None else "an empty solution"
        raise DataError(
            f"{record.where}: the record has {found}, and {reason}. "
            "Set data.solution_key to the column of worked solutions, or leave such records out."
        )
    return record.solution


@lru_cache(maxsize=4)
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    sequence = np.random.SeedSequence(seed, spawn_key=(epoch,))
    return np.random.Generator(np.random.Philox(sequence)).permutation(size)


def order_of(config: DataConfig, split: str) -> int | None:
    """The seed of the order in which a split is used; None: file order."""
    return config.seed if split == "train" else None
