"""Where problems come from. A new source is a function that returns a `Source`, and a line of `SOURCES`.

No torch here: a file is looked at before a rank starts.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np

from renio_megatron.config import DataConfig
from renio_megatron.config.validators import require_choice
from renio_megatron.data.columns import answer_text, resolve_columns
from renio_megatron.data.row_files import rows_of
from renio_megatron.errors import ConfigError, DataError
from renio_megatron.files import user_path

SPLITS = ("train", "eval")
DEFAULT_GYM_SIZE = 10_000
_TEXT_KINDS = ("string", "large_string", "int", "uint", "float", "double")
_READ_WHOLE, _FIRST_RECORDS = 64 * 2**20, 1000
"""Bytes of a file that is read whole before the ranks start, and records of a larger one."""
_EVAL_SEED_OFFSET = 2**31  # reasoning-gym seeds item i with seed + i: neighbouring seeds would share problems


@dataclass(frozen=True)
class Record:
    """One problem.

    Example: ``Record("2 + 2?", answer="4", where="train.jsonl:17")``.

    Attributes:
        problem: its text.
        solution: worked solution; None where there is none.
        answer: what a grader compares with; None where there is none.
        metadata: whatever else is known, for the grader.
        where: file and line, or number, for error messages.
        teacher: what the column data.teacher_key holds; None where there is none.
    """

    problem: str
    solution: str | None = None
    answer: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    where: str = "record"
    teacher: str | None = None


@dataclass(frozen=True)
class Source:
    """The records of one split, in the order in which they are used.

    Attributes:
        name: as in `data.source`.
        read: record by its index: in [0, size) where the source is finite.
        grader: name of the grader that fits.
        size: number of records; None: endless.
        shuffle_seed: seed of the order; each epoch of a finite source has its own permutation. None: as they stand.
        has_answers: whether all records have an answer (a source where only some have one is refused).
        has_all_solutions: whether every record is known to have a solution; the others are checked as they are read.
        notices: sentences about how its records are read.
        score: scoring of (given answer, right answer, metadata), 1.0 for right, of sources that have their own.
    """

    name: str
    read: Callable[[int], Record]
    grader: str
    size: int | None = None
    shuffle_seed: int | None = None
    has_answers: bool = True
    has_all_solutions: bool = False
    score: Callable[[str, str, Mapping[str, Any]], float] | None = None
    notices: tuple[str, ...] = ()

    def record(self, position: int) -> Record:
        """The record at `position` (0, 1, 2, ...) of the endless order; a pure function of position and seed."""
        if self.size is None:
            return self.read(position)
        epoch, offset = divmod(position, self.size)
        if self.shuffle_seed is not None:
            offset = int(_permutation(self.size, self.shuffle_seed, epoch)[offset])
        return self.read(offset)

    def require_solutions(self, reason: str) -> None:
        """Raises `DataError` naming the first record of a finite source that has no solution."""
        if not self.has_all_solutions:
            for index in range(self.size or 1):
                solution_of(self.read(index), reason)


def solution_of(record: Record, reason: str) -> str:
    """The record's solution; raises `DataError` with the `reason` that asks for one where there is none."""
    if record.solution is None:
        raise DataError(
            f"{record.where}: the record has no solution, and {reason}. "
            "Set data.solution_key to the column of worked solutions, or leave such records out."
        )
    return record.solution


@lru_cache(maxsize=4)
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    sequence = np.random.SeedSequence(seed, spawn_key=(epoch,))
    return np.random.Generator(np.random.Philox(sequence)).permutation(size)


def modchain_source(config: DataConfig, split: str) -> Source:
    """The task that ships: endless, with worked solutions and one-digit answers."""
    from renio_megatron.tasks import modchain  # which brings torch

    def read(index: int) -> Record:
        problem = modchain.make_problem(config.seed, split, index)
        return Record(problem.prompt, problem.solution, problem.answer, where=f"modchain {split} problem {index}")

    return Source("modchain", read, grader="modchain", has_all_solutions=True)


def jsonl_source(config: DataConfig, split: str) -> Source:
    """A file of records: a JSON object a line, gzipped or not, an array of objects, or parquet."""
    records, has_answers, notices = _read_file(config, split)
    return Source(
        "jsonl",
        records.__getitem__,
        "number",
        len(records),
        _order(config, split),
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


def check_file(config: DataConfig, split: str) -> None:
    """Raises `DataError` where a split's file is missing, none of the formats, or lacks a column.

    A large file's first records alone are read: the ranks read the others.
    """
    if config.source == "datasets":
        _directory_of(config, split)
    elif config.source == "jsonl":
        path = _path_of(config, split)
        is_small = path.is_file() and path.stat().st_size <= _READ_WHOLE
        _read_file(config, split, None if is_small else _FIRST_RECORDS)


def _directory_of(config: DataConfig, split: str) -> Path:
    """The directory of a split; raises `DataError` where there is none."""
    path = _path_of(config, split)
    if not path.is_dir():
        advice = " It is a file: data.source=jsonl reads JSON lines and parquet." if path.is_file() else ""
        raise DataError(f"{_path_key(split)}: there is no directory {str(path)!r}.{advice}")
    return path


def datasets_source(config: DataConfig, split: str) -> Source:
    """A directory written by `datasets.Dataset.save_to_disk`; of a `DatasetDict` the split `train` or `test`."""
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
    order = _order(config, split)
    return Source("datasets", read, "number", len(data), order, has_answers, notices=tuple(notices))


def reasoning_gym_source(config: DataConfig, split: str) -> Source:
    """A generator of the reasoning-gym package: `data.size` problems, from another seed for evaluation."""
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError as error:
        raise ConfigError("data.source=reasoning_gym needs a package: pip install reasoning-gym.") from error
    if config.task not in DATASETS:
        near = ", ".join(difflib.get_close_matches(config.task or "", DATASETS, n=5, cutoff=0.4))
        raise ConfigError(
            f"data.task must name a task of reasoning_gym; got {config.task!r}. "
            + (f"Near: {near}." if near else "For example gsm_symbolic.")
        )
    size = config.size or DEFAULT_GYM_SIZE
    seed = config.seed + (_EVAL_SEED_OFFSET if split == "eval" else 0)
    data = create_dataset(config.task, size=size, seed=seed)

    def read(index: int) -> Record:
        entry = data[index]
        metadata = entry["metadata"]
        where = f"{config.task} {split} problem {index}"
        answer = None if entry["answer"] is None else str(entry["answer"])
        return Record(entry["question"], metadata.get("answer_cot"), answer, metadata, where)

    def score(given: str, answer: str, metadata: Mapping[str, Any]) -> float:
        return float(data.score_answer(given, entry={"answer": answer, "metadata": metadata}))

    return Source("reasoning_gym", read, "reasoning_gym", size, _order(config, split), score=score)


SOURCES: dict[str, Callable[[DataConfig, str], Source]] = {
    "modchain": modchain_source,
    "jsonl": jsonl_source,
    "datasets": datasets_source,
    "reasoning_gym": reasoning_gym_source,
}
_SETTINGS = {"jsonl": ("path", "eval_path"), "datasets": ("path", "eval_path"), "reasoning_gym": ("task", "size")}


def build_source(config: DataConfig, split: str) -> Source:
    """The source that `data.source` names, opened and checked.

    Args:
        config: what and where.
        split: `train` (endless order, shuffled by the seed) or `eval` (other problems, in their own order).
    Raises:
        ConfigError: settings that do not fit the source. DataError: data that cannot be used.
    """
    require_choice("data.source", config.source, SOURCES)
    require_choice("split", split, SPLITS)
    if not 0 <= config.seed < _EVAL_SEED_OFFSET:
        raise ConfigError(f"data.seed must lie in [0, 2**31); got {config.seed}.")
    for name in ("path", "eval_path", "task", "size"):
        if getattr(config, name) is not None and name not in _SETTINGS.get(config.source, ()):
            raise ConfigError(f"data.{name} has no meaning for data.source={config.source}; leave it out.")
    return SOURCES[config.source](config, split)


def _path_key(split: str) -> str:
    return "data.path" if split == "train" else "data.eval_path"


def _path_of(config: DataConfig, split: str) -> Path:
    path = config.path if split == "train" else config.eval_path
    if path is None:
        use = "training" if split == "train" else "evaluation"
        raise ConfigError(f"data.source={config.source} needs {_path_key(split)} for {use}.")
    return user_path(path)


def _order(config: DataConfig, split: str) -> int | None:
    return config.seed if split == "train" else None


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
