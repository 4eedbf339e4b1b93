"""Crash-safe files: atomic writes, fsync, deletion, locks, and JSON lines with a `step` each."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from renio_megatron.errors import CheckpointError, ConfigError, DataError

_BLOCK_BYTES = 4096
_RESOLVER = re.compile(r"\$\{oc\.env:(\w+)\}")
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")


def user_path(text: str | Path) -> Path:
    """A path as given by a user, with `~` and environment variables expanded.

    `$HOME`, `${HOME}`, and `${oc.env:HOME}` as recipes write it. A file whose own name contains a `$` is found as well.

    Raises:
        ConfigError: a variable is not set.
    """
    given = _RESOLVER.sub(r"${\1}", str(text))
    if Path(given).exists():
        return Path(given)
    expanded = str(Path(os.path.expandvars(given)).expanduser())
    if unset := _VARIABLE.search(expanded):
        name = unset[1] or unset[2]
        raise ConfigError(
            f"the path {str(text)!r} holds ${name}, which is not set in the environment. Set it, or write the path out."
        )
    return Path(expanded)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replaces a file's content (text: UTF-8) atomically.

    It writes a hidden file next to it first, so that neither a reader nor a crash, of the process or of the machine,
    leaves or sees a half-written file.

    Raises:
        OSError: the file cannot be written; the old file is unchanged.
    """
    partial = path.with_name(f".{path.name}.tmp")
    with partial.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Waits until the entries of a directory are on disk (fsync).

    Raises:
        OSError: fsync fails.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_files(directory: Path) -> None:
    """Waits until every file directly in `directory`, and its entries, are on disk (fsync).

    Raises:
        OSError: fsync fails.
    """
    for path in directory.iterdir():
        if path.is_file():
            sync_directory(path)  # works for files, too
    sync_directory(directory)


def sampled(path: Path, count: int) -> Iterator[bytes]:
    """Samples that identify a large file: its name and size, and `count` evenly spaced blocks.

    Raises:
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    yield f"{path.name} {size}".encode()
    with path.open("rb") as stream:
        for number in range(count):
            stream.seek(max(0, size - _BLOCK_BYTES) * number // (count - 1))
            yield stream.read(_BLOCK_BYTES)


def as_others_are(path: Path) -> None:
    """Gives a file the permissions of a newly created one; some libraries write files that only the owner may read."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


class Lock:
    """A lock file that one process at a time holds; it is released when that process ends, in whatever way.

    Attributes:
        holder: the process that holds it, where it is another one; else None.
    """

    def __init__(self, path: Path) -> None:
        """Locks the file, creating it if missing, unless another process holds it.

        It is a POSIX record lock, which belongs to the process: a child that writes a checkpoint does not inherit it.
        It holds across the hosts of a shared file system; on one without locks it always succeeds.

        Raises:
            OSError: the file cannot be opened.
        """
        self.holder: str | None = None
        self._file = path.open("a+", encoding="utf-8")
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                self._file.seek(0)
                self.holder = self._file.read().strip() or "a process that has just begun"
            return
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()

    def close(self) -> None:
        """Releases the lock."""
        self._file.close()


def remove_directory(directory: Path) -> None:
    """Deletes a directory; it is renamed to a hidden name first, so that a crash leaves nothing under the old name.

    Raises:
        OSError: it cannot be renamed. Files that cannot be deleted afterwards stay under the hidden name.
    """
    hidden = directory.with_name(f".{directory.name}.deleted")
    shutil.rmtree(hidden, ignore_errors=True)
    directory.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


class JsonLines:
    """A JSON lines file that grows by whole lines only; each is on disk before `append` returns.

    An existing file is appended to. A half-written last line, left by a killed run, is cut off.

    Args:
        path: the file; its directory is created.
        purge_step: first step that a resumed run writes again; rows from that step on are dropped. None keeps all.

    Raises:
        CheckpointError: the file cannot be opened or written.
        DataError: `purge_step` is given and the file does not hold rows with a step.
    """

    def __init__(self, path: str | Path, *, purge_step: int | None = None) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.is_file():
                _drop_rows(self.path, purge_step)
            self._file = self.path.open("ab", buffering=0)
        except OSError as error:
            raise output_error(self.path, error) from error

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Appends all rows, or none if writing fails.

        Raises:
            CheckpointError: writing fails.
            ValueError: a number that is NaN or infinite.
        """
        text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode()
        try:
            size = os.fstat(self._file.fileno()).st_size
            try:
                while text:
                    text = text[self._file.write(text) :]
                os.fsync(self._file.fileno())  # a checkpoint that survives a power cut has its rows
            except OSError:
                with contextlib.suppress(OSError):
                    self._file.truncate(size)
                raise
        except OSError as error:
            raise output_error(self.path, error) from error

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def parse_row(line: bytes, path: Path, number: int) -> dict[str, Any]:
    """The JSON object of a line; `number` counts from 1.

    Raises:
        DataError: it is not a JSON object, or has no step.
    """
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict) or "step" not in row:
        raise DataError(
            f"{path}, line {number}: not a row of metrics, which is a JSON object with a step; got {line[:60]!r}. "
            "Remove the line, or choose another output directory."
        )
    return row


def output_error(path: Path, error: OSError) -> CheckpointError:
    """The error for an output file that cannot be written."""
    return CheckpointError(
        f"cannot write {path}: {error.strerror or error}. "
        "Free space there or make it writable, or choose another output directory; the run can be resumed."
    )


def _drop_rows(path: Path, purge_step: int | None) -> None:
    """Cuts off a half-written last line and, where `purge_step` is given, the rows from that step on; atomically."""
    content = path.read_bytes()
    lines = content[: content.rfind(b"\n") + 1].splitlines(keepends=True)
    if purge_step is not None:
        lines = [line for number, line in enumerate(lines, 1) if parse_row(line, path, number)["step"] < purge_step]
    kept = b"".join(lines)
    if kept != content:
        write_atomically(path, kept)
