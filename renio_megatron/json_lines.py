"""Files of JSON objects, one a line, each with its `step`: appended to, cut back on a resume, never half-written."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from renio_megatron.errors import CheckpointError, DataError
from renio_megatron.files import write_atomically


class JsonLines:
    """A file that grows by whole lines only; each is on the disk before `append` returns.

    An existing file is continued. A half-written last line, left by a run that was killed, is cut off.

    Args:
        path: the file; its directory is made.
        purge_step: first step that a resumed run writes again; rows from there on are dropped. None keeps all.

    Raises:
        CheckpointError: the file cannot be opened or written.
        DataError: `purge_step` is given and the file is not one of ours.
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
        """Appends the rows, all or, where the disk refuses, none.

        Raises:
            CheckpointError: the disk refuses.
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
        DataError: it is none, or has no step.
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
    """The error of a file of metrics that the system refused."""
    return CheckpointError(
        f"cannot write metrics to {path}: {error.strerror or error}. "
        "Free space there or make it writable, or choose another output directory; the run can be resumed."
    )


def _drop_rows(path: Path, purge_step: int | None) -> None:
    """Cuts off a half-written last line and, where `purge_step` is given, the rows from that step on; in one step."""
    content = path.read_bytes()
    lines = content[: content.rfind(b"\n") + 1].splitlines(keepends=True)
    if purge_step is not None:
        lines = [line for number, line in enumerate(lines, 1) if parse_row(line, path, number)["step"] < purge_step]
    kept = b"".join(lines)
    if kept != content:
        write_atomically(path, kept)
