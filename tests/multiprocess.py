"""Runs a function on several gloo ranks, each a process, and turns whatever happens to one into a failed test.

A rank that raises, dies or hangs ends the launch: the others are killed and the caller gets the rank's traceback.
Launching costs seconds (every rank imports torch), so a test file launches its ranks once and runs all cases in them.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

POLL_SECONDS = 0.02
GRACE_SECONDS = 1.0


class RankError(AssertionError):
    """A rank raised, died or did not finish; the message holds its traceback."""


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """What `function(*args)` returns on each of `world_size` ranks, in rank order.

    Args:
        function: module-level; torch.distributed is initialised (gloo, `timeout`) when it is called. RANK, WORLD_SIZE,
            LOCAL_RANK, MASTER_ADDR and MASTER_PORT are set, for libraries that read them.
        world_size: number of processes.
        args: picklable.
        timeout: seconds for everything, imports included.

    Raises:
        RankError: as soon as one rank has failed, or when the time is up.
    """
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), _free_port()
        shared = (function, world_size, args, folder, timeout, port)
        processes = [
            # Not daemons: megatron-core's checkpoint writer starts processes of its own.
            context.Process(target=_rank_main, args=(rank, *shared))
            for rank in range(world_size)
        ]
        deadline = time.monotonic() + timeout
        try:
            with _environment(OMP_NUM_THREADS="1"):
                for process in processes:
                    process.start()
            problem = _wait(processes, deadline)
            if problem:
                raise RankError(f"{problem} in {function.__module__}.{function.__qualname__}\n{_reports(folder)}")
            return [pickle.loads((folder / f"{rank}.result").read_bytes()) for rank in range(world_size)]
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
            for process in processes:
                if process.pid is not None:
                    process.join()


def _wait(processes: list[BaseProcess], deadline: float) -> str | None:
    """Waits for all ranks; what went wrong, or None."""
    while any(process.is_alive() for process in processes):
        broken = [rank for rank, process in enumerate(processes) if process.exitcode not in (None, 0)]
        if broken:
            # Its peers may be about to fail, too; their tracebacks are worth a moment.
            _wait_briefly(processes)
            break
        if time.monotonic() > deadline:
            hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
            for rank in hung:
                os.kill(processes[rank].pid or 0, signal.SIGUSR1)  # each writes its stack
            time.sleep(GRACE_SECONDS / 2)
            return f"timeout: ranks {hung} of {len(processes)} did not finish"
        time.sleep(POLL_SECONDS)
    broken = [(rank, process.exitcode) for rank, process in enumerate(processes) if process.exitcode not in (None, 0)]
    return "; ".join(f"rank {rank} of {len(processes)} {_ending(code or 0)}" for rank, code in broken) or None


def _wait_briefly(processes: list[BaseProcess]) -> None:
    end = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < end and any(process.is_alive() for process in processes):
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


def _rank_main(
    rank: int, function: Callable[..., Any], world_size: int, args: tuple, folder: Path, timeout: float, port: int
) -> None:
    """One rank's whole life."""
    stack = (folder / f"{rank}.stack").open("w")
    faulthandler.register(signal.SIGUSR1, file=stack, all_threads=True)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        result = function(*args)
        (folder / f"{rank}.result").write_bytes(pickle.dumps(result))
        dist.barrier()  # nobody leaves while a peer still talks to it
        dist.destroy_process_group()
    except BaseException:
        (folder / f"{rank}.error").write_text(traceback.format_exc())
        sys.stderr.flush()
        os._exit(1)  # no clean-up that could wait for a peer


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Environment variables while children start."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
