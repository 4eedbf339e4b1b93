"""Readers of record files: JSON lines, plain or gzipped, a JSON array, or parquet. No torch here."""

from __future__ import annotations

import functools
import gzip
import itertools
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from renio_megatron.errors import DataError

Row = tuple[str, dict[str, Any]]
"""Position of a record, as `file:line` or `file, row number` from 0, and its columns."""

_GZIP, _PARQUET, _ZIP = b"\x1f\x8b", b"PAR1", b"PK\x03\x04"
_UTF8_MARK = b"\xef\xbb\xbf"
_OTHER_MARKS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_HEAD = 4096
_LINES = "one JSON object a line"


def rows_of(path: Path, key: str) -> Iterator[Row]:
    """The records of a file, in order; the format is detected from its first bytes, not from its name.

    Args:
        path: the file.
        key: the setting that names it, for messages.

    Raises:
        DataError: no such file, an unknown format, or a record that cannot be read; with the line where there is one.
    """
    if path.is_dir():
        raise DataError(
            f"{key}: {str(path)!r} is a directory. Give a file, or set data.source=datasets for a directory that "
            "datasets.save_to_disk wrote."
        )
    if not path.is_file():
        raise DataError(f"{key}: there is no file {str(path)!r}.")
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
        if head.startswith(_PARQUET):
            yield from _parquet(path)
            return
        if head.startswith(_ZIP):
            raise DataError(f"{path} is a zip archive. Unpack it, and give the file inside.")
        with gzip.open(path, "rb") if head.startswith(_GZIP) else path.open("rb") as file:
            yield from _json(path, cast(BinaryIO, file))
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}. It may be truncated; copy it again.") from error


def _json(path: Path, file: BinaryIO) -> Iterator[Row]:
    """The records of a JSON file, opened at its beginning."""
    head = file.read(_HEAD)
    for mark, encoding in _OTHER_MARKS.items():
        if head.startswith(mark):
            raise DataError(
                f"{path} is {encoding}, and JSON is read as UTF-8. Convert it, for example by "
                f"`iconv -f {encoding} -t UTF-8`."
            )
    head = head.removeprefix(_UTF8_MARK)
    if head.startswith(_PARQUET):
        raise DataError(f"{path} is a gzipped parquet file. Unpack it (gunzip).")
    if head.lstrip().startswith(b"["):
        file.seek(0)
        yield from _array(path, file.read().removeprefix(_UTF8_MARK))
        return
    file.seek(0)
    is_empty = True
    for number, line in enumerate(file, start=1):
        line = line.removeprefix(_UTF8_MARK) if number == 1 else line
        if line.strip():
            guess = functools.partial(_first_lines, path, line, file) if is_empty else str
            yield f"{path}:{number}", _object(line, f"{path}:{number}", guess)
            is_empty = False
    if is_empty:
        raise DataError(f"{path}: the file holds no records. It needs {_LINES}.")


def _object(line: bytes, where: str, guess: Callable[[], str]) -> dict[str, Any]:
    """The record of a line; `guess` describes the file's likely format where the line is not a record."""
    try:
        row = json.loads(line)
    except RecursionError as error:
        raise DataError(f"{where}: the JSON is nested too deeply. Fix or drop the line.") from error
    except ValueError as error:  # malformed JSON and malformed UTF-8
        raise DataError(f"{where}: not valid JSON ({error}). {guess() or 'Fix or drop the line.'}") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object, got {type(row).__name__}. Fix or drop the line.")
    return row


def _first_lines(path: Path, line: bytes, file: BinaryIO) -> str:
    return _guess(path, line.strip(), next(iter(file), b"").strip())


def _guess(path: Path, first: bytes, second: bytes) -> str:
    """Likely format of a file whose first line is not JSON, with a remedy; empty where only the line may be wrong."""
    if first in (b"{", b"[") or (first.startswith(b"{") and first.endswith((b",", b"[", b"{"))):
        return f"It looks like an object over several lines. Write {_LINES}, for example by `jq -c .`."
    for separator, name in ((b",", "CSV"), (b"\t", "TSV")):
        count = first.count(separator)
        is_named = path.suffix[1:].upper() == name
        if count and not first.startswith(b"{") and (is_named or second.count(separator) >= count):
            return (
                f"It looks like {name}. Write {_LINES}, for example by pandas: "
                "read_csv(...).to_json('data.jsonl', orient='records', lines=True)."
            )
    return ""


def _array(path: Path, content: bytes) -> Iterator[Row]:
    """The objects of a JSON array. A file whose lines are arrays is not supported."""
    try:
        rows = json.loads(content)
    except RecursionError as error:
        raise DataError(f"{path}: the JSON is nested too deeply.") from error
    except ValueError as error:
        if _is_json(content.lstrip().partition(b"\n")[0]):
            problem = f"{path}:1: expected a JSON object, got list. It needs {_LINES}, or one array of objects."
        else:
            problem = f"{path}: a JSON array that cannot be read ({error}). It may be cut off; copy it again."
        raise DataError(problem) from error
    if not rows:
        raise DataError(f"{path}: the file holds no records. It needs {_LINES}.")
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{path}, row {number}: expected a JSON object, got {type(row).__name__}.")
        yield f"{path}, row {number}", row


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        rows = itertools.chain.from_iterable(batch.to_pylist() for batch in file.iter_batches())
        if not file.metadata.num_rows:
            raise DataError(f"{path}: the file holds no records.")
        for number, row in enumerate(rows):
            yield f"{path}, row {number}", row
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: a parquet file that cannot be read ({error}). Copy it again.") from error
