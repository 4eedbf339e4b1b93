"""Signals that request a stop, blocked while a save starts its helper processes."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from multiprocessing import resource_tracker


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Blocks SIGTERM and SIGINT, permanently in processes that are started meanwhile.

    Schedulers and torchrun send SIGTERM to a whole process group, a terminal SIGINT. It would end a library's helper
    process, and the save that is triggered by the signal would fail without its helper.
    """
    resource_tracker.ensure_running()  # multiprocessing would start it later, and unblock the signal when it does
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
