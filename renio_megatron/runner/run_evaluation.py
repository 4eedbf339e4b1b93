"""Benchmarks that a run evaluates its student on, with the files of `renio evaluate` for each step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from renio_megatron.evaluation.evaluator import EvaluationObserver
from renio_megatron.evaluation.results import Results
from renio_megatron.evaluation.summary import BenchmarkSummary
from renio_megatron.parallel.collectives import on_main_rank
from renio_megatron.parallel.layout import ParallelLayout
from renio_megatron.runner.evaluate import Drawer, draw_job, prompts_of
from renio_megatron.runner.evaluation_job import EvaluationJob
from renio_megatron.runner.run_directory import RunDirectory


class BenchmarkEvaluator:
    """Draws and grades completions of benchmarks with the current student.

    Args:
        job: result of `benchmarks_of`.
        drawer: the student's sampler, and how it sees a problem.
        layout: this rank's place.
        output_dir: the run's directory; each step has a directory in its `evaluations`.
        report: called with a line about each benchmark's figures; None: no reports.
        observer: called on the first rank whenever completions are drawn; None: never.

    Raises:
        DataError: a prompt that is too long for the student.
    """

    def __init__(
        self,
        job: EvaluationJob,
        drawer: Drawer,
        layout: ParallelLayout,
        output_dir: str,
        report: Callable[[str], None] | None = None,
        observer: EvaluationObserver | None = None,
    ) -> None:
        self._observer = observer if layout.is_main else None
        self._job, self._drawer, self._layout, self._report = job, drawer, layout, report
        self._directory = RunDirectory(output_dir).checkpoints.parent / "evaluations"
        for benchmark in job.benchmarks:
            prompts_of(job, benchmark, drawer)

    def __call__(self, step: int) -> dict[str, float]:
        """`eval/NAME/...` of each benchmark after a step, equal on every rank; see `METRICS`."""
        directory = self._directory / f"step-{step:07d}"
        options = replace(self._job.options, output=str(directory))
        job = replace(self._job, options=options)
        opened: list[Results] = []
        on_main_rank(self._layout, lambda: self._open(job, directory, step, opened))
        try:
            shown = None if self._observer is None else _Drawn(step, self._observer)
            figures = draw_job(job, self._drawer, self._layout, opened, shown)
        finally:  # an evaluation that is given up goes on from these files
            for results in opened:
                results.close()
        if self._report is not None:
            for name, one in figures.items():
                self._report(described(name, step, one))
        return {f"eval/{name}/{key}": value for name, one in figures.items() for key, value in metrics_of(one).items()}

    def _open(self, job: EvaluationJob, directory: Path, step: int, opened: list[Results]) -> None:
        length = job.config.max_completion_length
        assert length is not None  # guaranteed by the recipe's rules
        opened.append(Results(directory, job.settings({"step": step}, length)))


class _Drawn:
    """Passes what is drawn of benchmarks after a step on to an observer."""

    def __init__(self, step: int, observer: EvaluationObserver) -> None:
        self._step, self._observer = step, observer
        self._done = self._total = 0

    def say(self, line: str) -> None:
        """Nothing: what is drawn is the same at each evaluation."""

    def expect(self, count: int) -> None:
        self._done, self._total = 0, count

    def add(self, benchmark: str, rows: Sequence[Mapping[str, Any]]) -> None:
        self._done += len(rows)
        self._observer(self._step, benchmark, self._done, self._total)


def described(name: str, step: int, figures: BenchmarkSummary) -> str:
    """A benchmark's avg@n and its interval after a step, as a line of text."""
    low, high = figures.interval
    return (
        f"{name}, step {step}: avg@{figures.n} {figures.avg_at_k:.3f}, 95 % interval over {figures.problems} problems "
        f"[{low:.3f}, {high:.3f}]; {figures.cut_frac:.0%} cut"
    )


def metrics_of(figures: BenchmarkSummary) -> dict[str, float]:
    """A benchmark's figures as metrics, by the last part of their names; those that are not known are left out."""
    low, high = figures.interval
    values = {
        "avg_at_n": figures.avg_at_k,
        "interval_low": low,
        "interval_high": high,
        "pass_at_n": figures.pass_at_k[str(figures.n)],
        "majority_at_n": figures.majority_at_k,
        "length": figures.length,
        "cut_frac": figures.cut_frac,
        "unparsable_frac": figures.unparsable_frac,
    }
    return {name: value for name, value in values.items() if value is not None}
