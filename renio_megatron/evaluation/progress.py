"""Live progress of an evaluation: one line on a terminal, a line now and then anywhere else."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

PLAIN_INTERVAL_S = 10.0


class EvaluationProgress:
    """A context manager that shows how many completions are drawn, and how many of them are right.

    Args:
        console: where to write; None is standard output.
        clock: seconds, monotonic.
    """

    def __init__(self, console: Console | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock = console or Console(), clock
        self._total = self._done = self._right = self._tokens = 0
        self._started = self._shown = clock()
        self._bar: Progress | None = None
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[text]}", markup=False),
                console=self._console,
                auto_refresh=False,
            )
            self._task = self._bar.add_task("evaluate", total=0, text="")

    def __enter__(self) -> EvaluationProgress:
        """Shows the bar, on a terminal."""
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Leaves the last state on the screen."""
        if self._bar is not None:
            self._bar.stop()

    def say(self, line: str) -> None:
        """Prints a line."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def expect(self, count: int) -> None:
        """Adds completions that will be drawn to the total."""
        self._total += count
        if self._bar is not None:
            self._bar.update(self._task, total=self._total)

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
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, text=text, refresh=True)
        elif now - self._shown >= PLAIN_INTERVAL_S:
            self._shown = now
            self.say(text)
