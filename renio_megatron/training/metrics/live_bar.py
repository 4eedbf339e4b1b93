"""One live line with a bar on a terminal, and plain lines in it or anywhere else."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column


class LiveBar:
    """A bar with a title before it and a text behind it; where there is no terminal, only `say` shows something.

    Args:
        console: where to write; None is standard output.
        title: text before the bar.
        total: number at which the bar is full.
        text: first text behind the bar.
    """

    def __init__(self, console: Console | None, title: str, total: int, text: str = "") -> None:
        self._console = console or Console()
        self._bar: Progress | None = None
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            # On a narrow terminal the bar gives way first, then the end of the text.
            self._bar = Progress(
                TextColumn("{task.description}", markup=False, style="bold", table_column=Column(no_wrap=True)),
                BarColumn(bar_width=None, table_column=Column(min_width=4, max_width=24)),
                TextColumn("{task.fields[text]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
                console=self._console,
                auto_refresh=False,
            )
            self._task = self._bar.add_task(title, total=total, text=text)

    @property
    def is_live(self) -> bool:
        """Whether there is a terminal."""
        return self._bar is not None

    def start(self) -> None:
        """Shows the bar."""
        if self._bar is not None:
            self._bar.start()
            self._bar.refresh()

    def stop(self) -> None:
        """Leaves the last state on the screen."""
        if self._bar is not None:
            self._bar.stop()

    def update(self, completed: int, total: int, text: str) -> None:
        """Shows another state."""
        if self._bar is not None:
            self._bar.update(self._task, completed=completed, total=total, text=text, refresh=True)

    def say(self, line: str) -> None:
        """Prints a line, above the bar."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
