"""Many requests at a time: threads that ask, and one that is told."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

from renio_megatron.evaluation.server.answers import Drawn
from renio_megatron.evaluation.server.requests import ServerRequest
from renio_megatron.evaluation.server.transport import Connection, Fault, Sockets, Stopped
from renio_megatron.evaluation.server.tries import Clock, Failure, Notices, tried

END_S = 5.0
"""Seconds that threads have for ending after a stop; only the look-up of a host's name could need more."""
THREADS = "renio-server"
"""Name of the threads, before their number."""


class Draw:
    """One draw. Workers put calls into an inbox, and the calling thread makes them.

    Args:
        requests: what is asked.
        connect: a connection whose socket is kept in mind.
        ask: sends a request over a connection.
        tries: of each request.
        on_drawn: takes completions, in the calling thread.
        clock: of the pauses.
        notices: hear of requests that wait, in the calling thread.

    Attributes:
        drawn: number of completions that `on_drawn` has taken.
        failures: of the requests that failed for good, in the order of their failing.
    """

    def __init__(
        self,
        requests: Sequence[ServerRequest],
        connect: Callable[[Sockets], Connection],
        ask: Callable[[Connection, ServerRequest], Drawn | Fault],
        *,
        tries: int,
        on_drawn: Callable[[ServerRequest, Drawn], None],
        clock: Clock,
        notices: Notices,
    ) -> None:
        self.drawn = 0
        self.failures: list[Failure] = []
        self._requests, self._lock = iter(requests), threading.Lock()
        self._connect, self._ask, self._tries = connect, ask, tries
        self._on_drawn, self._clock, self._notices = on_drawn, clock, notices
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._stop, self._no_more, self._sockets = threading.Event(), threading.Event(), Sockets()
        self._waiting = self._working = 0
        self._errors: list[BaseException] = []

    def run(self, num_threads: int) -> None:
        """Asks for everything, or until a request fails for good; those under way are then awaited."""
        threads = [
            threading.Thread(target=self._work, name=f"{THREADS}-{number}", daemon=True)
            for number in range(num_threads)
        ]
        try:
            for thread in threads:
                thread.start()
                self._working += 1
            while self._working:
                self._inbox.get()()
        finally:
            self._end(threads)
        if self._errors:
            raise self._errors[0]

    def _end(self, threads: Sequence[threading.Thread]) -> None:
        """Whatever waits, for an answer or for another try, ends."""
        self._no_more.set()
        self._stop.set()
        self._sockets.stop()
        until = time.monotonic() + END_S
        for thread in threads:
            if thread.ident is not None:
                thread.join(max(0.0, until - time.monotonic()))

    def _deliver(self, request: ServerRequest, drawn: Drawn) -> None:
        self._on_drawn(request, drawn)
        self.drawn += 1

    def _waits(self, cause: str) -> None:
        self._waiting += 1
        self._notices.waiting(self._waiting, cause)

    def _goes_on(self) -> None:
        self._waiting -= 1

    def _one_ended(self) -> None:
        self._working -= 1

    def _work(self) -> None:
        """A worker's life. It changes nothing that other threads see but the inbox and the events."""
        connection = self._connect(self._sockets)
        try:
            while (request := self._next()) is not None:
                found = tried(
                    partial(self._ask, connection, request),
                    self._tries,
                    clock=self._clock,
                    stop=self._stop,
                    on_wait=lambda cause: self._inbox.put(partial(self._waits, cause)),
                    on_retry=lambda: self._inbox.put(self._goes_on),
                )
                if isinstance(found, Failure):
                    self._no_more.set()
                    self._inbox.put(partial(self.failures.append, found))
                else:
                    self._inbox.put(partial(self._deliver, request, found))
        except Stopped:
            pass
        except BaseException as error:  # a mistake of this package, which the calling thread raises
            self._no_more.set()
            self._inbox.put(partial(self._errors.append, error))
        finally:
            connection.close()
            self._inbox.put(self._one_ended)

    def _next(self) -> ServerRequest | None:
        with self._lock:
            return None if self._no_more.is_set() else next(self._requests, None)
