"""One rank does it, every rank learns how it went."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from renio_megatron.errors import RenioError
from renio_megatron.parallel.layout import Layout

_Value = TypeVar("_Value")


def any_rank(layout: Layout, mine: bool) -> bool:
    """Whether it is so on any rank; the same answer on all."""
    count = torch.tensor(float(mine), device=layout.device)
    dist.all_reduce(count)
    return bool(count > 0)


def on_main_rank(layout: Layout, action: Callable[[], _Value]) -> _Value:
    """The result of `action`, run on the first rank alone; its error is raised on every rank, marked as shared."""
    outcome: list[Any] = [None, None]
    if layout.is_main:
        try:
            outcome[0] = action()
        except RenioError as error:
            outcome[1] = error
    if layout.world_size > 1:
        dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        outcome[1].shared = True
        raise outcome[1]
    return outcome[0]
