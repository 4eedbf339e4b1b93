"""SIGTERM waits while a save starts its helper processes."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from multiprocessing import resource_tracker


@contextlib.contextmanager
def sigterm_held() -> Iterator[None]:
    """Keeps SIGTERM waiting, for good in processes that are started meanwhile.

    Schedulers and torchrun send SIGTERM to a whole process group. A helper that a library started would end by it, and
    the save that answers the SIGTERM would fail for want of its helper.
    """
    resource_tracker.ensure_running()  # multiprocessing would start it later, and let the signal through when it does
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
