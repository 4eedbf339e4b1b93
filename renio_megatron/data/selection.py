"""The records of a source that are used, where those with too long prompts are left out."""

from __future__ import annotations

import bisect
from collections.abc import Callable
from typing import NoReturn

from renio_megatron.data.sources.source import Source
from renio_megatron.errors import DataError
from renio_megatron.types import Record

_MAX_MISSES = 1000
"""Records of an endless source that are looked at in a row, none of which fits."""


class OverlongError(DataError):
    """A record's prompt, or its longest sequence, is longer than a setting or a model allows.

    Args:
        where: the record.
        reason: what is too long, and for what.
        advice: what to do.
    Attributes:
        reason: as given.
    """

    def __init__(self, where: str, reason: str, advice: str) -> None:
        super().__init__(f"{where}: {reason} {advice}")
        self.reason = reason


class Selection:
    """A source's records in their order, without those that do not fit.

    Records are looked at as far as they are asked for, so the n-th is the same in every run and on every rank, and the
    start of a run looks at what the run will use.

    Args:
        source: the records.
        check: raises `OverlongError` for one that does not fit.
        use: what they are used for, for messages.
    """

    def __init__(self, source: Source, check: Callable[[Record], object], use: str) -> None:
        self._source, self._check, self._use = source, check, use
        self._kept: list[int] = []
        self._looked = self._misses = 0
        self.left_out: dict[str, str] = {}
        """Place of each record that was left out -> why."""

    def record(self, number: int) -> Record:
        """The record `number` of those that fit, from 0 on, without end.

        Raises:
            DataError: none fits.
        """
        while len(self._kept) <= number:
            self._look()
        return self._source.record(self._kept[number])

    def num_distinct(self, most: int) -> int:
        """How many records fit, up to `most`, before one comes again."""
        size = self._source.size
        while len(self._kept) < most and (size is None or self._looked < size):
            self._look()
        self.record(0)
        return min(most, len(self._kept) if size is None else bisect.bisect_left(self._kept, size))

    def notice(self) -> str:
        """A sentence about the records that were left out so far; there is one at least."""
        size = self._looked if self._source.size is None else min(self._looked, self._source.size)
        where, why = next(iter(self.left_out.items()))
        return (
            f"data.overlong=skip leaves out {len(self.left_out)} of the first {size} records of {self._use}; the first "
            f"is {where}: {why}"
        )

    def _look(self) -> None:
        """Looks at the next record of the source's order."""
        size = self._source.size
        if size is not None and self._looked == size and not self._kept:
            self._refuse(f"all {size}")
        position, self._looked = self._looked, self._looked + 1
        record = self._source.record(position)
        if size is not None and position >= size and record.where in self.left_out:
            return
        try:
            self._check(record)
        except OverlongError as error:
            self.left_out[record.where] = error.reason
            self._misses += 1
            if size is None and self._misses == _MAX_MISSES:
                self._refuse(f"the last {_MAX_MISSES}")
            return
        self._misses = 0
        self._kept.append(position)

    def _refuse(self, which: str) -> NoReturn:
        where, why = next(iter(self.left_out.items()))
        raise DataError(
            f"{where}: {why} So it is with {which} records, and data.overlong=skip leaves none. Raise "
            "data.max_prompt_length, or allow shorter completions."
        )
