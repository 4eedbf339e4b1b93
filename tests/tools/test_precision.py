"""The figures of a comparison of precisions, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from renio_megatron.errors import NumericsError
from renio_megatron.objective.statistics import rank_correlation
from renio_megatron.tools.precision.errors import (
    Scores,
    gradient_errors,
    gradient_sums,
    score_errors,
    value_errors,
    verdict_errors,
)


def scores(**changes) -> Scores:
    values = {
        "student_logp": [-1.0, -2.0, -4.0, -1.0],
        "teacher_logp": [-2.0, -2.0, -5.0, -2.0],
        "divergence": [0.5, 1.0, 0.25, 0.25],
        "is_pivotal": [True, False, True, False],
        "raw_weights": [1.0, 4.0, 3.0],
        "weights": [0.5, 2.0, 1.5],
    }
    return Scores(**{name: torch.tensor(value) for name, value in (values | changes).items()})


def test_equal_scores_have_no_error():
    errors = score_errors(scores(), scores())
    assert errors.pop("weight/rank_correlation") == pytest.approx(1.0)
    assert set(errors.values()) == {0.0}
    assert len(errors) == 21


def test_every_figure_by_hand():
    found = scores(
        student_logp=[-1.0, -2.5, -4.0, -1.0],
        divergence=[0.7, 0.8, 0.25, 0.45],
        is_pivotal=[True, True, False, False],
        raw_weights=[3.0, 1.0, 3.0],
        weights=[0.6, 1.0, 1.5],
    )
    errors = score_errors(found, scores())
    assert errors["student_logp/absolute_rms"] == pytest.approx(0.25)
    assert errors["student_logp/absolute_max"] == 0.5
    assert errors["student_logp/absolute_p99"] == pytest.approx(0.5 * 0.97)  # between the last two of four
    assert errors["student_logp/relative_rms"] == pytest.approx(0.5 / math.sqrt(1 + 4 + 16 + 1))
    assert errors["student_logp/relative_max"] == 0.25
    assert errors["teacher_logp/absolute_max"] == 0
    assert errors["divergence/token_relative"] == pytest.approx((0.2 + 0.2 + 0 + 0.2) / 2.0)
    assert errors["divergence/mean_relative"] == pytest.approx(0.2 / 2.0)
    assert errors["weight/relative_max"] == pytest.approx(0.5)
    assert errors["weight/relative_rms"] == pytest.approx(math.sqrt((0.2**2 + 0.5**2) / 3))
    assert errors["weight/rank_correlation"] == pytest.approx(0.5)  # ranks 1 3 2 have become 1 2 3
    assert (errors["pivotal/flipped"], errors["pivotal/lost"], errors["pivotal/gained"]) == (0.5, 0.5, 0.5)
    assert errors["raw_weight/from_1"] == pytest.approx(1 / 3)
    assert errors["raw_weight/to_1"] == pytest.approx(1 / 3)


def test_direction_matters():
    few, many = torch.tensor([True, False, False]), torch.tensor([True, True, True])
    assert verdict_errors(many, few) == {"pivotal/flipped": 2 / 3, "pivotal/lost": 0.0, "pivotal/gained": 2.0}
    assert verdict_errors(few, many) == {"pivotal/flipped": 2 / 3, "pivotal/lost": 2 / 3, "pivotal/gained": 0.0}
    assert verdict_errors(few & False, few & False)["pivotal/lost"] == 0.0
    low, high = torch.tensor([1.0, 1.0]), torch.tensor([2.0, 2.0])
    assert value_errors(high, low)["relative_max"] == 1.0
    assert value_errors(low, high)["relative_max"] == 0.5


def test_a_probability_of_1_has_a_relative_error_where_it_moved():
    errors = value_errors(torch.tensor([0.0, -1e-3]), torch.tensor([0.0, 0.0]))
    assert errors["relative_max"] > 1e6
    assert value_errors(torch.zeros(2), torch.zeros(2))["relative_max"] == 0.0


def test_ranks_are_shared_by_equal_values():
    # Ranks 1.5 1.5 3 4 and 1 2 3 4, about their mean 2.5: (1 x 1.5 + 1 x .5 + .5 x .5 + 1.5 x 1.5) / sqrt(4.5 x 5)
    found = rank_correlation(torch.tensor([7.0, 7.0, 8.0, 9.0]), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert found == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert rank_correlation(torch.tensor([1.0, 2.0]), torch.tensor([5.0, 4.0])) == pytest.approx(-1.0)
    assert math.isnan(rank_correlation(torch.ones(3), torch.arange(3.0)))


def test_gradients_by_hand_and_in_shards():
    expected = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([[1.0], [0.0]]), "c": torch.zeros(2)}
    found = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([[0.0], [2.0]]), "c": torch.zeros(2)}
    sums = gradient_sums(found, expected)
    assert sums == {"a": [25.0, 25.0, 25.0, 0.0], "b": [0.0, 4.0, 1.0, 5.0], "c": [0.0] * 4}
    figures, worst = gradient_errors(sums)
    assert figures["gradient/cosine"] == pytest.approx(25 / math.sqrt(29 * 26))
    assert figures["gradient/norm_relative"] == pytest.approx(math.sqrt(29 / 26) - 1)
    assert figures["gradient/relative"] == pytest.approx(math.sqrt(5 / 26))
    assert figures["gradient/worst_cosine"] == 0.0
    assert figures["gradient/worst_relative"] == pytest.approx(math.sqrt(5))
    assert worst == {"gradient/worst_cosine": "b", "gradient/worst_relative": "b"}
    halves = [
        gradient_sums({k: v[i : i + 1] for k, v in found.items()}, {k: v[i : i + 1] for k, v in expected.items()})
        for i in (0, 1)
    ]
    added = {name: [x + y for x, y in zip(halves[0][name], halves[1][name], strict=True)] for name in sums}
    assert gradient_errors(added) == (figures, worst)


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(NumericsError, match="exactly 0"):
        gradient_errors({"a": [0.0] * 4})
    with pytest.raises(NumericsError, match="student in FP8: teacher_logp holds NaN"):
        scores(teacher_logp=[0.0, float("nan"), 0.0, 0.0]).check("student in FP8")
    scores().check("all is well")
