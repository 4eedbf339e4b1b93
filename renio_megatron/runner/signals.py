"""SIGTERM and Ctrl-C as a request to stop: what can be lost is given up, a step is finished, and the run can go on."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from types import FrameType, TracebackType
from typing import Any

from renio_megatron.errors import RenioError
from renio_megatron.parallel.stopping import StopRequest

STOPPING = (signal.SIGTERM, signal.SIGINT)
REPEAT_SECONDS = 5.0
"""Seconds after the first signal from which on another one counts as a second request: a signal to a whole process
group arrives twice, once from its sender and once through the launcher."""


class StopSignal:
    """Context in which the first SIGTERM or SIGINT is a request to stop and a second one ends the process at once.

    Only the main thread of a process can handle signals; elsewhere it does nothing. An unexpected RuntimeError that
    leaves it after a signal is most likely a collective whose peer the launcher has ended already; the process then
    dies by the signal, as it would have without a handler.
    """

    def __init__(self, request: StopRequest, report: Callable[[str], None] | None = None) -> None:
        """Prepares the handlers.

        Args:
            request: hears of the signal, and of those of other ranks.
            report: called once with a line when a request is known, by a thread; None: nothing is said.
        """
        self._request, self._report = request, report
        self._first: float | None = None
        self._before: dict[int, Any] = {}
        self._watching = ExitStack()

    def __enter__(self) -> StopSignal:
        """Installs the handlers."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in STOPPING}
        self._watching.enter_context(self._request.watched(self._say))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Restores the previous handlers."""
        self._watching.close()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._first is not None and isinstance(error, RuntimeError) and not isinstance(error, RenioError):
            assert self._request.number is not None
            _die(self._request.number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        self._request.note(number)
        if self._first is None:
            self._first = now
        elif now - self._first > REPEAT_SECONDS:
            _die(number)

    def _say(self, number: int) -> None:
        if self._report is not None:
            self._report(
                f"stopping ({_NAMES[number]}): what is being drawn is given up, a step that learns is finished; "
                f"another one after {REPEAT_SECONDS:g} s ends the run at once"
            )


_NAMES = {int(signal.SIGTERM): "SIGTERM", int(signal.SIGINT): "Ctrl-C"}


def _die(number: int) -> None:
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
