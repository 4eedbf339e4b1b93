"""pass@k, majority@k and the interval: hand counts, other people's formulas, and coverage."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from renio_megatron.evaluation.statistics import interval, majority, pass_at_k


@pytest.mark.parametrize(("draws", "right", "k", "expected"), [
    (4, 0, 1, 0.0),
    (4, 1, 1, 0.25),
    (4, 1, 2, 0.5),  # of 6 pairs 3 hold the right one
    (4, 2, 2, 5 / 6),
    (4, 3, 2, 1.0),
    (4, 1, 4, 1.0),
    (12, 3, 1, 0.25),
])  # fmt: skip
def test_pass_at_k_by_hand(draws, right, k, expected):
    assert pass_at_k(draws, right, k) == pytest.approx(expected, abs=1e-15)


def test_pass_at_k_is_the_share_of_subsets_with_a_right_one():
    for draws, right, k in itertools.product((5, 6), range(6), range(1, 6)):
        subsets = list(itertools.combinations([True] * right + [False] * (draws - right), k))
        assert pass_at_k(draws, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize(("draws", "right", "k"), [(4, 5, 1), (4, 1, 5), (4, 1, 0), (4, -1, 1)])
def test_pass_at_k_of_more_draws_than_there_are_is_refused(draws, right, k):
    with pytest.raises(ValueError, match="pass@"):
        pass_at_k(draws, right, k)


def same(one: str, other: str) -> bool:
    return one.lower() == other.lower()


@pytest.mark.parametrize(("answers", "right", "expected"), [
    ("AAB", "110", 1.0),
    ("ABB", "100", 0.0),
    ("aAB", "110", 1.0),  # the same answer in two spellings
    ("AB", "10", 0.5),  # a tie is shared
    ("ABC", "100", 1 / 3),
    ("AABB", "1100", 0.5),
    ("A---", "1000", 1.0),  # no answer, no vote
    ("B---", "0000", 0.0),
    ("----", "0000", 0.0),
    ("", "", 0.0),
    ("AAA", "100", 1 / 3),  # code: the same answer, other verdicts
])  # fmt: skip
def test_majority_by_hand(answers, right, expected):
    drawn = [None if answer == "-" else answer for answer in answers]
    assert majority(drawn, [one == "1" for one in right], same) == pytest.approx(expected)


def test_the_interval_by_hand():
    # Mean .5, squares .25 * 40: standard error sqrt(10 / 39 / 40), t(39) = 2.0227.
    found = interval([0.0, 1.0] * 20, 4)
    half = 2.0226909 * math.sqrt(10 / 39 / 40)
    assert found.method == "t" and (found.low, found.high) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-6)


def test_far_from_the_ends_it_is_scipys():
    means = np.random.default_rng(0).beta(2, 2, 50)
    found = interval(means.tolist(), 100)
    expected = stats.t.interval(0.95, 49, loc=means.mean(), scale=stats.sem(means))
    assert (found.low, found.high) == pytest.approx(expected, rel=1e-12)


def test_one_problem_has_wilsons_interval():
    found, expected = interval([0.25], 12), stats.binomtest(3, 12).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-9)


@pytest.mark.parametrize("count", [1, 2, 30, 500])
@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_it_is_never_a_point(count, rate):
    found = interval([rate] * count, 4)
    assert found.low <= rate <= found.high and found.high - found.low > 1.0 / (count * 4)
    assert (found.low > 0) == (rate == 1) or (found.high < 1) == (rate == 0)


def coverage(problems: int, draws: int, a: float, b: float) -> float:
    """Share of 1000 simulated evaluations whose interval holds the true rate; standard error .7 points."""
    generator, hits = np.random.default_rng(7), 0
    for _ in range(1000):
        means = generator.binomial(draws, generator.beta(a, b, problems)) / draws
        found = interval(means.tolist(), draws)
        hits += found.low <= a / (a + b) <= found.high
    return hits / 1000


@pytest.mark.parametrize(("problems", "draws"), [(30, 12), (500, 4)])
@pytest.mark.parametrize(("a", "b"), [(1, 1), (0.5, 0.5), (2, 1)])
def test_coverage_at_middling_rates(problems, draws, a, b):
    assert 0.93 <= coverage(problems, draws, a, b) <= 0.97


@pytest.mark.parametrize(("problems", "draws"), [(30, 12), (500, 4)])
@pytest.mark.parametrize(("a", "b"), [(0.1, 1.9), (1.9, 0.1)])
def test_coverage_near_the_ends(problems, draws, a, b):
    assert coverage(problems, draws, a, b) >= 0.90
