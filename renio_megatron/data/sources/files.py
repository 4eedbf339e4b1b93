"""Sources that read records from files."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

from renio_megatron.config import DataConfig
from renio_megatron.data.sources.columns import answer_text, resolve_columns
from renio_megatron.data.sources.row_files import rows_of
from renio_megatron.data.sources.source import Source, order_of
from renio_megatron.errors import ConfigError, DataError
from renio_megatron.files import user_path
from renio_megatron.types import Record

_TEXT_KINDS = ("string", "large_string", "int", "uint", "float", "double")


_READ_WHOLE, _FIRST_RECORDS = 64 * 2**20, 1000
"""Largest size, in bytes, of a file that is read whole before the ranks start, and records read of a larger one."""


def jsonl_source(config: DataConfig, split: str) -> Source:
    """A file of records: JSON lines, gzipped or not, a JSON array of objects, or parquet."""
    records, has_answers, notices = _read_file(config, split)
    return Source(
        "jsonl",
        records.__getitem__,
        "number",
        len(records),
        order_of(config, split),
        has_answers,
        notices=tuple(notices),
    )


def _read_file(config: DataConfig, split: str, most: int | None = None) -> tuple[list[Record], bool, list[str]]:
    """(the records of a split's file, or the first `most`; whether they have answers; sentences about the columns)."""
    path = _path_of(config, split)
    placed = list(itertools.islice(rows_of(path, _path_key(split)), most))
    names = list(dict.fromkeys(name for _, row in placed for name in row))

    def is_text(name: str) -> bool:
        return all(isinstance(row.get(name, ""), (str, int, float, NoneType)) for _, row in placed)

    config, notices = resolve_columns(config, names, str(path), is_text)
    records = [_record(row, config, where) for where, row in placed]
    return records, _all_or_none_have_answers(records, config), notices


def check_jsonl(config: DataConfig, split: str) -> None:
    """Raises `DataError` where a split's file is missing, has an unknown format, or lacks a column."""
    path = _path_of(config, split)
    is_small = path.is_file() and path.stat().st_size <= _READ_WHOLE
    _read_file(config, split, None if is_small else _FIRST_RECORDS)


def check_datasets(config: DataConfig, split: str) -> None:
    """Raises `DataError` where a split's directory is missing."""
    _directory_of(config, split)


def _directory_of(config: DataConfig, split: str) -> Path:
    """The directory of a split; raises `DataError` where there is none."""
    path = _path_of(config, split)
    if not path.is_dir():
        advice = " It is a file: data.source=jsonl reads JSON lines and parquet." if path.is_file() else ""
        raise DataError(f"{_path_key(split)}: there is no directory {str(path)!r}.{advice}")
    return path


def datasets_source(config: DataConfig, split: str) -> Source:
    """A directory written by `datasets.Dataset.save_to_disk`; for a `DatasetDict`, its split `train` or `test`."""
    import datasets

    path = _directory_of(config, split)
    try:
        data = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path}: not a directory written by datasets.save_to_disk ({error}).") from error
    if isinstance(data, datasets.DatasetDict):
        part = "train" if split == "train" else "test"
        if part not in data:
            raise DataError(f"{path}: the data set has no split {part!r}, but {', '.join(data)}. Point to one of them.")
        data = data[part]
    if len(data) == 0:
        raise DataError(f"{path}: the data set is empty.")
    kinds = {name: str(getattr(feature, "dtype", "")) for name, feature in data.features.items()}
    config, notices = resolve_columns(
        config, data.column_names, str(path), lambda name: kinds[name].startswith(_TEXT_KINDS)
    )

    def read(index: int) -> Record:
        where = f"{path}, row {index}"
        return _record(data[index], config, where)

    has_answers = _all_or_none_have_answers((read(index) for index in range(len(data))), config)
    order = order_of(config, split)
    return Source("datasets", read, "number", len(data), order, has_answers, notices=tuple(notices))


def _path_key(split: str) -> str:
    return "data.path" if split == "train" else "data.eval_path"


def _path_of(config: DataConfig, split: str) -> Path:
    path = config.path if split == "train" else config.eval_path
    if path is None:
        use = "training" if split == "train" else "evaluation"
        raise ConfigError(f"data.source={config.source} needs {_path_key(split)} for {use}.")
    return user_path(path)


def _record(row: Mapping[str, Any], config: DataConfig, where: str) -> Record:
    problem = _text(row, config.problem_key, where)
    if problem is None:
        raise DataError(
            f"{where}: there is no column {config.problem_key!r} with a problem; columns: {', '.join(row) or 'none'}. "
            "Set data.problem_key to the right one."
        )
    if not problem.strip():
        raise DataError(f"{where}: the problem ({config.problem_key!r}) is empty.")
    used = (config.problem_key, config.solution_key, config.answer_key, config.teacher_key)
    return Record(
        problem=problem,
        solution=_text(row, config.solution_key, where),
        answer=answer_text(row, config.answer_key, where),
        metadata={key: value for key, value in row.items() if key not in used},
        where=where,
        teacher=None if config.teacher_key is None else _text(row, config.teacher_key, where),
    )


def _text(row: Mapping[str, Any], key: str, where: str) -> str | None:
    value = row.get(key)
    if value is not None and not isinstance(value, str):
        raise DataError(f"{where}: column {key!r} must hold text, got {type(value).__name__}.")
    return value


def _all_or_none_have_answers(records: Sequence[Record] | Any, config: DataConfig) -> bool:
    with_answer = without = None
    for record in records:
        if record.answer is None:
            without = without or record.where
        else:
            with_answer = with_answer or record.where
        if with_answer and without:
            raise DataError(
                f"{without}: no answer in column {config.answer_key!r}, but {with_answer} has one. "
                "Give every record an answer, or none."
            )
    return with_answer is not None
