"""Runs a stage within its limit, and leaves nothing of it behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil

from renio_megatron.cli.launch import end_with_parent

GRACE_SECONDS = 3.0
"""From SIGTERM to SIGKILL."""


def adopt_orphans() -> None:
    """Asks the system to give this process the children of its children that lose their parent; on Linux only.

    So whatever a stage started can be found and ended, in whichever session it is.
    """
    set_child_subreaper = 36  # PR_SET_CHILD_SUBREAPER of <sys/prctl.h>
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(set_child_subreaper, 1)


def run(command: list[str], log: Path, seconds: float) -> int | None:
    """The exit code of `command`, which prints here and into `log`; None where it was ended after `seconds`."""
    with log.open("a", encoding="utf-8") as file:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",  # libraries write what they like; a reader that stops would stop the stage, too
            preexec_fn=_become_stage,
        )
        reader = threading.Thread(target=_copy, args=(process, file), daemon=True)
        reader.start()
        try:
            code: int | None = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:  # also where this process is asked to end
            end_descendants()
        process.wait()
        reader.join(timeout=GRACE_SECONDS)
    return code


def end_descendants() -> None:
    """Ends every process that this one started, directly or not: asks first, then kills."""
    me, deadline = psutil.Process(), time.monotonic() + GRACE_SECONDS
    for send in (signal.SIGTERM, signal.SIGKILL):
        for process in me.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(send)
        while send == signal.SIGTERM and _alive(me) and time.monotonic() < deadline:
            time.sleep(0.05)
    psutil.wait_procs(me.children(recursive=True), timeout=GRACE_SECONDS)


def _alive(me: psutil.Process) -> bool:
    """Whether a descendant still runs; those that have ended and wait to be asked about are asked."""
    for process in me.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                return True
    return False


def _copy(process: subprocess.Popen[str], file) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        sys.stdout.write(line)
        sys.stdout.flush()
        file.write(line)
        file.flush()


def _become_stage() -> None:
    """In the child, before it becomes the stage: it ends with this process, also where that is killed."""
    end_with_parent()
    os.setsid()
