"""Accuracy of completions, and how well a score finds the wrong ones."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike

from renio_megatron.tasks import Grader
from renio_megatron.types import Rollout


def accuracy(rollouts: Iterable[Rollout], grader: Grader) -> float:
    """Share of the rollouts that the grader calls right, in [0, 1]; NaN without rollouts."""
    verdicts = [bool(grader(rollout)) for rollout in rollouts]
    return sum(verdicts) / len(verdicts) if verdicts else float("nan")


def auc(score: ArrayLike, positive: ArrayLike) -> float:
    """Probability that a positive sample's score is above a negative one's, ties counting one half, in [0, 1].

    Of 2 positives (3, 1) and 2 negatives (2, 1), the four pairs give 1 + 1 + 0 + 1/2:

    >>> auc([3.0, 1.0, 2.0, 1.0], [True, True, False, False])
    0.625

    Args:
        score: numbers [B], CPU tensors included.
        positive: booleans [B].
    Returns:
        NaN where one of the two classes is empty, or a score is NaN.
    """
    values = np.asarray(score, dtype=np.float64)
    is_positive = np.asarray(positive, dtype=bool)
    num_positive = int(is_positive.sum())
    num_negative = is_positive.size - num_positive
    if num_positive == 0 or num_negative == 0 or np.isnan(values).any():
        return float("nan")
    _, group, size = np.unique(values, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(size) - (size - 1) / 2  # of each group of ties, counted from 1
    rank_sum = float(mean_rank[group][is_positive].sum())
    return (rank_sum - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative)
