"""Collectives for control flow and small objects, such as sharing the result of an action on rank 0.

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
    """Whether `mine` is true on any rank; the same result on all. One collective."""
    count = torch.tensor(float(mine), device=layout.device)
    if layout.world_size > 1:
        dist.all_reduce(count)
    return bool(count > 0)


def on_main_rank(layout: ParallelLayout, action: Callable[[], _Value]) -> _Value:
    """Runs `action` on the first rank only and returns its result on all; one collective.

    Raises:
        RenioError: any `RenioError` that `action` raised, on every rank and with the scope `ALL_RANKS`.
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


def on_first_model_rank(layout: ParallelLayout, action: Callable[[], _Value]) -> _Value:
    """Runs `action` on the first of the ranks that share a data-parallel rank's sequences, and returns its result on
    all of these; one collective for each axis with several ranks.

    Raises:
        RenioError: any `RenioError` that `action` raised, on every one of these ranks and with the scope `ALL_RANKS`.
    """
    axes = (layout.tensor, layout.pipeline, layout.context)
    outcome: list[Any] = [None, None]
    if all(axis.is_first for axis in axes):
        try:
            outcome[0] = action()
        except RenioError as error:
            outcome[1] = error
    for axis in axes:
        if axis.size > 1:
            dist.broadcast_object_list(outcome, src=axis.ranks[0], group=axis.group)
    if outcome[1] is not None:
        raise outcome[1].scoped(Scope.ALL_RANKS)
    return outcome[0]


def gather_objects(mine: _Value, group: dist.ProcessGroup | None = None) -> list[_Value]:
    """Every rank's object, in the order of ranks; they are pickled, so they are few and small. One collective.

    Args:
        mine: this rank's object.
        group: None: the whole world; a single rank where torch.distributed is not initialized.
    """
    size = dist.get_world_size(group) if dist.is_initialized() else 1
    if size == 1:
        return [mine]
    everyones: list[Any] = [None] * size
    dist.all_gather_object(everyones, mine, group=group)
    return everyones
