"""Runs functions on several gloo ranks, each a process, and turns whatever happens to one into a failed test.

A rank that raises, dies or hangs ends the call: all ranks are killed and the caller gets the rank's traceback. Ranks
are forked from a process that has imported Megatron (`warm.py`), so that a launch costs little. Where a file has many
cases, its ranks stay (`Ranks`) and are called for each: only the cases of selected tests are computed, process groups
are kept, and a case that fails takes no other with it.
"""

from __future__ import annotations

import contextlib
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

from tests.helpers import warm
from tests.helpers.paths import ROOT
from tests.helpers.rank import LAUNCH

POLL_SECONDS = 0.005
GRACE_SECONDS = 1.0
MANY_THREADS = 2000
"""Every process group has two that sleep, and torch gives none back: beyond this many the next rank is new."""


class RankError(AssertionError):
    """A rank raised, died or did not finish; the message holds its traceback."""


class Ranks:
    """So many ranks, started at the first call: `ranks(function, *args)` is what it returns on each, in rank order.

    Leave it with `with`, or with `close`. Between calls the ranks keep what their modules and libraries remember, but
    nothing may depend on that: they are new after a call that failed, and where they have become slow. After a call
    that hung there is no next one.

    Args:
        world_size: number of processes.
        timeout: seconds for a call, the first one's imports included, and of torch.distributed's operations.
        fresh: for functions that have something to do before Megatron is imported: the ranks import it themselves.
    """

    def __init__(self, world_size: int, *, timeout: float = 240.0, fresh: bool = False) -> None:
        self._size, self._timeout, self._fresh = world_size, timeout, fresh
        self._processes: list[subprocess.Popen] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._calls = 0
        self._hung = ""
        self._kept: dict[Any, list[Any]] = {}

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Calls a function on every rank.

        Args:
            function: module-level; torch.distributed is initialised (gloo) when it is called. RANK, WORLD_SIZE,
                LOCAL_RANK, MASTER_ADDR and MASTER_PORT are set, for libraries that read them.
            args: picklable.

        Raises:
            RankError: as soon as one rank has failed, or when the time is up.
        """
        name = f"{function.__module__}.{function.__qualname__}"
        if self._hung:
            raise RankError(f"{name} was not called: its ranks hung in {self._hung}")
        if any(_threads(process.pid) > MANY_THREADS for process in self._processes):
            self._kill()
        if self._folder is None:
            self._start()
        assert self._folder is not None
        folder = Path(self._folder.name)
        (folder / f"{self._calls}.call").write_bytes(pickle.dumps((function, args)))
        results = [folder / f"{self._calls}.{rank}.result" for rank in range(self._size)]
        self._calls += 1
        try:
            for process in self._processes:
                _tell(process)
            problem = _wait(self._processes, time.monotonic() + self._timeout, lambda: all(map(Path.exists, results)))
            if problem:
                self._hung = name if problem.startswith("timeout") else ""
                raise RankError(f"{problem} in {name}\n{_reports(folder)}")
        except BaseException:
            self._kill()
            raise
        found = []
        for result in results:
            found.append(pickle.loads(result.read_bytes()))
            result.unlink()
        return found

    def once(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """The call, or what the same one gave before; arguments are hashable."""
        key = (function, args)
        if key not in self._kept:
            self._kept[key] = self(function, *args)
        return self._kept[key]

    def close(self) -> None:
        """Lets the ranks leave.

        Raises:
            RankError: if one of them cannot.
        """
        if self._folder is None:
            return
        try:
            for process in self._processes:
                assert process.stdin is not None
                process.stdin.close()
            if problem := _wait(self._processes, time.monotonic() + self._timeout):
                raise RankError(f"{problem} at its end\n{_reports(Path(self._folder.name))}")
        finally:
            self._kill()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: Any, *rest: Any) -> None:
        self.close() if kind is None else self._kill()

    def _start(self) -> None:
        self._folder, self._calls = tempfile.TemporaryDirectory(ignore_cleanup_errors=True), 0
        name = self._folder.name
        of_all = _environment(self._size) | {"TMPDIR": name}  # what a killed rank leaves goes with the folder
        (Path(name) / LAUNCH).write_bytes(pickle.dumps((of_all, sys.path, self._timeout)))
        program = [sys.executable, "-m", "tests.helpers.rank", name]
        start = subprocess.Popen if self._fresh else warm.Popen
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        for rank in range(self._size):
            # A session of its own is a process group whose members are known, whatever becomes of the rank.
            self._processes.append(
                start([*program, str(rank)], env=environment, stdin=subprocess.PIPE, start_new_session=True)
            )

    def _kill(self) -> None:
        """Ends the ranks and what they have started, such as the checkpoint writer's helpers of 300 MB each."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in self._processes:
            process.wait()
            assert process.stdin is not None
            process.stdin.close()
        if self._folder is not None:
            self._folder.cleanup()
        self._processes, self._folder = [], None


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0, fresh: bool = False
) -> list[Any]:
    """One call of `Ranks` of its own."""
    with Ranks(world_size, timeout=timeout, fresh=fresh) as ranks:
        return ranks(function, *args)


def _threads(process: int) -> int:
    """How many threads a process has; 0 where the system does not tell."""
    try:
        return sum(1 for _ in Path(f"/proc/{process}/task").iterdir())
    except OSError:
        return 0


def _tell(process: subprocess.Popen) -> None:
    """That there is a call; a rank that is gone is seen by its exit code."""
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(b"\n")
        process.stdin.flush()


def _wait(processes: list[subprocess.Popen], deadline: float, is_done: Callable[[], bool] | None = None) -> str | None:
    """Waits until it is done, before which no rank may end, or for the ends of all; what went wrong, or None."""
    good = (None, 0) if is_done is None else (None,)
    while not (is_done() if is_done else all(process.poll() is not None for process in processes)):
        if any(process.poll() not in good for process in processes):
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
    ends = [(rank, process.poll()) for rank, process in enumerate(processes)]
    broken = [f"rank {rank} of {len(processes)} {_ending(code)}" for rank, code in ends if code not in good]
    return "; ".join(broken) or None


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
