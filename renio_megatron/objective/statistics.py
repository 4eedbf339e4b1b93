"""AUC of a score for finding wrong completions, and rank correlation of two scores."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike


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


def rank_correlation(first: torch.Tensor, second: torch.Tensor) -> float:
    """Spearman's rank correlation, equal values sharing their mean rank; NaN where one side is constant.

    >>> rank_correlation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 9.0, 5.0]))
    0.5
    """
    a, b = (_ranks(values) for values in (first, second))
    a, b = a - a.mean(), b - b.mean()
    spread = a.square().sum() * b.square().sum()
    return float((a * b).sum() / spread.sqrt()) if spread > 0 else float("nan")


def _ranks(values: torch.Tensor) -> torch.Tensor:
    """Rank of each value among all, from 0, ties sharing their mean rank; fp64."""
    _, place, counts = values.double().unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    return (ends - (counts.double() + 1) / 2)[place]
