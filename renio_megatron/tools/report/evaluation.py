"""The figures of an evaluation as a table, and as a picture with their intervals."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from renio_megatron.evaluation.summary import BenchmarkSummary
from renio_megatron.tools.report.curves import COLORS, save_figure

Figures = Mapping[str, BenchmarkSummary]
PICTURE = "summary.png"
NOTE = "[...]: 95 % interval over problems; unread: no answer was found; cut, unread and ungraded ones are wrong"


def show(figures: Figures, directory: Path, console: Console | None = None) -> None:
    """Prints the table, writes the picture, and says where everything is.

    Raises:
        CheckpointError: the picture cannot be written.
    """
    console = console or Console()
    console.print(summary_table(figures))
    plot_summary(figures, directory / PICTURE)
    console.print(
        f"{directory} holds summary.json, {PICTURE}, completions.jsonl and problems.jsonl",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def summary_table(figures: Figures) -> Table:
    """A line for each benchmark; it fits 80 columns where names are short."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), caption=NOTE, caption_justify="left")
    table.add_column("benchmark", no_wrap=True)
    for name in ("problems", "avg@n", "pass@n", "maj@n", "tokens", "cut", "unread"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, one in figures.items():
        low, high = one.interval
        table.add_row(
            escape(name),
            f"{one.problems} x {one.n}",
            escape(f"{one.avg_at_k:.3f} [{low:.3f}, {high:.3f}]"),
            f"{one.pass_at_k[str(one.n)]:.3f}",
            "-" if one.majority_at_k is None else f"{one.majority_at_k:.3f}",
            "-" if one.length is None else f"{one.length:.0f}",
            f"{one.cut_frac:.3f}",
            f"{one.unparsable_frac:.3f}",
        )
    return table


def plot_summary(figures: Figures, path: Path) -> None:
    """Writes a PNG: avg@n with its interval, pass@n and majority@n of each benchmark.

    Raises:
        CheckpointError: the file cannot be written.
    """
    figure = Figure(figsize=(8, 1.6 + 0.5 * len(figures)), dpi=120, layout=ConstrainedLayoutEngine())
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for place, one in enumerate(figures.values()):
        low, high = one.interval
        axes.plot([low, high], [place, place], color=COLORS[0], linewidth=3, alpha=0.4, solid_capstyle="butt")
        axes.plot([one.avg_at_k], [place], "o", color=COLORS[0], label="avg@n, 95 % interval" if place == 0 else None)
        if one.n > 1:
            at_n = one.pass_at_k[str(one.n)]
            axes.plot([at_n], [place], "^", color=COLORS[2], label="pass@n" if place == 0 else None)
            if one.majority_at_k is not None:
                axes.plot([one.majority_at_k], [place], "s", color=COLORS[1], mfc="none", label="majority@n")
    names = [f"{name}\n{one.problems} x {one.n}" for name, one in figures.items()]
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(-0.02, 1.02)
    axes.set_xlabel("share of problems")
    axes.grid(axis="x", alpha=0.3)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=3, frameon=False)
    save_figure(figure, path)
