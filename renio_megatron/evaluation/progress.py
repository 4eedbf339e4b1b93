"""Live progress of an evaluation: one line on a terminal, a line now and then anywhere else."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol

from rich.console import Console

from renio_megatron.training.metrics.live_bar import LiveBar

PLAIN_INTERVAL_S = 10.0


class DrawProgress(Protocol):
    """Shows what is drawn of benchmarks."""

    def say(self, line: str) -> None:
        """Prints a line."""

    def expect(self, count: int) -> None:
        """Hears of completions of the next benchmark that will be drawn."""

    def add(self, benchmark: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Takes rows that were drawn."""


class EvaluationProgress:
    """A context manager that shows how many completions are drawn, and how many of them are right.

    Args:
        console: where to write; None is standard output.
        clock: seconds, monotonic.
    """

    def __init__(self, console: Console | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._total = self._done = self._right = self._tokens = 0
        self._started = self._shown = clock()
        self._bar = LiveBar(console, "evaluate", 0)

    def __enter__(self) -> EvaluationProgress:
        """Shows the bar, on a terminal."""
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Leaves the last state on the screen."""
        self._bar.stop()

    def say(self, line: str) -> None:
        """Prints a line."""
        self._bar.say(line)

    def expect(self, count: int) -> None:
        """Adds completions that will be drawn to the total."""
        self._total += count

    def add(self, benchmark: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Takes rows that were drawn."""
        self._done += len(rows)
        self._right += sum(bool(row["correct"]) for row in rows)
        self._tokens += sum(row["tokens"] or 0 for row in rows)
        now = self._clock()
        seconds = max(now - self._started, 1e-9)
        left = seconds / max(self._done, 1) * max(self._total - self._done, 0)
        text = f"{self._done}/{self._total} {benchmark}, right {self._right / max(self._done, 1):.3f}"
        text += f", {self._tokens / seconds:.0f} tokens/s, {left / 60:.0f} min left"
        self._bar.update(self._done, self._total, text)
        if not self._bar.is_live and now - self._shown >= PLAIN_INTERVAL_S:
            self._shown = now
            self.say(text)
