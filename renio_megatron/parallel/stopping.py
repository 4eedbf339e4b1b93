"""A request to stop: every rank knows of it within a second, and ranks agree on where they leave.

Nobody waits for it. A thread of each rank looks at the store of torch.distributed a few times a second; ranks that
compute together agree about as often, in one small reduction, on the point at which they leave.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final

import torch
import torch.distributed as dist

from renio_megatron.parallel.collectives import any_rank
from renio_megatron.parallel.layout import ParallelLayout

_PAUSE: Final = 0.2
"""Seconds between two looks at the store, and about those between two agreements."""
_LONGEST: Final = 4096
"""Passes between two agreements, at the most."""
_numbers = itertools.count()


class Abandoned(Exception):
    """Work of which nothing is kept was given up, on every rank alike, because the run is to stop."""


class StopRequest:
    """What this rank knows of a request to stop.

    Every rank makes as many of them, in the same order.

    Attributes:
        number: signal of the first request that this rank knows of; None: of none.
    """

    def __init__(self, store: dist.Store | None = None) -> None:
        """`store` is one that all ranks of a run share; None: that of torch.distributed's world, where there is one."""
        self.number: int | None = None
        if store is None and dist.is_initialized() and dist.get_world_size() > 1:
            store = dist.distributed_c10d._get_default_store()
        self._store, self._key = store, f"renio_stop/{next(_numbers)}"

    def note(self, number: int) -> None:
        """A request by a signal; the first one counts. May be called by a signal's handler."""
        if self.number is None:
            self.number = number

    @contextlib.contextmanager
    def watched(self, on_request: Callable[[int], None] | None = None) -> Iterator[None]:
        """Context in which this rank and the others hear of each other's requests.

        Args:
            on_request: called once with the signal, by a thread, when this rank knows of a request.
        """
        over = threading.Event()
        thread = threading.Thread(target=self._watch, args=(over, on_request), name="renio stop", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def agree(self, layout: ParallelLayout) -> bool:
        """Whether any rank knows of a request, the same on all; then each knows its signal. One collective."""
        highest = torch.tensor(float(self.number or 0), device=layout.device)
        if layout.world_size > 1:
            dist.all_reduce(highest, op=dist.ReduceOp.MAX)
        if number := int(highest):
            self.number = number
        return number > 0

    def _watch(self, over: threading.Event, on_request: Callable[[int], None] | None) -> None:
        # A store that is gone, because its rank has left, has nothing more to tell.
        with contextlib.suppress(RuntimeError):
            while self.number is None and not over.wait(_PAUSE):
                if self._store is not None and self._store.check([self._key]):
                    self.note(int(self._store.get(self._key)))
            if self.number is not None and self._store is not None:
                self._store.set(self._key, str(self.number))
        if self.number is not None and on_request is not None:
            on_request(self.number)


def give_up_together(layout: ParallelLayout, mine: bool) -> None:
    """Raises `Abandoned` on every rank where any has given up; one collective."""
    if any_rank(layout, mine):
        raise Abandoned


class StopPoints:
    """Points of a loop at which ranks leave it together, of those that compute one model's tokens.

    They agree in one reduction on each axis, at the same passes, whose distance follows from how long a pass takes.
    """

    def __init__(self, request: StopRequest | None, layout: ParallelLayout) -> None:
        """With None nobody ever leaves, and nothing is exchanged."""
        self._request, self._layout = request, layout
        self._passes_left, self._since, self._distance = 0, time.monotonic(), 0

    def reached(self) -> bool:
        """Whether to leave here; called before each pass, on all ranks of the tensor and the pipeline axis."""
        if self._request is None:
            return False
        if self._passes_left > 0:
            self._passes_left -= 1
            return False
        now = time.monotonic()
        wish = self._wish(now - self._since)
        agreed = torch.tensor([float(self._request.number is None), float(wish)], device=self._layout.device)
        for axis in (self._layout.tensor, self._layout.pipeline):
            if axis.size > 1:
                dist.all_reduce(agreed, op=dist.ReduceOp.MIN, group=axis.group)
        goes_on, self._distance = (int(one) for one in agreed.tolist())
        self._passes_left, self._since = self._distance - 1, time.monotonic()
        return not goes_on

    def _wish(self, seconds: float) -> int:
        """Passes until the next agreement, by how long those since the last one took."""
        if not self._distance:
            return 1
        return max(1, min(2 * self._distance, int(self._distance * _PAUSE / max(seconds, 1e-6)), _LONGEST))
