r"""The formats of benchmark files: which columns hold the problem and what grades it, and what to ask for.

A format is recognized by its columns, in this order: EvalPlus, LiveCodeBench, problems with ``test_cases``, problems
with an answer. Where all answers have a line behind ``####``, as GSM8K's, the grader is `number`, else `math`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from renio_megatron.config.sections.data import is_place
from renio_megatron.data.sources.columns import ALIASES, answer_text, behind_hashes, column_names, value_of
from renio_megatron.data.sources.conversations import conversation_of
from renio_megatron.data.sources.row_files import Row
from renio_megatron.errors import ConfigError, DataError
from renio_megatron.types import Record

MATH_INSTRUCTION = r"Think step by step, and put the final answer in \boxed{}."
FUNCTION_INSTRUCTION = (
    "Think it through first. Then write the complete function, with the imports and helpers that it needs, in one "
    "fenced block that begins with ```python."
)
PROGRAM_INSTRUCTION = (
    "Think it through first. Then write the complete program in one fenced block that begins with ```python."
)
_STDIN = "The program reads its input from standard input and writes its result to standard output."

_ASKS = r"(?:\b(?:answer|solution|result|response|put|place|within|inside|enclosed?)\b|答案|结果)"
_HOLDS_MATH = re.compile(rf"{_ASKS}[^\n]{{0,80}}\\boxed|\\boxed[^\n]{{0,80}}{_ASKS}", re.IGNORECASE)
r"""An instruction, and not a ``\boxed`` of a formula, which some problems have."""
_BLOCK = r"\b(?:blocks?|fences?|fenced|backticks|delimiters)\b"
_HOLDS_CODE = re.compile(
    rf"\bpython\b[^\n]{{0,60}}{_BLOCK}|{_BLOCK}[^\n]{{0,60}}\bpython\b|\byour code here\b", re.IGNORECASE
)

_INPUTS = ("base_input", "plus_input")


@dataclass(frozen=True)
class Problems:
    """What the rows of a benchmark hold.

    Attributes:
        records: the problems, in the order of the rows.
        grader: the grader that fits, or the one that was asked for.
        instruction: what is put behind each problem; empty where the problems hold their own.
    """

    records: tuple[Record, ...]
    grader: str
    instruction: str


def problems_of(rows: Sequence[Row], source: str, grader: str | None = None) -> Problems:
    """The problems of a benchmark's rows.

    Where only some problems hold an instruction, the others are given it here, and `instruction` is empty.

    Args:
        rows: all rows, so that their format does not depend on a limit.
        source: the file, for messages.
        grader: the grader to use; None: the one that fits the columns.

    Raises:
        ConfigError: the rows hold nothing that this grader could use.
        DataError: a row without a problem, or without what others have; columns of no format.
    """
    names = column_names({name: value for name, value in row.items() if value is not None} for _, row in rows)
    read, found, instruction = _format_of(names, source, grader)
    records = [read(where, row) for where, row in rows]
    holds = (_HOLDS_MATH if instruction == MATH_INSTRUCTION else _HOLDS_CODE).search
    held = [bool(instruction and holds(record.problem)) for record in records]
    if any(held) and not all(held):
        records = [
            record if is_held else replace(record, problem=f"{record.problem}\n\n{instruction}")
            for record, is_held in zip(records, held, strict=True)
        ]
    if found == "math" and all(behind_hashes(record.answer or "") is not None for record in records):
        found = "number"
    return Problems(tuple(records), grader or found, "" if any(held) else instruction)


_Read = Callable[[str, dict[str, Any]], Record]


def _format_of(names: list[str], source: str, grader: str | None) -> tuple[_Read, str, str]:
    """(row -> record, the grader that fits, the instruction) for rows of these columns."""
    if grader not in ("math", "number"):
        if {"task_id", "prompt", "entry_point"} <= set(names) and set(_INPUTS) & set(names):
            return _evalplus_record, "code", FUNCTION_INSTRUCTION
        if {"question_content", "public_test_cases"} <= set(names):
            return _livecodebench_record, "code", PROGRAM_INSTRUCTION
        if "test_cases" in names:
            problem = _column(names, "problem_key", source)
            return (lambda where, row: _program_record(where, row, problem)), "code", PROGRAM_INSTRUCTION
        is_function = "entry_point" in names or {"code", "test_list"} <= set(names)
        if is_function and (grader is None or grader == "code"):
            raise DataError(
                f"{source}: the rows are functions with tests as text, and lack {' and '.join(_INPUTS)}. Data sets on "
                "hubs lack them. Fetch HumanEvalPlus.jsonl.gz or MbppPlus.jsonl.gz of the EvalPlus releases, and put "
                "it as humanevalplus.jsonl.gz or mbppplus.jsonl.gz into a folder of benchmarks (--benchmarks DIR, or "
                "RENIO_BENCHMARKS)."
            )
        if grader == "code":
            raise ConfigError(
                f"{source}: the grader 'code' needs tests: base_input and plus_input, public_test_cases, or "
                f"test_cases; columns: {', '.join(names) or 'none'}."
            )
        if is_function:
            return (lambda where, row: _record(where, row, "prompt")), "code", FUNCTION_INSTRUCTION
    return _answer_format(names, source, grader)


def _answer_format(names: list[str], source: str, grader: str | None) -> tuple[_Read, str, str]:
    """The format of problems with an answer; a user's own grader may do without."""
    problem, answer = _column(names, "problem_key", source), _column(names, "answer_key", source)
    if problem is None or (answer is None and not (grader and is_place(grader))):
        lacks = "problem" if problem is None else "answer"
        raise DataError(
            f"{source}: there is no column with {'an' if lacks == 'answer' else 'a'} {lacks} "
            f"({', '.join(ALIASES[f'{lacks}_key'])}), nor with tests (base_input and plus_input, public_test_cases, "
            f"test_cases); columns: {', '.join(names) or 'none'}. Rename the right one."
        )

    def read(where: str, row: dict[str, Any]) -> Record:
        text = None if answer is None else answer_text(row, answer, where)
        if text is None and answer is not None:
            raise DataError(f"{where}: there is no answer in column {answer!r}. Leave such rows out.")
        return _record(where, row, problem, answer=text)

    return read, "math", "" if answer is None else MATH_INSTRUCTION


def _column(names: list[str], key: str, source: str) -> str | None:
    """The column of a usual name; None where there is none.

    Raises:
        DataError: two could be meant.
    """
    aliases = ALIASES[key]
    if aliases[0] in names:
        return aliases[0]
    found = [name for name in names if name.lower() in aliases]
    if len(found) > 1:
        what = key.removesuffix("_key")
        raise DataError(
            f"{source}: {' and '.join(map(repr, found))} could both be the {what}. Rename the right column {what!r}."
        )
    return found[0] if found else None


def _record(where: str, row: dict[str, Any], column: str | None, **values: Any) -> Record:
    """The record of a row; the whole row is its metadata, so that a grader finds everything."""
    problem = None if column is None else value_of(row, column)
    if column is not None and isinstance(problem, list):
        asked = conversation_of(problem, column, where)
        problem, values = asked.question, {**values, "before": asked.before}
    if not isinstance(problem, str) or not problem.strip():
        found = "nothing" if problem is None or problem == "" else f"{type(problem).__name__} without a text"
        raise DataError(
            f"{where}: column {column!r} must hold the problem's text; got {found}. Fix the row, or leave it out."
        )
    return Record(problem=problem.rstrip(), metadata=dict(row), where=where, **values)


def _evalplus_record(where: str, row: dict[str, Any]) -> Record:
    lacks = [name for name in ("entry_point", *_INPUTS) if row.get(name) is None]
    if lacks:
        raise DataError(f"{where}: the function has no {', '.join(lacks)}, which other rows have. Copy the file again.")
    return _record(where, row, "prompt")


def _livecodebench_record(where: str, row: dict[str, Any]) -> Record:
    return _with_interface(_record(where, row, "question_content"), row, None)


def _program_record(where: str, row: dict[str, Any], column: str | None) -> Record:
    if row.get("test_cases") is None:
        raise DataError(f"{where}: there are no test_cases, which other rows have. Leave such rows out.")
    return _with_interface(_record(where, row, column), row, _function_name(row["test_cases"]))


def _with_interface(record: Record, row: dict[str, Any], function: str | None) -> Record:
    """The record whose problem says how the tests run the program."""
    starter = row.get("starter_code")
    if isinstance(starter, str) and starter.strip():
        interface = f"Complete this code, and keep its names:\n\n```python\n{starter.strip(chr(10)).rstrip()}\n```"
    elif function is not None:
        interface = f"The program defines `{function}`, which the tests call."
    else:
        interface = _STDIN
    return replace(record, problem=f"{record.problem}\n\n{interface}")


def _function_name(tests: Any) -> str | None:
    """The function that test cases call; None where they run a program."""
    if isinstance(tests, str):
        try:
            tests = json.loads(tests)
        except ValueError:  # the grader says what is wrong with them
            return None
    name = tests.get("fn_name") if isinstance(tests, dict) else None
    return name if isinstance(name, str) and name else None
