"""The grader `code`: the program in a completion is run in a sandbox on the record's tests."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from renio_megatron.config import DataConfig
from renio_megatron.errors import DataError
from renio_megatron.evaluation.code.judge import judge_program
from renio_megatron.evaluation.code.programs import find_program
from renio_megatron.evaluation.code.rows import code_task
from renio_megatron.evaluation.code.tasks import CodeTask
from renio_megatron.evaluation.graders.final_answer import after_thinking
from renio_megatron.evaluation.graders.grader import CUT, NO_ANSWER, UNCLOSED_THINKING, Completion, Grader
from renio_megatron.evaluation.sandbox import open_sandbox
from renio_megatron.types import Record, Verdict

_TASKS = 1024
"""Tasks that are kept read: several completions of a problem are judged by the same."""


def code_grader(config: DataConfig, source: Any = None) -> Grader:
    """The grader `code`, in the sandbox of `data.sandbox`.

    Raises:
        ConfigError: no sandbox works here; programs are not run without one unless `unsafe` says so.
    """
    sandbox = open_sandbox(config.sandbox)
    tasks = lru_cache(maxsize=_TASKS)(_Row.task)

    def grade(completion: Completion, record: Record) -> Verdict:
        text = after_thinking(completion)
        if text is None:
            return Verdict(False, None, UNCLOSED_THINKING)
        task = tasks(_Row(record))
        program = find_program(text, task.entry_point, task.prompt)
        if program is None:
            return Verdict(False, None, NO_ANSWER if completion.finished else CUT)
        verdict = judge_program(program, task, sandbox)
        return Verdict(verdict.correct, program, verdict.reason)

    return Grader("code", grade, problem_of, same_answer=None)


def has_tests(record: Record) -> bool:
    """Whether a record's columns hold tests of a program, readable or not."""
    try:
        return code_task(record.metadata) is not None
    except DataError:
        return True


def problem_of(record: Record) -> str | None:
    """Why the grader cannot use a record's tests; None where it can."""
    try:
        _Row(record).task()
    except DataError as error:
        return str(error).rstrip(".")
    return None


class _Row:
    """A record as a row of its file; the same record has the same task."""

    def __init__(self, record: Record) -> None:
        self._record = record

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Row) and self._record is other._record

    def __hash__(self) -> int:
        return id(self._record)

    def task(self) -> CodeTask:
        """Raises `DataError` where there is none, or its tests cannot be read."""
        task = code_task({"prompt": self._record.problem, **self._record.metadata})
        if task is None:
            raise DataError("it has no tests of a program: base_input and plus_input, public_test_cases, or test_cases")
        return task
