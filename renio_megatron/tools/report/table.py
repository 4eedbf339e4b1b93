"""The comparison table of finished runs: one column per run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.markup import escape
from rich.table import Table

from renio_megatron.training.metrics.registry import family_of

AVERAGED_STEPS = 5

NOTE = (
    "At this scale ReNIO does not beat plain OPD in accuracy. What reproduces is that the raw weight finds the wrong "
    "trajectories (AUC against wrong answers; 0.5 is chance)."
)


@dataclass(frozen=True)
class RunSummary:
    """Summary numbers of a run; None where the run has no such value.

    Attributes:
        name: heading of the run's column.
        greedy_before, greedy_after, sampled_before, sampled_after: accuracy on held-out problems, in [0, 1], at step 0
            and at the last evaluation after it.
        loss_first, loss_last: mean over the first and the last `AVERAGED_STEPS` steps, nats/token.
        weight_mean: mean over all steps of the mean sample weight.
        weight_max: largest sample weight of the run.
        auc_wrong: mean over the second half of the steps of the AUC of the raw weight against wrong answers.
        seconds: sum of the steps' times, evaluation not included.
        benchmarks: avg@n of each benchmark at step 0 and at the last evaluation after it, by its name.
    """

    name: str
    greedy_before: float | None = None
    greedy_after: float | None = None
    sampled_before: float | None = None
    sampled_after: float | None = None
    loss_first: float | None = None
    loss_last: float | None = None
    weight_mean: float | None = None
    weight_max: float | None = None
    auc_wrong: float | None = None
    seconds: float | None = None
    benchmarks: Mapping[str, tuple[float | None, float | None]] = field(default_factory=dict)


def summarize(metrics: Sequence[Mapping[str, Any]], name: str) -> RunSummary:
    """The summary of a run's rows of metrics, which are in the order of their steps.

    >>> summarize([{"step": 1, "loss": 3.0}, {"step": 2, "loss": 1.0}], "OPD").loss_first
    2.0
    """
    last_step = max((row["step"] for row in metrics), default=0)
    losses = _values(metrics, "loss")
    seconds = _values(metrics, "time/step_s")
    greedy_before, greedy_after = _before_and_after(metrics, "eval/accuracy_greedy")
    sampled_before, sampled_after = _before_and_after(metrics, "eval/accuracy_sampled")
    return RunSummary(
        name=name,
        greedy_before=greedy_before,
        greedy_after=greedy_after,
        sampled_before=sampled_before,
        sampled_after=sampled_after,
        loss_first=_mean(losses[:AVERAGED_STEPS]),
        loss_last=_mean(losses[-AVERAGED_STEPS:]),
        weight_mean=_mean(_values(metrics, "weight/mean")),
        weight_max=max(_values(metrics, "weight/max"), default=None),
        auc_wrong=_mean(_values([row for row in metrics if row["step"] > last_step / 2], "renio/auc_wrong")),
        seconds=sum(seconds) if seconds else None,
        benchmarks={
            name.split("/")[1]: _before_and_after(metrics, name)
            for name in dict.fromkeys(name for row in metrics for name in row)
            if family_of(name) == "eval/*/avg_at_n"
        },
    )


def comparison_table(runs: Sequence[RunSummary]) -> Table:
    """A table with one column per run and one line per number; a missing value shows as "-"."""
    table = Table(title="Comparison of the runs", caption=NOTE, caption_justify="left")
    table.add_column("", no_wrap=True)
    for run in runs:
        table.add_column(escape(run.name), justify="right", no_wrap=True)
    for label, cell in _LINES:
        table.add_row(label, *(cell(run) for run in runs))
    return table


def run_table(run: RunSummary) -> Table:
    """A table of one run, without the lines of which it has nothing."""
    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    for name, (before, after) in run.benchmarks.items():
        table.add_row(f"{escape(name)} avg@n, before / after", f"{_number(before)} / {_number(after)}")
    for label, cell in _LINES:
        if set(text := cell(run)) - set("- /"):
            table.add_row(label, text)
    return table


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


_LINES: tuple[tuple[str, Callable[[RunSummary], str]], ...] = (
    ("greedy accuracy, before / after", lambda run: f"{_number(run.greedy_before)} / {_number(run.greedy_after)}"),
    ("sampled accuracy, before / after", lambda run: f"{_number(run.sampled_before)} / {_number(run.sampled_after)}"),
    (
        f"loss, first / last {AVERAGED_STEPS} steps (nats/token)",
        lambda run: f"{_short(run.loss_first)} / {_short(run.loss_last)}",
    ),
    ("mean weight", lambda run: _number(run.weight_mean, 2)),
    ("largest weight", lambda run: _number(run.weight_max, 2)),
    ("AUC, raw weight against wrong answers", lambda run: _number(run.auc_wrong)),
    ("seconds", lambda run: _number(run.seconds, 1)),
)


def _values(rows: Iterable[Mapping[str, Any]], name: str) -> list[float]:
    return [float(row[name]) for row in rows if row.get(name) is not None]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _before_and_after(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[float | None, float | None]:
    before = _values([row for row in rows if row["step"] == 0], name)
    after = _values([row for row in rows if row["step"] > 0], name)
    return (before[-1] if before else None), (after[-1] if after else None)
