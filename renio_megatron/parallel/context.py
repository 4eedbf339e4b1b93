"""Context parallelism: which positions of a sequence a rank holds.

A sequence is cut into 2 x ranks equal chunks; rank r holds chunks r and 2 x ranks - 1 - r, so that under a causal mask
every rank has the same amount of attention to compute (the order of Megatron and Transformer Engine).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch


def local_positions(boundaries: Sequence[int], size: int, rank: int) -> torch.Tensor:
    """Positions of a row that one rank holds, in its order: int64 [row length / size].

    >>> local_positions([0, 4, 12], size=2, rank=0).tolist()
    [0, 3, 4, 5, 10, 11]

    Args:
        boundaries: where the row's sequences begin, and its length; each sequence is a multiple of 2 x size long.
        size, rank: place on the context axis.
    """
    pieces = []
    for start, stop in itertools.pairwise(boundaries):
        chunks = torch.arange(start, stop).chunk(2 * size)
        pieces += [chunks[rank], chunks[2 * size - 1 - rank]]
    return torch.cat(pieces)


def natural_order(boundaries: Sequence[int], size: int) -> torch.Tensor:
    """Index of each position of a row among all ranks' positions, rank after rank: int64 [row length].

    >>> natural_order([0, 4], size=2).tolist()  # rank 0 holds 0 and 3, rank 1 holds 1 and 2
    [0, 2, 3, 1]
    """
    gathered = torch.cat([local_positions(boundaries, size, rank) for rank in range(size)])
    return torch.empty_like(gathered).scatter_(0, gathered, torch.arange(len(gathered)))
