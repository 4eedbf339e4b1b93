"""Detection of a file's problem, solution and answer columns, and conversion of answers to text."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from decimal import Decimal, InvalidOperation
from typing import Any

from renio_megatron.config import DataConfig
from renio_megatron.errors import DataError

ALIASES: dict[str, tuple[str, ...]] = {
    "problem_key": ("problem", "question", "prompt", "instruction", "query", "messages", "conversations"),
    "solution_key": ("solution", "response", "completion", "rationale", "generated_solution"),
    "answer_key": (
        *("answer", "final_answer", "expected_answer", "ground_truth", "target"),
        "reward_model.ground_truth",
    ),
}
"""Common names of each column, case-insensitive. They are searched where the setting has its default, the first of
them, and the file has no such column."""

_TURNS = "completion"
"""A column of solutions that may be a list of one turn, as TRL has it."""
_SCIENTIFIC = re.compile(r"\s*[+-]?(?:\d+\.?\d*|\.\d+)[eE][+-]?\d{1,3}\s*")
_NO_NUMBERS = ("nan", "inf", "-inf", "+inf", "infinity", "-infinity")


def resolve_columns(
    config: DataConfig, names: Sequence[str], where: str, is_text: Callable[[str], bool]
) -> tuple[DataConfig, list[str]]:
    """The settings with the column names of the file, and a sentence for each that differs from the setting.

    An ambiguous solution or answer column, or one that is not text, is left out with a sentence: not every run needs
    them.

    Args:
        config: the settings.
        names: all column names of the file's records, as `column_names` gives them.
        where: the file, for messages.
        is_text: whether a column holds text or numbers.

    Raises:
        DataError: two columns could be the problem.
    """
    changed: dict[str, Any] = {}
    told = []
    given = {config.problem_key, config.solution_key, config.answer_key, config.teacher_key, config.teacher_prompt_key}
    for setting, aliases in ALIASES.items():
        wanted = getattr(config, setting)
        if wanted != aliases[0] or wanted in names:
            continue
        found = [name for name in names if name.lower() in aliases and name not in given]
        texts = [name for name in found if is_text(name)]
        if setting == "problem_key":
            found = texts or found  # conversations where there is no text
        elif setting == "solution_key" and not texts:
            found = [name for name in found if name.lower() == _TURNS]
        else:
            found = texts
        if len(found) > 1:
            problem = (
                f"{where}: there is no column {wanted!r}, and {', '.join(map(repr, found))} could be meant. Set "
                f"data.{setting} to the right one."
            )
            if setting == "problem_key":
                raise DataError(problem)
            told.append(problem)
        elif found:
            changed[setting] = found[0]
            told.append(
                f"{where}: the {setting.removesuffix('_key')} is read from {found[0]!r}, a usual name for it; "
                f"data.{setting} says otherwise."
            )
    return replace(config, **changed), told


def column_names(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Names of all columns, in order of appearance; of those in a column of objects `column.name`.

    >>> column_names([{"a": 1, "b": {"c": 2}}, {"d": None}])
    ['a', 'b', 'b.c', 'd']
    """
    found: dict[str, None] = {}
    for row in rows:
        for name, value in row.items():
            found[name] = None
            if isinstance(value, Mapping):
                found.update(dict.fromkeys(f"{name}.{inner}" for inner in value))
    return list(found)


def value_of(row: Mapping[str, Any], key: str) -> Any:
    """The value of a column, or of `column.name` in a column of objects; None where there is none.

    >>> value_of({"a": {"b": 2}}, "a.b"), value_of({"a.b": 1}, "a.b"), value_of({}, "a.b")
    (2, 1, None)
    """
    if key in row:
        return row[key]
    outer, dot, inner = key.partition(".")
    within = row.get(outer) if dot else None
    return value_of(within, inner) if isinstance(within, Mapping) else None


def behind_hashes(text: str) -> str | None:
    """The line behind the last ``####``, or the next line where nothing follows on the same; None without hashes.

    >>> behind_hashes("... 72 #### 72\\n\\nThis took 3 steps."), behind_hashes("####\\n5"), behind_hashes("5")
    ('72', '5', None)
    """
    _, mark, after = text.rpartition("####")
    if not mark:
        return None
    return next((line.strip() for line in after.splitlines() if line.strip()), "")


def answer_text(row: Mapping[str, Any], key: str, where: str) -> str | None:
    """A record's right answer as text; numbers in full digits.

    >>> answer_text({"a": 1e-05}, "a", "here"), answer_text({"a": "2.50e2"}, "a", "here"), answer_text({}, "a", "here")
    ('0.00001', '250', None)

    Raises:
        DataError: it is empty, not a number, or neither text nor a number.
    """
    value = value_of(row, key)
    if value is None:
        return None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = repr(value)
    if not isinstance(value, str):
        raise DataError(f"{where}: column {key!r} must hold text, got {type(value).__name__}.")
    if not value.strip():
        raise DataError(
            f"{where}: the answer ({key!r}) is empty, and no completion could be right. Leave such records out, or "
            "give null to all."
        )
    if value.strip().lower() in _NO_NUMBERS:
        raise DataError(
            f"{where}: the answer ({key!r}) is {value.strip()!r}, which stands for a missing number in many programs. "
            "Leave such records out, or give null to all."
        )
    if _SCIENTIFIC.fullmatch(value):
        try:
            number = Decimal(value.strip())
        except InvalidOperation:
            return value
        text = format(number, "f")
        return text.rstrip("0").rstrip(".") if "." in text else text
    return value
