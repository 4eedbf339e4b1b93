"""Equality of expressions by math-verify, in a worker process of its own."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from typing import IO, Any

from renio_megatron.errors import ConfigError

LIMIT_S = 5.0
"""Seconds for a pair of expressions; the field's graders allow as many."""
WORKER = "renio_megatron.evaluation.math_verify_worker"
"""Module that the worker runs."""


@dataclass(frozen=True)
class Equality:
    """What math-verify says.

    Attributes:
        same: whether the expressions are equal; None where it could not be told.
        reason: why not, in a few words.
    """

    same: bool | None
    reason: str = ""


class MathVerify:
    """Asks a worker process, which is started at the first question and ends with this one.

    Args:
        limit_s: seconds after which a pair is given up.
    """

    def __init__(self, limit_s: float = LIMIT_S) -> None:
        self._limit_s = limit_s
        self._process: subprocess.Popen[str] | None = None
        self._stderr: IO[bytes] | None = None
        self._lock = threading.Lock()

    def same(self, expected: str, given: str) -> Equality:
        """Whether two expressions in LaTeX, without dollars, are equal.

        Raises:
            ConfigError: the worker cannot be started.
        """
        with self._lock:
            for _ in range(2):  # a worker that somebody killed is started again, once
                process = self._running()
                try:
                    found = _ask(process, {"expected": expected, "given": given, "limit_s": self._limit_s})
                    return Equality(found["same"], found["reason"])
                except (OSError, ValueError, KeyError):
                    self._end()
            return Equality(None, "math-verify's worker died twice")

    @property
    def process_id(self) -> int:
        """The worker's process id; it is started where it does not run."""
        with self._lock:
            return self._running().pid

    def close(self) -> None:
        """Ends the worker."""
        with self._lock:
            self._end()

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            self._end()
            self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  closed with the worker
            self._process = subprocess.Popen(
                [sys.executable, "-m", WORKER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                text=True,
                # One thread, no GPU, and none of torchrun's variables: it is no rank.
                env={**_environment(), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
                start_new_session=True,  # Ctrl-C is the trainer's to handle; the worker ends with its input
            )
            atexit.register(self.close)
            ready = self._process.stdout.readline() if self._process.stdout else ""
            if not ready:
                self._stderr.seek(0)
                said = self._stderr.read().decode(errors="replace").strip() or "it said nothing"
                raise ConfigError(
                    f"data.grader=math compares with math-verify, whose process did not start: "
                    f"{said.splitlines()[-1]}. pip install math-verify, or choose another grader."
                )
        return self._process

    def _end(self) -> None:
        process, self._process = self._process, None
        stderr, self._stderr = self._stderr, None
        if process is None:
            return
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()


def _ask(process: subprocess.Popen[str], request: dict[str, Any]) -> dict[str, Any]:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps(request) + "\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def _environment() -> dict[str, str]:
    """The environment without the variables that make a process a rank."""
    of_ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in os.environ.items() if name not in of_ranks}
