"""Sources that read records from files."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any

from renio_megatron.config import DataConfig
from renio_megatron.data.sources.columns import column_names, resolve_columns, value_of
from renio_megatron.data.sources.hub import digest, load, place_of
from renio_megatron.data.sources.places import path_key, path_of
from renio_megatron.data.sources.records import RecordReader
from renio_megatron.data.sources.row_files import rows_of
from renio_megatron.data.sources.source import Source, order_of
from renio_megatron.errors import DataError
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
    path = path_of(config, split)
    placed = list(itertools.islice(rows_of(path, path_key(split)), most))
    names = column_names(row for _, row in placed)

    def is_text(name: str) -> bool:
        return all(isinstance(value_of(row, name), (str, int, float, NoneType)) for _, row in placed)

    config, notices = resolve_columns(config, names, str(path), is_text)
    answers = (value_of(row, config.answer_key) for _, row in placed)
    reader = RecordReader(config, names, str(path), answers, is_taught=split == "train")
    records = [reader.record(row, where) for where, row in placed]
    return records, _all_or_none_have_answers(records, config), [*notices, *reader.notices]


def check_jsonl(config: DataConfig, split: str) -> None:
    """Raises `DataError` where a split's file is missing, has an unknown format, or lacks a column."""
    path = path_of(config, split)
    is_small = path.is_file() and path.stat().st_size <= _READ_WHOLE
    _read_file(config, split, None if is_small else _FIRST_RECORDS)


def check_datasets(config: DataConfig, split: str) -> None:
    """Raises `DataError` where a split's directory is missing, or a named data set cannot be had: it is fetched here,
    once, before ranks ask for it."""
    place = place_of(config, split)
    if not place.is_directory:
        load(place)


def datasets_source(config: DataConfig, split: str) -> Source:
    """A data set of the library `datasets`: a directory that its `save_to_disk` wrote, or whatever its `load_dataset`
    takes, a directory of files or a name; see `hub`.
    """
    place = place_of(config, split)
    data = load(place)
    if len(data) == 0:
        raise DataError(f"{place.described}: the data set is empty.")
    names = column_names([{name: _kind(feature) for name, feature in data.features.items()}])
    kinds = {name: value_of({key: _kind(feature) for key, feature in data.features.items()}, name) for name in names}
    config, notices = resolve_columns(
        config, names, place.described, lambda name: str(kinds[name]).startswith(_TEXT_KINDS)
    )
    outer = config.answer_key if config.answer_key in data.features else config.answer_key.partition(".")[0]
    rows = data.select_columns([outer]) if outer in data.features else [{}]
    answers = (value_of(row, config.answer_key) for row in rows)
    reader = RecordReader(config, names, place.described, answers, is_taught=split == "train")

    def read(index: int) -> Record:
        return reader.record(data[index], f"{place.described}, row {index}")

    has_answers = _all_or_none_have_answers((read(index) for index in range(len(data))), config)
    return Source(
        "datasets",
        read,
        "number",
        len(data),
        order_of(config, split),
        has_answers,
        notices=(*notices, *reader.notices),
        contents=None if place.is_directory else functools.partial(digest, data),
    )


def _kind(feature: Any) -> Any:
    """The name of a column's type; of a column of objects the names of theirs, by column."""
    if isinstance(feature, Mapping):
        return {name: _kind(inner) for name, inner in feature.items()}
    return str(getattr(feature, "dtype", "list"))


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
