"""Masking of entries of probability 0, which contribute 0 whatever their logarithms are."""

from __future__ import annotations

import torch


def mask_zero_probability_(entry: torch.Tensor, probability: torch.Tensor) -> torch.Tensor:
    """`entry` with 0 wherever `probability` (same shape) is 0, in place and returned.

    A mask is slow on the CPU, and a softmax without underflow needs none, so there the smallest probability is checked
    first. On other devices the check would need a synchronization.

    >>> mask_zero_probability_(torch.tensor([1.0, float("nan")]), torch.tensor([0.5, 0.0])).tolist()
    [1.0, 0.0]
    """
    if entry.device.type == "cpu" and entry.numel() and bool(probability.amin() > 0):
        return entry
    return entry.masked_fill_(probability == 0, 0.0)
