"""Expected outputs of tasks that hold a canonical program instead: run once, and kept in memory and on disk."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from renio_megatron.errors import DataError
from renio_megatron.evaluation.code.comparison import evalplus_equal
from renio_megatron.evaluation.code.runs import run_calls, seconds_of, show, value_of, value_text
from renio_megatron.evaluation.code.tasks import CodeTask
from renio_megatron.evaluation.sandbox import Sandbox

_CALL_S = 100.0
_TOTAL_S = 300.0
_RESULT_BYTES = 1 << 28


@dataclass(frozen=True)
class Reference:
    """What the canonical program gave for one group of tests.

    Attributes:
        outputs: its outputs, as typed JSON: some are lists of a million numbers.
        seconds: how long each took.
    """

    outputs: tuple[bytes, ...]
    seconds: tuple[float, ...]


class ReferenceCache:
    """Expected outputs by task; several threads, and processes with one directory, may use it.

    Args:
        directory: where to keep them between runs, one file a task, named by the task's digest; created if missing.
            None keeps them in memory only. Candidates must not be able to read it: it holds the answers.
        most_bytes: of outputs in memory; beyond, those that were not asked for longest are dropped. One task of
            HumanEval+ has 114 MB of them.
    """

    def __init__(self, directory: Path | None = None, *, most_bytes: int = 2**30) -> None:
        self._directory, self._most_bytes = directory, most_bytes
        self._known: dict[str, tuple[Reference, ...]] = {}
        self._locks: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()

    def get(self, task: CodeTask, sandbox: Sandbox) -> tuple[Reference, ...]:
        """The canonical program's outputs for each group of the task's tests.

        Raises:
            DataError: the canonical program fails, or gives what cannot be compared; or the sandbox failed.
        """
        with self._lock:
            lock = self._locks.setdefault(task.digest, threading.Lock())
        with lock:  # of several threads that judge one task, the first runs its canonical program
            found = self._known.get(task.digest) or self._read(task)
            if found is None:
                found = run_canonical(task, sandbox)
                self._write(task, found)
            self._keep(task.digest, found)
            return found

    def _keep(self, digest: str, found: tuple[Reference, ...]) -> None:
        with self._lock:
            self._known.pop(digest, None)
            self._known[digest] = found  # the last of them, now
            total = sum(map(_size, self._known.values()))
            for old in list(self._known)[:-1]:
                if total <= self._most_bytes:
                    break
                total -= _size(self._known.pop(old))

    def forget(self, task: CodeTask) -> None:
        """Drops a task's outputs from memory; they stay on disk."""
        with self._lock:
            self._known.pop(task.digest, None)

    def _read(self, task: CodeTask) -> tuple[Reference, ...] | None:
        """What the task's file holds; None without a whole file."""
        if self._directory is None:
            return None
        try:
            digest, _, content = self._file(task).read_bytes().partition(b"\n")
            if hashlib.sha256(content).hexdigest().encode() != digest:
                return None
            seconds, *outputs = content.split(b"\n")
            groups, start = [], 0
            for group in json.loads(seconds):
                end = start + len(group)
                groups.append(Reference(tuple(outputs[start:end]), tuple(group)))
                start = end
        except (OSError, ValueError, TypeError):
            return None
        fits = [len(group.outputs) for group in groups] == [len(tests.inputs) for tests in task.groups]
        return tuple(groups) if fits else None

    def _write(self, task: CodeTask, groups: tuple[Reference, ...]) -> None:
        """Replaces the task's file; a directory that cannot be written costs the next run its time, nothing else."""
        if self._directory is None:
            return
        seconds = json.dumps([group.seconds for group in groups]).encode()
        content = b"\n".join([seconds, *(output for group in groups for output in group.outputs)])
        with contextlib.suppress(OSError):
            self._directory.mkdir(parents=True, exist_ok=True)
            # Each writer has a file of its own: two with one name would mix.
            descriptor, partial = tempfile.mkstemp(dir=self._directory, prefix=f".{task.digest}.")
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
                Path(partial).replace(self._file(task))
            except OSError:
                Path(partial).unlink(missing_ok=True)
                raise

    def _file(self, task: CodeTask) -> Path:
        assert self._directory is not None
        return self._directory / f"{task.digest}.outputs"


def _size(groups: tuple[Reference, ...]) -> int:
    """Bytes of outputs."""
    return sum(len(output) for group in groups for output in group.outputs)


def run_canonical(task: CodeTask, sandbox: Sandbox) -> tuple[Reference, ...]:
    """The outputs of the task's canonical program for each group of tests, from one run.

    Raises:
        DataError: it fails, or gives what cannot be compared; or the sandbox failed.
    """
    assert task.canonical is not None
    inputs = [arguments for tests in task.groups for arguments in tests.inputs]
    run = run_calls(
        task,
        task.canonical,
        sandbox,
        name="canonical",
        inputs=inputs,
        seconds=[_CALL_S] * len(inputs),
        total_s=_TOTAL_S,
        result_bytes=_RESULT_BYTES,
    )
    seconds: list[float] = []

    def take(number: int, record: dict[str, Any]) -> str | None:
        output = value_of(record)
        seconds.append(seconds_of(record))
        # A second copy is what the same program would give as a candidate: opaque parts and NaN are not equal to it.
        again = evalplus_equal(
            output,
            value_of(record),
            dataset=task.dataset,
            entry_point=task.entry_point or "",
            arguments=inputs[number],
            atol=task.atol,
        )
        return None if again else f"nothing equals its output {show(output)}"

    problem = run.failure(len(inputs), take)
    if problem is not None:
        raise DataError(
            f"task {task.name}: its canonical program cannot be used: {problem}. Repair or remove the record."
        )
    outputs = [value_text(record, number) or b"" for number, record in enumerate(run.records)]
    groups, start = [], 0
    for tests in task.groups:
        end = start + len(tests.inputs)
        groups.append(Reference(tuple(outputs[start:end]), tuple(seconds[start:end])))
        start = end
    return tuple(groups)
