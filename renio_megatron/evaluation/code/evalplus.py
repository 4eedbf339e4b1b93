"""Tasks of HumanEval+ and MBPP+, from rows of EvalPlus's files."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

from renio_megatron.errors import DataError
from renio_megatron.evaluation.code.tasks import Cases, CodeTask

_VERSION = 1  # of conversion and harness: outputs that are kept on disk under another one are not read
_COLUMNS = ("task_id", "prompt", "entry_point", "canonical_solution", "base_input", "plus_input", "atol")
_DATASETS = {"HumanEval": "humaneval", "Mbpp": "mbpp"}
_Arguments = list[Any]


def evalplus_task(row: Mapping[str, Any]) -> CodeTask:
    """The task of a row of HumanEval+ or MBPP+, its inputs as its authors meant them.

    The files are JSON, which has no tuple, set or complex number; MBPP+ needs them, by the number of the task.

    Raises:
        DataError: a column is missing or unreadable.
    """
    name = str(row.get("task_id", "without task_id"))
    if missing := [column for column in _COLUMNS if column not in row]:
        raise DataError(f"task {name}: column {missing[0]!r} is missing; a row of EvalPlus has {', '.join(_COLUMNS)}.")
    source, _, number = name.partition("/")
    if source not in _DATASETS or not number.isdigit():
        raise DataError(f"task {name}: task_id must be HumanEval/<number> or Mbpp/<number>.")
    for column in ("prompt", "entry_point", "canonical_solution"):
        if not isinstance(row[column], str):
            raise DataError(f"task {name}: column {column!r} must be text; got {type(row[column]).__name__}.")
    if not isinstance(row["atol"], int | float):
        raise DataError(f"task {name}: column 'atol' must be a number; got {row['atol']!r}.")
    dataset = _DATASETS[source]
    groups = tuple(_tests(row, column, dataset, int(number), name) for column in ("base_input", "plus_input"))
    if not groups[0].inputs:
        raise DataError(f"task {name}: column 'base_input' is empty: without a test everything is right.")
    key = [_VERSION, sys.version_info[:2], *(row[column] for column in _COLUMNS)]
    return CodeTask(
        name=name,
        kind="evalplus",
        entry_point=row["entry_point"],
        groups=groups,
        # MBPP's prompt is a docstring: a function of its own begins behind it.
        prompt=row["prompt"] if dataset == "humaneval" else None,
        canonical=row["prompt"] + row["canonical_solution"],
        dataset=dataset,
        atol=float(row["atol"]),
        digest=hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest(),
    )


def _tests(row: Mapping[str, Any], column: str, dataset: str, number: int, name: str) -> Cases:
    inputs = row[column] or []  # one row of MBPP+ has {} for no inputs
    convert = _CONVERSIONS.get(number, _as_it_is) if dataset == "mbpp" else _as_it_is
    try:
        if not isinstance(inputs, list) or not all(isinstance(arguments, list) for arguments in inputs):
            raise TypeError("it is not a list of lists of arguments")
        converted = tuple(convert(arguments) for arguments in inputs)
    except (TypeError, ValueError, IndexError, AttributeError) as error:
        raise DataError(f"task {name}: column {column!r} cannot be read: {error}.") from error
    return Cases(column.removesuffix("_input"), converted)


def _as_it_is(arguments: _Arguments) -> _Arguments:
    return arguments


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _tuples(values: Any) -> Any:
    """The values, lists among them as tuples."""
    return [_tuple(value) for value in values]


def _deep(value: Any) -> Any:
    return tuple(map(_deep, value)) if isinstance(value, list) else value


def _each(convert: Callable[[Any], Any]) -> Callable[[_Arguments], _Arguments]:
    return lambda arguments: [convert(argument) for argument in arguments]


def _at(position: int, convert: Callable[[Any], Any]) -> Callable[[_Arguments], _Arguments]:
    return lambda arguments: [convert(one) if n == position else one for n, one in enumerate(arguments)]


def _sets(values: Any) -> Any:
    return [set(value) if isinstance(value, list) and value else {} for value in values]


def _by_number() -> dict[int, Callable[[_Arguments], Any]]:
    """EvalPlus 0.3.1's conversion of each task of MBPP+ that has one."""
    every_argument = (2, 116, 132, 143, 222, 261, 273, 394, 399, 421, 424, 429, 470, 560, 579, 596, 616, 630, 726)
    rules: list[tuple[tuple[int, ...], Callable[[_Arguments], Any]]] = [
        ((*every_argument, 740, 744, 809), _each(_tuple)),
        ((63, 64, 70, 94, 120, 237, 272, 299, 400, 409, 417, 438, 473, 614, 780), _each(_tuples)),
        ((75, 413, 444, 753), _at(0, _tuples)),
        ((106, 750), _at(1, _tuple)),
        ((250, 307, 405, 446, 617, 720, 763, 808), _at(0, _tuple)),
        ((259, 401, 445), _each(lambda argument: tuple(_tuples(argument)))),
        ((278,), _at(0, lambda argument: tuple(_tuples(argument)))),
        ((580, 615, 791), _deep),
        ((115,), _at(0, _sets)),
        ((124,), lambda arguments: [float(arguments[0]), complex(arguments[1])]),
        ((252,), _at(0, complex)),
        ((722,), _at(0, lambda table: {key: _tuple(value) for key, value in table.items()})),
    ]
    return {number: convert for numbers, convert in rules for number in numbers}


_CONVERSIONS = _by_number()
