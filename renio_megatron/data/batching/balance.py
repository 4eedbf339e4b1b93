"""Load balancing of sequences between data-parallel ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from renio_megatron.data.batching.packing import share_out
from renio_megatron.parallel.collectives import gather_objects
from renio_megatron.parallel.layout import Axis

_Item = TypeVar("_Item")


def balance(items: Sequence[_Item], costs: Sequence[int], axis: Axis, *, unit: int = 1) -> list[_Item]:
    """Exchanges items between ranks so that their total costs are nearly equal; each keeps the same number of items.

    Args:
        items: this rank's items, the same number on every rank. Few and small: those that move are pickled.
        costs: costs of the items, at least 1 each.
        axis: the ranks that exchange items.
        unit: neighbors in the global order (rank after rank) that stay together. Where a unit lies on two ranks, or
            the units cannot be divided evenly, nothing moves.

    Returns:
        This rank's new items, in the global order.
    """
    count = len(items)
    if axis.size == 1 or count % unit:
        return list(items)
    flat = [cost for part in gather_objects(list(costs), axis.group) for cost in part]
    totals = [sum(flat[start : start + unit]) for start in range(0, len(flat), unit)]
    shares = share_out(totals, axis.size, equal_numbers=True)
    wanted = [[unit * block + i for block in share for i in range(unit)] for share in shares]
    first = axis.rank * count
    leaving = {first + i: items[i] for i in range(count) if first + i not in wanted[axis.rank]}
    here = {first + i: item for i, item in enumerate(items)}
    for arrived in gather_objects(leaving, axis.group):
        here |= arrived
    return [here[number] for number in wanted[axis.rank]]
