"""SIGTERM as a stop request: the current step is finished, its state saved, and the run can be resumed."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from renio_megatron.errors import RenioError

REPEAT_SECONDS = 5.0
"""Seconds after the first SIGTERM from which on another one counts as a second request: a SIGTERM to a whole process
group arrives twice, once from its sender and once through the launcher."""


class StopSignal:
    """Context in which the first SIGTERM is recorded and a second one ends the process at once.

    Only the main thread of a process can handle signals; elsewhere it does nothing. An unexpected RuntimeError that
    leaves it after a SIGTERM is most likely a collective whose peer the launcher has ended already; the process then
    dies by the signal, as it would have without a handler.
    """

    def __init__(self) -> None:
        self.received = False
        self._first = 0.0
        self._before: Any = None

    def __enter__(self) -> StopSignal:
        """Installs the handler."""
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Restores the previous handler."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
        if self.received and isinstance(error, RuntimeError) and not isinstance(error, RenioError):
            self._die()

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.received:
            self.received, self._first = True, now
        elif now - self._first > REPEAT_SECONDS:
            self._die()

    @staticmethod
    def _die() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
