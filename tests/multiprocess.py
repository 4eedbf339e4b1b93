"""Runs a function on several gloo ranks, each a process, and turns whatever happens to one into a failed test.

A rank that raises, dies or hangs ends the launch: the others are killed and the caller gets the rank's traceback.
Ranks are forked from a process that has imported Megatron (`warm.py`), so that a launch costs little; still, a test
file launches its ranks once and runs all cases in them, because process groups and models cost something, too.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests import warm
from tests.rank import LAUNCH

ROOT = Path(__file__).resolve().parents[1]
POLL_SECONDS = 0.02
GRACE_SECONDS = 1.0


class RankError(AssertionError):
    """A rank raised, died or did not finish; the message holds its traceback."""


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0, fresh: bool = False
) -> list[Any]:
    """What `function(*args)` returns on each of `world_size` ranks, in rank order.

    Args:
        function: module-level; torch.distributed is initialised (gloo, `timeout`) when it is called. RANK, WORLD_SIZE,
            LOCAL_RANK, MASTER_ADDR and MASTER_PORT are set, for libraries that read them.
        world_size: number of processes.
        args: picklable.
        timeout: seconds for everything, imports included.
        fresh: for functions that have something to do before Megatron is imported: the ranks import it themselves.

    Raises:
        RankError: as soon as one rank has failed, or when the time is up.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        call = pickle.dumps((function, args))
        (folder / LAUNCH).write_bytes(pickle.dumps((_environment(world_size), sys.path, call, timeout)))
        program = [sys.executable, "-m", "tests.rank", name]
        start = subprocess.Popen if fresh else warm.Popen
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        deadline = time.monotonic() + timeout
        processes: list[subprocess.Popen] = []
        try:
            for rank in range(world_size):
                processes.append(start([*program, str(rank)], env=environment))
            problem = _wait(processes, deadline)
            if problem:
                raise RankError(f"{problem} in {function.__module__}.{function.__qualname__}\n{_reports(folder)}")
            return [pickle.loads((folder / f"{rank}.result").read_bytes()) for rank in range(world_size)]
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.wait()


def _wait(processes: list[subprocess.Popen], deadline: float) -> str | None:
    """Waits for all ranks; what went wrong, or None."""
    while any(process.poll() is None for process in processes):
        broken = [rank for rank, process in enumerate(processes) if process.poll() not in (None, 0)]
        if broken:
            # Its peers may be about to fail, too; their tracebacks are worth a moment.
            _wait_briefly(processes)
            break
        if time.monotonic() > deadline:
            hung = [rank for rank, process in enumerate(processes) if process.poll() is None]
            for rank in hung:
                processes[rank].send_signal(signal.SIGUSR1)  # each writes its stack
            time.sleep(GRACE_SECONDS / 2)
            return f"timeout: ranks {hung} of {len(processes)} did not finish"
        time.sleep(POLL_SECONDS)
    ends = enumerate(process.returncode for process in processes)
    return "; ".join(f"rank {rank} of {len(processes)} {_ending(code)}" for rank, code in ends if code) or None


def _wait_briefly(processes: list[subprocess.Popen]) -> None:
    end = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < end and any(process.poll() is None for process in processes):
        time.sleep(POLL_SECONDS)


def _ending(code: int) -> str:
    return (
        f"was killed by {signal.Signals(-code).name}" if code < 0 else "raised" if code == 1 else f"exited with {code}"
    )


def _reports(folder: Path) -> str:
    """Tracebacks of failed ranks, the earliest first, then the stacks of hung ones."""
    errors = sorted(folder.glob("*.error"), key=lambda path: path.stat().st_mtime_ns)
    stacks = [path for path in sorted(folder.glob("*.stack")) if path.stat().st_size]
    return "\n".join(f"--- rank {path.stem} ({path.suffix[1:]})\n{path.read_text()}" for path in [*errors, *stacks])


def _environment(world_size: int) -> dict[str, str]:
    """Of every rank, but for its number."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
