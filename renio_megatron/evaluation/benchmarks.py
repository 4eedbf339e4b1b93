"""Benchmarks, read by name or by path. No torch here."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property

from renio_megatron.config import DataConfig
from renio_megatron.config.sections.data import GRADERS, is_place
from renio_megatron.config.validators import require_choice
from renio_megatron.data.sources.row_files import Row, rows_of
from renio_megatron.errors import ConfigError, DataError
from renio_megatron.evaluation.benchmark_files import cached_rows, find_file, folders_of, is_path, missing, stem_of
from renio_megatron.evaluation.benchmark_formats import problems_of
from renio_megatron.evaluation.benchmark_names import NAMES, known_benchmark
from renio_megatron.evaluation.graders import Grader, named_grader, unusable
from renio_megatron.files import user_path
from renio_megatron.types import Record

__all__ = ["NAMES", "Benchmark", "grader_of", "load_benchmark", "record_digest"]

_OF_SOURCES = ("reasoning_gym",)
"""Graders that need their source of problems, of which there are no files."""
_DIGEST_BYTES = 16


@dataclass(frozen=True)
class Benchmark:
    """The problems of a benchmark, and how they are asked and graded.

    Attributes:
        name: its name in `NAMES`; of a path the file's name without suffixes.
        records: the problems, without the instruction; `metadata` is the whole row, `solution` is None.
        grader: name in `GRADERS`, `code`, or the place of a user's own grader.
        instruction: what is put behind a problem, after a blank line; empty where the problems hold their own.
        source: the file or the data set, for messages.
    """

    name: str
    records: tuple[Record, ...]
    grader: str
    instruction: str
    source: str

    def prompt(self, record: Record) -> str:
        r"""What a model is asked: the problem, a blank line, and the instruction.

        >>> Benchmark("sums", (), "math", "Use \\boxed{}.", "sums.jsonl").prompt(Record("2 + 2?"))
        '2 + 2?\n\nUse \\boxed{}.'
        """
        return f"{record.problem}\n\n{self.instruction}" if self.instruction else record.problem

    @cached_property
    def digests(self) -> tuple[str, ...]:
        """`record_digest` of each record. With a larger limit they begin with the same ones."""
        return tuple(record_digest(record) for record in self.records)

    @cached_property
    def digest(self) -> str:
        """A hexadecimal digest of the records in order, which differs where a problem, answer or test does."""
        return hashlib.blake2b("\n".join(self.digests).encode(), digest_size=_DIGEST_BYTES).hexdigest()


def record_digest(record: Record) -> str:
    """A hexadecimal digest of a record's problem, answer and row; where it was read from does not matter.

    >>> one, moved = Record("2 + 2?", answer="4", where="a:1"), Record("2 + 2?", answer="4", where="b:7")
    >>> record_digest(one) == record_digest(moved), record_digest(one) == record_digest(Record("2 + 2?", answer="5"))
    (True, False)
    """
    # Parquet has dates and bytes, which JSON has not.
    content = json.dumps([record.problem, record.answer, dict(record.metadata)], sort_keys=True, default=repr)
    return hashlib.blake2b(content.encode(), digest_size=_DIGEST_BYTES).hexdigest()


def load_benchmark(
    name_or_path: str,
    *,
    folder: str | None = None,
    grader: str | None = None,
    limit: int | None = None,
    sandbox: str | None = None,
) -> Benchmark:
    """The benchmark of a name in `NAMES`, or of a file.

    A name is looked for in the folders, the first that has it, then in the cache of the library `datasets`; the network
    is not touched. Capitals, spaces, `-` and `_` do not matter, and `+` is `plus`: `MATH-500`, `HumanEval+`. Files may
    have longer names, as `aime24_qwq.jsonl` and `MATH-500/test.jsonl`. `humaneval` and `mbpp` are the plus sets.

    Args:
        name_or_path: a name, or a file of JSON lines, a JSON array, or parquet, whose columns tell its format.
        folder: folder of benchmark files; None: those of the environment variable RENIO_BENCHMARKS.
        grader: the grader to use; None: the one that fits the columns.
        limit: take the first `limit` problems; None: all.
        sandbox: where the grader `code` will run programs, as `data.sandbox`.

    Raises:
        ConfigError: an unknown name or grader, a limit below 1, a folder that is missing, or rows without what the
            grader needs.
        DataError: no file, or two that fit equally; rows that cannot be read; an answer or tests that the grader
            cannot use, with file and line.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"the limit must be at least 1 problem; got {limit}. Leave it out to take all.")
    if grader is not None and not is_place(grader):
        names = [name for name in GRADERS if name not in _OF_SOURCES]
        require_choice("the grader", grader, (*names, "a function of your own (module:function)"))
    name, rows, source = _rows_of_path(name_or_path) if is_path(name_or_path) else _rows_of_name(name_or_path, folder)
    problems = problems_of(rows, source, grader)
    benchmark = Benchmark(name, problems.records[:limit], problems.grader, problems.instruction, source)
    _check_records(benchmark, sandbox)
    return benchmark


def _rows_of_path(text: str) -> tuple[str, list[Row], str]:
    path = user_path(text)
    if path.is_dir():
        raise DataError(f"benchmark {text!r} is a directory. Give a file of it: JSON lines, a JSON array, or parquet.")
    return stem_of(path), list(rows_of(path, f"benchmark {text!r}")), str(path)


def _rows_of_name(name: str, folder: str | None) -> tuple[str, list[Row], str]:
    known = known_benchmark(name)
    folders = folders_of(folder)
    path, left_out = find_file(known, folders)
    if path is not None:
        return known.name, list(rows_of(path, f"benchmark {known.name}")), str(path)
    rows, reason = cached_rows(known)
    if rows is None:
        raise missing(known, folders, left_out, reason)
    source = f"{known.hub_id} (split {known.split}) in the cache of datasets"
    if not rows:
        raise DataError(f"{source} holds no rows. Fetch it again.")
    return known.name, rows, source


def grader_of(benchmark: Benchmark, sandbox: str | None) -> Grader:
    """The grader of a benchmark's completions, which runs programs in a `sandbox`.

    Raises:
        ConfigError: a user's own that cannot be imported; no sandbox works here.
    """
    return named_grader(benchmark.grader, DataConfig(sandbox=sandbox))


def _check_records(benchmark: Benchmark, sandbox: str | None) -> None:
    """Raises `DataError` where the grader cannot use a record, so that no completion is generated in vain."""
    if is_place(benchmark.grader):  # it takes any
        return
    grader = grader_of(benchmark, sandbox)
    if (problem := unusable(grader, benchmark.records, f"the grader {grader.name}", "problems")) is not None:
        other = ", or choose the grader math" if grader.name == "number" else ""
        raise DataError(f"{problem} Fix the row, leave it out{other}.")
