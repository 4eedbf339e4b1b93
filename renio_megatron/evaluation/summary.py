"""Figures of an evaluation from its completions: avg@k, pass@k, majority@k, intervals, lengths."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from renio_megatron.evaluation.graders.grader import UNCLOSED_THINKING
from renio_megatron.evaluation.results import Row
from renio_megatron.evaluation.statistics import interval, majority, pass_at_k


@dataclass(frozen=True)
class BenchmarkSummary:
    """Figures of one benchmark. A completion whose grader failed counts as wrong in each of them.

    Attributes:
        problems, n: problems, and completions of each.
        avg_at_k: mean share of right completions, over problems.
        pass_at_k: probability that one of k completions is right, for k = 1, 2, 4, ... and n, as text.
        majority_at_k: mean over problems of whether the most frequent of the n answers is right; None where answers
            are not compared (programs).
        interval: 95 % confidence interval of avg_at_k over problems.
        length: mean tokens of a completion; None where the server does not say.
        cut_frac: share of completions that were cut, or that never closed their thinking.
        unparsable_frac: share of finished completions in which no answer was found.
        ungraded_frac: share of completions on which the grader failed.
    """

    problems: int
    n: int
    avg_at_k: float
    pass_at_k: dict[str, float]
    majority_at_k: float | None
    interval: tuple[float, float]
    length: float | None
    cut_frac: float
    unparsable_frac: float
    ungraded_frac: float

    def as_json(self) -> dict[str, Any]:
        """JSON-serializable values."""
        return asdict(self)


def summarize(rows: Sequence[Row], same_answer: Callable[[str, str], bool] | None) -> BenchmarkSummary:
    """The figures of a benchmark's completions.

    Args:
        rows: rows of completions.jsonl; as many for each problem, at least one.
        same_answer: whether two answers are the same; None: answers have no majority.
    """
    by_problem: dict[int, list[Row]] = {}
    for row in rows:
        by_problem.setdefault(row["index"], []).append(row)
    n = len(rows) // len(by_problem)
    right = [sum(bool(row["correct"]) for row in draws) for draws in by_problem.values()]
    means = [count / n for count in right]
    found = interval(means, n)
    return BenchmarkSummary(
        problems=len(by_problem),
        n=n,
        avg_at_k=_mean(means),
        pass_at_k={str(k): _mean([pass_at_k(n, count, k) for count in right]) for k in _ks(n)},
        majority_at_k=_majority(by_problem.values(), same_answer) if same_answer is not None else None,
        interval=(found.low, found.high),
        length=_length(rows),
        cut_frac=_mean([float(_is_cut(row)) for row in rows]),
        unparsable_frac=_mean([float(_is_unparsable(row)) for row in rows]),
        ungraded_frac=_mean([float(row["correct"] is None) for row in rows]),
    )


def pass_rates(rows: Sequence[Row]) -> dict[int, float]:
    """Share of right completions of each problem, by its index."""
    found: dict[int, list[bool]] = {}
    for row in rows:
        found.setdefault(row["index"], []).append(bool(row["correct"]))
    return {index: sum(draws) / len(draws) for index, draws in found.items()}


def _majority(problems: Any, same_answer: Callable[[str, str], bool]) -> float:
    return _mean([
        majority([row["answer"] for row in draws], [bool(row["correct"]) for row in draws], same_answer)
        for draws in problems
    ])  # fmt: skip


def _ks(n: int) -> list[int]:
    """1, 2, 4, ... and n.

    >>> _ks(12), _ks(1)
    ([1, 2, 4, 8, 12], [1])
    """
    powers = [2**place for place in range(n.bit_length()) if 2**place <= n]
    return [*powers, *([n] if n not in powers else [])]


def _is_cut(row: Row) -> bool:
    return row["finish_reason"] == "length" or row["reason"] == UNCLOSED_THINKING


def _is_unparsable(row: Row) -> bool:
    return row["answer"] is None and row["correct"] is False and not _is_cut(row)


def _length(rows: Sequence[Row]) -> float | None:
    lengths = [row["tokens"] for row in rows]
    return None if any(one is None for one in lengths) else _mean(lengths)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
