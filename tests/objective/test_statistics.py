import math

import pytest
import torch

from renio_megatron.objective.statistics import auc


@pytest.mark.parametrize(
    ("score", "positive", "expected"),
    [
        ([1.0, 2.0, 3.0, 4.0], [False, False, True, True], 1.0),
        ([4.0, 3.0, 2.0, 1.0], [False, False, True, True], 0.0),
        ([5.0, 5.0, 5.0], [True, False, False], 0.5),
        # pairs of positives (3, 1) and negatives (2, 1): 3>2, 3>1, 1<2, 1=1
        ([3.0, 1.0, 2.0, 1.0], [True, True, False, False], 0.625),
        # positive 2 against 1, 2, 2, 3: 1 + 0.5 + 0.5 + 0
        ([2.0, 1.0, 2.0, 2.0, 3.0], [True, False, False, False, False], 0.5),
    ],
)
def test_auc_by_hand(score, positive, expected):
    assert auc(score, positive) == pytest.approx(expected)
    assert auc(torch.tensor(score), torch.tensor(positive)) == pytest.approx(expected)


def test_auc_equals_the_count_of_pairs():
    generator = torch.Generator().manual_seed(0)
    score = torch.randint(0, 12, (200,), generator=generator).double()
    positive = torch.rand(200, generator=generator) < 0.3
    difference = score[positive][:, None] - score[~positive][None]
    pairs = ((difference > 0).double() + 0.5 * (difference == 0).double()).mean().item()
    assert auc(score, positive) == pytest.approx(pairs, abs=1e-12)


def test_auc_without_both_classes_or_with_nan_is_nan():
    assert math.isnan(auc([1.0, 2.0], [True, True]))
    assert math.isnan(auc([1.0, 2.0], [False, False]))
    assert math.isnan(auc([1.0, float("nan")], [True, False]))
