"""Plot of the metrics of one or several runs."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from renio_megatron.errors import CheckpointError
from renio_megatron.training.metrics.registry import family_of

Runs: TypeAlias = Mapping[str, Sequence[Mapping[str, Any]]]

# Okabe and Ito's palette, distinguishable for color-blind readers; a run keeps its color in all panels.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LOG_SPREAD = 10.0
SMOOTHING = 20
# Space above the curves for a legend that covers none of them.
HEADROOM = 1.3
_OF_BENCHMARKS = "eval/*/avg_at_n"
SHARE_TICKS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


def plot_curves(runs: Runs, path: str | Path) -> None:
    """Writes a PNG, 1200 pixels wide, with panels of what the runs have: loss, accuracy, weights, and AUC.

    Two panels are side by side, each row of them 400 pixels high.

    Args:
        runs: name of a run -> its rows of metrics in the order of their steps; any value may be missing.
        path: the PNG file, written atomically; its directory is created.

    Raises:
        CheckpointError: the file cannot be written.
    """
    families = {
        family_of(name) for rows in runs.values() for row in rows for name, value in row.items() if value is not None
    }
    chosen = [draw for names, draw in _PANELS if not families.isdisjoint(names)] or [_draw_loss]
    num_rows, num_columns = -(-len(chosen) // 2), min(len(chosen), 2)
    figure = Figure(figsize=(12, 4 * num_rows), dpi=100, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    FigureCanvasAgg(figure)
    last_step = max((row["step"] for rows in runs.values() for row in rows), default=0)
    for number, draw in enumerate(chosen, start=1):
        axes = figure.add_subplot(num_rows, num_columns, number)
        draw(axes, runs)
        axes.set_xlim(-0.02 * max(last_step, 1), 1.02 * max(last_step, 1))
    if any(_window(len(rows)) > 1 for rows in runs.values()):
        figure.supxlabel(f"faint: single steps; strong: centered mean over 1/{SMOOTHING} of the run", fontsize=9)
    save_figure(figure, Path(path))


def centered_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of each value and up to `window` // 2 values on each side; fewer at the ends.

    >>> centered_mean([1.0, 3.0, 8.0], 3)
    [2.0, 4.0, 5.5]
    """
    reach = window // 2
    parts = (values[max(0, index - reach) : index + reach + 1] for index in range(len(values)))
    return [sum(part) / len(part) for part in parts]


def _window(num_steps: int) -> int:
    return max(1, num_steps // SMOOTHING)


def _points(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[list[float], list[float]]:
    known = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return [float(step) for step, _ in known], [float(value) for _, value in known]


def _values(runs: Runs, shown: Sequence[str], name: str) -> list[float]:
    return [value for run in shown for value in _points(runs[run], name)[1]]


def _colors(runs: Runs) -> dict[str, str]:
    return {run: COLORS[index % len(COLORS)] for index, run in enumerate(runs)}


def _line(
    axes: Axes, points: tuple[list[float], list[float]], *, color: str, label: str, style: Any, smooth: bool
) -> None:
    """One curve; a noisy one is drawn faint, with its centered mean on top. A single point gets a marker."""
    steps, values = points
    if not steps:
        return
    window = _window(len(values)) if smooth else 1
    if window > 1:
        axes.plot(steps, values, color=color, alpha=0.22, linewidth=0.8)
    marker = "o" if len(steps) == 1 or not smooth else None
    axes.plot(
        steps,
        centered_mean(values, window),
        color=color,
        linestyle=style,
        marker=marker,
        markersize=5,
        markerfacecolor=color if style == "-" else "white",
        linewidth=1.8,
        label=label,
    )


def _finish(axes: Axes, title: str, ylabel: str, *, extra: Axes | None = None, wide_legend: bool = False) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel("step")
    axes.set_ylabel(ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(True, color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines["top"].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    if extra is None:
        axes.spines["right"].set_visible(False)
    else:
        more_handles, more_labels = extra.get_legend_handles_labels()
        handles, labels = handles + more_handles, labels + more_labels
    if handles:
        (extra or axes).legend(
            handles,
            labels,
            loc="upper right" if wide_legend else "best",
            ncols=2 if wide_legend else 1,
            fontsize=8.5,
            framealpha=0.9,
            handlelength=3.2,
        )
    else:
        axes.text(0.5, 0.6, "no values", transform=axes.transAxes, ha="center", va="center", color="#777777")


def _draw_accuracy(axes: Axes, runs: Runs) -> None:
    for run, color in _colors(runs).items():
        for kind, style in (("greedy", "-"), ("sampled", "--")):
            points = _points(runs[run], f"eval/accuracy_{kind}")
            _line(axes, points, color=color, label=f"{run}, {kind}", style=style, smooth=False)
        names = dict.fromkeys(name for row in runs[run] for name in row if family_of(name) == _OF_BENCHMARKS)
        for name, dashes in zip(names, itertools.cycle((":", "-.", (0, (5, 1)))), strict=False):
            label = f"{run}, {name.split('/')[1]} avg@n"
            _line(axes, _points(runs[run], name), color=color, label=label, style=dashes, smooth=False)
    axes.set_ylim(bottom=0.0)
    _finish(axes, "Accuracy on held-out problems", "accuracy [1]")


def _draw_loss(axes: Axes, runs: Runs) -> None:
    for run, color in _colors(runs).items():
        _line(axes, _points(runs[run], "loss"), color=color, label=run, style="-", smooth=True)
    values = _values(runs, list(runs), "loss")
    if values and min(values) > 0.0 and max(values) > LOG_SPREAD * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    _finish(axes, "Training loss", "loss [nats/token]")


def _draw_weights(axes: Axes, runs: Runs) -> None:
    """Weights on the left, effective share of the batch on the right; runs whose weights are all 1 are left out."""
    right = axes.twinx()
    right.spines["top"].set_visible(False)
    colors = _colors(runs)
    weighted = [run for run in runs if any(value != 1.0 for value in _points(runs[run], "weight/max")[1])]
    shown = weighted or list(runs)
    for run in shown:
        rows, color = runs[run], colors[run]
        right_color = color if len(shown) > 1 else "#444444"
        _line(axes, _points(rows, "weight/max"), color=color, label=f"{run}, largest", style="-", smooth=True)
        _line(axes, _points(rows, "weight/mean"), color=color, label=f"{run}, mean", style="--", smooth=True)
        points = _points(rows, "weight/ess_frac")
        _line(right, points, color=right_color, label=f"{run}, effective share (right)", style=":", smooth=True)
    axes.set_ylim(0.0, HEADROOM * max([1.0, *_values(runs, shown, "weight/max")]))
    right.set_ylim(0.0, HEADROOM)
    right.set_yticks(SHARE_TICKS)
    right.set_ylabel("effective share of the batch [1]")
    _finish(axes, "Sample weights", "weight [1]", extra=right, wide_legend=True)


def _draw_detection(axes: Axes, runs: Runs) -> None:
    for run, color in _colors(runs).items():
        points = _points(runs[run], "renio/auc_wrong")
        _line(axes, points, color=color, label=f"{run}, AUC", style="-", smooth=True)
        points = _points(runs[run], "rollout/accuracy")
        _line(axes, points, color=color, label=f"{run}, rollout accuracy", style="--", smooth=True)
    axes.axhline(0.5, color="#444444", linewidth=1.0, linestyle=":")
    axes.annotate("chance", (0.005, 0.5), xycoords=("axes fraction", "data"), ha="left", va="bottom", fontsize=8)
    axes.set_ylim(0.0, HEADROOM)
    axes.set_yticks(SHARE_TICKS)
    _finish(axes, "Does the raw weight find wrong completions?", "AUC, accuracy [1]", wide_legend=True)


_PANELS: tuple[tuple[tuple[str, ...], Callable[[Axes, Runs], None]], ...] = (
    (("eval/accuracy_greedy", "eval/accuracy_sampled", _OF_BENCHMARKS), _draw_accuracy),
    (("loss",), _draw_loss),
    (("weight/max", "weight/mean", "weight/ess_frac"), _draw_weights),
    (("renio/auc_wrong", "rollout/accuracy"), _draw_detection),
)
"""Names of metrics, and what draws them."""


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a PNG atomically, and creates its directory; raises `CheckpointError` where it cannot be written."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(temporary, format="png")
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise CheckpointError(
            f"cannot write the picture to {path}: {error.strerror or error}. "
            "Free space there or make it writable, or choose another path."
        ) from error
