"""Packing of sequences into micro-batches, and assignment of sequences to ranks, by token counts."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def pack(lengths: Sequence[int], max_tokens: int, *, multiple_of: int = 1) -> list[list[int]]:
    """Sequences of each micro-batch: the fewest micro-batches that hold them, with nearly equal numbers of tokens.

    A deterministic function of its arguments, because every rank that shares the sequences computes it on its own.

    >>> pack([5, 1, 4, 2], max_tokens=6)
    [[0, 1], [2, 3]]

    Args:
        lengths: tokens of each sequence, padding to its alignment included; none above `max_tokens`.
        max_tokens: largest number of tokens of a micro-batch.
        multiple_of: the number of micro-batches is a multiple of this, where there are enough sequences.

    Returns:
        Indices into `lengths`, ascending within a micro-batch.
    """
    if not lengths:
        return []
    count = -(-sum(lengths) // max_tokens)
    while True:
        count = min(-(-count // multiple_of) * multiple_of, len(lengths))
        bins = share_out(lengths, count)
        if count == len(lengths) or max(sum(lengths[i] for i in chosen) for chosen in bins) <= max_tokens:
            return bins
        count += 1


def share_out(costs: Sequence[int], count: int, *, equal_numbers: bool = False) -> list[list[int]]:
    """Splits items into `count` shares of nearly equal cost: by falling cost, each to the cheapest share so far.

    >>> share_out([5, 1, 4, 2], 2)
    [[0, 1], [2, 3]]

    Args:
        costs: costs of the items.
        count: shares; at most as many as there are items.
        equal_numbers: every share gets the same number of items, which `count` must divide.

    Returns:
        Indices into `costs`, ascending within a share; the shares in the order of their first items.
    """
    limit = len(costs) // count if equal_numbers else len(costs)
    shares: list[list[int]] = [[] for _ in range(count)]
    heap = [(0, number) for number in range(count)]
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        total, number = heapq.heappop(heap)
        shares[number].append(item)
        if len(shares[number]) < limit:
            heapq.heappush(heap, (total + costs[item], number))
    return sorted((sorted(share) for share in shares), key=lambda share: share[:1])
