"""Tries of a request: pauses between them, and the word to the user that requests wait."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from renio_megatron.evaluation.server.transport import Fault, Stopped

FIRST_PAUSE_S = 2.0
"""Longest pause before the second try; it doubles with each one."""
MAX_PAUSE_S = 60.0
"""Longest pause before any try, where the server asks for no longer one."""
REPORT_EVERY_S = 10.0
"""Seconds between two lines of a report."""

_Found = TypeVar("_Found")


@dataclass(frozen=True)
class Clock:
    """Time and chance of the pauses between tries.

    Attributes:
        wait: waits for an event, at most so many seconds.
        uniform: a random number between two.
        monotonic: seconds since some moment.
        time: seconds since the epoch.
    """

    wait: Callable[[threading.Event, float], object] = threading.Event.wait
    uniform: Callable[[float, float], float] = field(default_factory=lambda: random.Random().uniform)
    monotonic: Callable[[], float] = time.monotonic
    time: Callable[[], float] = time.time

    def pause_s(self, tries: int, asked_s: float) -> float:
        """Seconds before the next try: a random part of a bound that doubles, or what the server asks for.

        >>> clock = Clock(uniform=lambda low, high: high)
        >>> [clock.pause_s(tries, 0.0) for tries in (1, 2, 3, 6)], clock.pause_s(1, 7.0)
        ([2.0, 4.0, 8.0, 60.0], 7.0)
        """
        bound = min(FIRST_PAUSE_S * 2.0 ** min(tries - 1, 30), MAX_PAUSE_S)
        return max(self.uniform(0.0, bound), asked_s)


@dataclass(frozen=True)
class Failure:
    """The last fault of a request, and the number of its tries."""

    fault: Fault
    tries: int

    def message(self, url: str) -> str:
        """Sentences that say what the server answered, after how many tries, and what to do."""
        tries = "at the first try" if self.tries == 1 else f"after {self.tries} tries"
        said = f': "{self.fault.said}".' if self.fault.said else "."
        return f"{url}: {self.fault.cause}, {tries}{said} {self.fault.advice}".rstrip()


def tried(
    ask: Callable[[], _Found | Fault],
    tries: int,
    *,
    clock: Clock,
    stop: threading.Event,
    on_wait: Callable[[str], None],
    on_retry: Callable[[], None],
) -> _Found | Failure:
    """What `ask` finds, or its last fault: one that stays, or that of the last try.

    Args:
        tries: how often it is asked, at the most; at least 1.
        stop: ends the pauses.
        on_wait, on_retry: called before a pause, with the cause, and after it.
    Raises:
        Stopped: the event was set before another try.
    """
    for number in range(1, tries + 1):
        found = ask()
        if not isinstance(found, Fault):
            return found
        if number == tries or not found.retried:
            return Failure(found, number)
        on_wait(found.cause)
        clock.wait(stop, clock.pause_s(number, found.wait_s))
        if stop.is_set():
            raise Stopped
        on_retry()
    raise AssertionError(f"tries must be at least 1; got {tries}")


class Notices:
    """Lines for the user about requests that wait, at most one in `REPORT_EVERY_S`.

    Args:
        report: takes a line; None: nobody hears.
        clock: tells the time.
    """

    def __init__(self, report: Callable[[str], None] | None, clock: Clock) -> None:
        self._report, self._clock = report, clock
        self._next: float | None = None

    def waiting(self, count: int, cause: str) -> None:
        """So many requests wait; the last one began after `cause`."""
        if self._report is None:
            return
        now = self._clock.monotonic()
        if self._next is None or now >= self._next:
            self._next = now + REPORT_EVERY_S
            self._report(f"server: {count} request{' waits' if count == 1 else 's wait'} after {cause}")
