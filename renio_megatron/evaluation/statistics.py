"""Figures of an evaluation: pass@k, majority@k, and an interval that is clustered by problem."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_NEAR_AN_END = 0.1
"""Distance of a rate from 0 or 1 within which the interval is Wilson's."""


@dataclass(frozen=True)
class Interval:
    """A confidence interval of a rate.

    Attributes:
        low, high: its ends, in [0, 1].
        method: `t`, or `wilson` near 0 and 1.
    """

    low: float
    high: float
    method: str


def pass_at_k(num_draws: int, num_right: int, k: int) -> float:
    """Probability that at least one of k of a problem's draws, chosen at random, is right.

    The estimate has no bias: 1 - C(n - c, k) / C(n, k). Source: Chen et al. 2021 (arXiv 2107.03374), equation 1.

    >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 2), pass_at_k(4, 3, 2)
    (0.25, 0.5, 1.0)

    Raises:
        ValueError: not 0 <= num_right <= num_draws, or not 1 <= k <= num_draws.
    """
    if not (0 <= num_right <= num_draws and 1 <= k <= num_draws):
        raise ValueError(f"pass@{k} needs 1 <= k <= draws and 0 <= right <= draws; got {num_right} of {num_draws}.")
    return 1.0 - math.comb(num_draws - num_right, k) / math.comb(num_draws, k)


def majority(answers: Sequence[str | None], is_right: Sequence[bool], same_answer: Callable[[str, str], bool]) -> float:
    """Whether the most frequent answer of a problem's draws is right, in [0, 1].

    A draw without an answer has no vote. Answers that tie share the result. Without any vote it is 0.

    Args:
        answers: the answer of each draw; None where there is none.
        is_right: whether it is right.
        same_answer: whether two answers are the same; each is compared with the first one of every group.

    >>> majority(["4", "4.0", "5"], [True, True, False], lambda one, other: float(one) == float(other))
    1.0
    >>> majority(["4", "5", None], [True, False, False], str.__eq__)
    0.5
    """
    groups: list[tuple[str, list[bool]]] = []
    for answer, right in zip(answers, is_right, strict=True):
        if answer is None:
            continue
        group = next((members for first, members in groups if same_answer(first, answer)), None)
        if group is None:
            groups.append((answer, [right]))
        else:
            group.append(right)
    most = max((len(members) for _, members in groups), default=0)
    winners = [sum(members) / most for _, members in groups if len(members) == most]
    return sum(winners) / len(winners) if winners else 0.0


def interval(means: Sequence[float], num_draws: int, *, level: float = 0.95) -> Interval:
    """Confidence interval of the mean success rate over problems, of which these are a sample.

    Draws of one problem resemble each other, so problems are the unit: Student's t over their means. Near 0 and 1,
    where that leaves [0, 1] or covers too seldom, Wilson's interval with t's quantile and the effective number of
    draws: the variance of independent draws over that of the problems' mean. It is never [0, 0] or [1, 1].

    Args:
        means: share of right draws of each problem, at least one problem.
        num_draws: draws of each problem, at least 1.
        level: confidence level.

    >>> found = interval([0.0, 1.0, 0.5, 0.5], 2)   # mean .5, standard error .2041, t(3) = 3.1824
    >>> found.method, round(found.low, 4), round(found.high, 4)
    ('wilson', 0.1038, 0.8962)
    """
    from scipy import stats  # more than a second, which no command shall take that evaluates nothing

    count, rate = len(means), math.fsum(means) / len(means)
    squares = math.fsum((mean - rate) ** 2 for mean in means)
    # Of one problem, nothing is known of others: the interval is that of its own rate.
    error = math.sqrt(squares / (count - 1) / count) if count > 1 else 0.0
    quantile = float(stats.t.ppf((1 + level) / 2, count - 1)) if count > 1 else float(stats.norm.ppf((1 + level) / 2))
    low, high = rate - quantile * error, rate + quantile * error
    if error > 0 and low > 0.0 and high < 1.0 and _NEAR_AN_END <= rate <= 1 - _NEAR_AN_END:
        return Interval(low, high, "t")
    # Without any spread (all right, all wrong) a problem counts once, however often it was drawn.
    effective = rate * (1 - rate) / error**2 if error > 0 else float(count if count > 1 else num_draws)
    return _wilson(rate, min(effective, float(count * num_draws)), quantile)


def _wilson(rate: float, count: float, quantile: float) -> Interval:
    """Wilson's score interval of a rate of `count` independent draws."""
    square = quantile**2 / count
    center = (rate + square / 2) / (1 + square)
    half = quantile / (1 + square) * math.sqrt(rate * (1 - rate) / count + square / (4 * count))
    return Interval(max(0.0, center - half), min(1.0, center + half), "wilson")
