"""Graders of completions. A new one is a function that returns a `Grader`, and an entry in `config.sections.data`.

No torch here: completions are graded in processes that have no need of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from renio_megatron.config import DataConfig
from renio_megatron.config.lazy import imported
from renio_megatron.config.sections.data import GRADERS, NEED_NO_ANSWERS, is_place
from renio_megatron.errors import ConfigError, DataError
from renio_megatron.evaluation.graders import generated, number
from renio_megatron.evaluation.graders.code import has_tests
from renio_megatron.evaluation.graders.custom import custom_grader
from renio_megatron.evaluation.graders.grader import Completion, Grader, GuardedGrader
from renio_megatron.evaluation.graders.math import math_grader
from renio_megatron.types import Record, Verdict

__all__ = [
    "Completion",
    "Grader",
    "GuardedGrader",
    "Verdict",
    "build_grader",
    "grader_name",
    "named_grader",
    "unusable",
]


class Graded(Protocol):
    """The part of a source of problems that grading needs."""

    @property
    def name(self) -> str:
        """Its name in `data.source`."""

    @property
    def grader(self) -> str:
        """Name of its default grader."""

    @property
    def has_answers(self) -> bool:
        """Whether its records hold answers."""

    @property
    def size(self) -> int | None:
        """Number of its records; None: endless."""

    @property
    def read(self) -> Callable[[int], Record]:
        """Index -> record."""

    @property
    def score(self) -> Callable[[str, str, Mapping[str, Any]], float] | None:
        """Its own scoring of (given answer, right answer, metadata), 1.0 for right; None where it has none."""


def modchain_grader(config: DataConfig, source: Graded | None) -> Grader:
    """The grader `modchain`."""
    return Grader("modchain", generated.grade_modchain)


def number_grader(config: DataConfig, source: Graded | None) -> Grader:
    """The grader `number`."""
    return Grader("number", number.grade_number, number.problem_of, number.same_answer)


def math_grader_of(config: DataConfig, source: Graded | None) -> Grader:
    """The grader `math`."""
    return math_grader()


def reasoning_gym_grader(config: DataConfig, source: Graded | None) -> Grader:
    """The grader `reasoning_gym`; raises `ConfigError` for another source."""
    if source is None or source.score is None:
        raise ConfigError(
            "the grader reasoning_gym needs data.source=reasoning_gym; got "
            f"{'records of a file' if source is None else repr(source.name)}."
        )
    return Grader("reasoning_gym", generated.reasoning_gym_grade(source.score))


def grader_name(config: DataConfig, source: Graded) -> tuple[str, str | None]:
    """The grader of a source's records, and a sentence where it was chosen by looking at the answers.

    Without `data.grader` a user's records are graded by `number` where all answers are numbers, by `math` where they
    are not, and by `code` where there are none and the records hold tests.
    """
    if config.grader is not None:
        return config.grader, None
    if not source.has_answers:
        is_code = config.source_info.has_records and source.size and has_tests(source.read(0))
        return "code" if is_code else "none", None
    if source.grader == "number" and config.source_info.has_records:
        for record in _records(source):
            if (problem := number.problem_of(record)) is not None:
                return "math", (
                    f"{record.where}: {problem}, so the answers are graded by `math`: a completion must have its "
                    "answer in \\boxed{}, or behind ####. data.grader says otherwise."
                )
    return source.grader, None


def build_grader(config: DataConfig, source: Graded) -> Grader | None:
    """The grader of a source's records; None where `data.grader` is `none`, or null and the source has no answers.

    Raises:
        ConfigError: an unknown grader, or one that the source cannot serve.
        DataError: an answer that the grader cannot read; names the first record, and how many there are.
    """
    name, _ = grader_name(config, source)
    if name == "none":
        return None
    if is_place(name):
        return named_grader(name, config)
    if not source.has_answers and name not in NEED_NO_ANSWERS:
        raise ConfigError(
            f"data.grader={name} needs answers, but the records of source {source.name!r} have none. "
            f"Set data.answer_key (now {config.answer_key!r}) to their column, or data.grader=none."
        )
    grader = named_grader(name, config, source)
    if config.source_info.has_records:
        problem = unusable(grader, _records(source), f"data.grader={name}", "records")
        if problem is not None:
            other = "math" if name == "number" else "none"
            raise DataError(f"{problem} Fix the record, leave it out, or set data.grader={other}.")
    return grader


def named_grader(name: str, config: DataConfig, source: Graded | None = None) -> Grader:
    """The grader of a name, or of a place.

    Args:
        name: a name in `GRADERS`, or the place of a user's function.
        config: settings of graders.
        source: the source of the records; None: they come from no source of `data.source`.
    """
    return custom_grader(name) if is_place(name) else imported(GRADERS[name])(config, source)


def _records(source: Graded) -> list[Record]:
    return [source.read(index) for index in range(source.size or 0)]


def unusable(grader: Grader, records: Sequence[Record], named: str, noun: str) -> str | None:
    """Sentences about the first record whose completions could never be right; None where there is none.

    Args:
        grader: it says of each record whether it can use it.
        records: all of them, to count.
        named: what messages call the grader.
        noun: what they call records, in the plural.
    """
    problems = [(record.where, problem) for record in records if (problem := grader.problem_of(record)) is not None]
    if not problems:
        return None
    where, problem = problems[0]
    others = f" So it is for {len(problems)} of {len(records)} {noun}." if len(problems) > 1 else ""
    return f"{where}: {problem}, and {named} could never find a completion right.{others}"
