"""Two torch.distributed worlds under one launcher: ranks that train, and ranks that only score.

Code that asks torch for the world, mainly Megatron, sees its own half; a process group that is not in torch's registry
spans both.
"""

from __future__ import annotations

import datetime
import time
from dataclasses import dataclass, field

import torch.distributed as dist

from renio_megatron.parallel.gloo import gloo_group
from renio_megatron.parallel.layout import Axis
from renio_megatron.parallel.row_exchange import axis_of

_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.001, 0.05
"""Seconds between two polls of the store."""


@dataclass
class WorldBridge:
    """The connection between the two worlds.

    Attributes:
        axis: all ranks, those that train first.
        store: the store in which the ranks that train announce a call.
    """

    axis: Axis
    store: dist.Store
    _calls: int = field(default=0, init=False)

    def call(self) -> None:
        """Wakes the ranks that only score; called on every rank that trains, of which the first writes to the store."""
        if self.axis.is_first:
            self.store.set(f"call/{self._calls}", "")
        self._calls += 1

    def wait_for_call(self) -> None:
        """Waits for the other ranks' next call, without timeout; the launcher ends this rank together with them.

        The collective that follows has the world's timeout, because then all ranks are about to enter it. The store is
        polled, because its own wait prints a warning at each timeout.
        """
        pause = _SHORTEST_PAUSE
        while not self.store.check([f"call/{self._calls}"]):
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        self._calls += 1


def join_two_worlds(backend: str, timeout: datetime.timedelta, num_teacher_ranks: int) -> WorldBridge:
    """Initializes torch.distributed for this rank's half of the ranks; the last `num_teacher_ranks` only score."""
    store, rank, size = next(iter(dist.rendezvous("env://", timeout=timeout)))
    num_trainers = size - num_teacher_ranks
    is_teacher_rank = rank >= num_trainers
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("teachers" if is_teacher_rank else "trainers", store),
        rank=rank - num_trainers if is_teacher_rank else rank,
        world_size=num_teacher_ranks if is_teacher_rank else num_trainers,
        timeout=timeout,
    )
    return WorldBridge(axis_of(_group(backend, dist.PrefixStore("bridge", store), rank, size, timeout)), store)


def _group(backend: str, store: dist.Store, rank: int, size: int, timeout: datetime.timedelta) -> dist.ProcessGroup:
    if backend == "gloo":
        return gloo_group(store, rank, size, timeout)  # type: ignore[return-value]
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(store, rank, size, options)  # type: ignore[return-value]
