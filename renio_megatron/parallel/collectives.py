"""What ranks tell each other beside the mathematics: one does it and every one learns how it went; small objects.

The only file with collectives of pickled objects.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from renio_megatron.errors import RenioError, Scope
from renio_megatron.parallel.layout import ParallelLayout

_Value = TypeVar("_Value")


def any_rank(layout: ParallelLayout, mine: bool) -> bool:
    """Whether it is so on any rank; the same answer on all. One collective."""
    count = torch.tensor(float(mine), device=layout.device)
    if layout.world_size > 1:
        dist.all_reduce(count)
    return bool(count > 0)


def on_main_rank(layout: ParallelLayout, action: Callable[[], _Value]) -> _Value:
    """The result of `action`, which the first rank alone runs; one collective.

    Raises:
        RenioError: whatever `action` raised of this kind, on every rank and with the scope `ALL_RANKS`.
    """
    outcome: list[Any] = [None, None]
    if layout.is_main:
        try:
            outcome[0] = action()
        except RenioError as error:
            outcome[1] = error
    if layout.world_size > 1:
        dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1].scoped(Scope.ALL_RANKS)
    return outcome[0]


def gather_objects(mine: _Value, group: dist.ProcessGroup | None = None) -> list[_Value]:
    """Every rank's object, in the order of ranks; they are pickled, so they are few and small. One collective.

    Args:
        mine: this rank's.
        group: None: the whole world; of one rank where nobody has joined one.
    """
    size = dist.get_world_size(group) if dist.is_initialized() else 1
    if size == 1:
        return [mine]
    everyones: list[Any] = [None] * size
    dist.all_gather_object(everyones, mine, group=group)
    return everyones
