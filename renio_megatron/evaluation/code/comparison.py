"""Whether outputs are the expected ones: by EvalPlus's rules, as values of JSON, and as printed text.

All take what a hostile program may have sent, in bounded time, and none raises.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

from renio_megatron.evaluation.code.values import BadValueError, checked_set

_RTOL = 1e-7
_FLOAT_ATOL = 1e-6
_MAX_RANGE = 1_000_000
_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,9})?")
_ERRORS = (TypeError, ValueError, ArithmeticError, RecursionError, MemoryError, BadValueError)


def evalplus_equal(
    expected: Any, got: Any, *, dataset: str, entry_point: str, arguments: Sequence[Any], atol: float
) -> bool:
    """Whether EvalPlus 0.3.1 counts `got` as right: equal, close where floats may be, or right by a task's own rule.

    Two differences are meant: EvalPlus raises its tolerance of 0 to 1e-6 where an expected output is a float, and keeps
    it for all later inputs of the task, so that a verdict hangs on the inputs before it. Here each is judged alone.
    Another: EvalPlus 0.3.1 never lets HumanEval/32 pass, because it forgets to count the inputs that were right.

    >>> evalplus_equal([0.3], [0.1 + 0.2], dataset="mbpp", entry_point="f", arguments=[], atol=0)
    True
    >>> evalplus_equal([1, 2], (1, 2), dataset="mbpp", entry_point="f", arguments=[], atol=0)
    False

    Args:
        expected: the canonical program's output.
        got: the candidate's.
        dataset: `humaneval` or `mbpp`.
        entry_point: the function, by which the special tasks are known.
        arguments: the inputs of this call.
        atol: the task's absolute tolerance.
    """
    try:
        if (dataset, entry_point) == ("humaneval", "find_zero"):
            return abs(_polynomial(arguments[0], got)) <= atol
        special = _SPECIAL.get((dataset, entry_point), _equal)
        if special(expected, got, arguments):
            return True
        if atol == 0 and _is_floats(expected):
            atol = _FLOAT_ATOL
        return atol != 0 and type(got) is type(expected) and _close(expected, got, atol)
    except _ERRORS:
        return False


def _equal(expected: Any, got: Any, arguments: Sequence[Any]) -> bool:
    return bool(got == expected)


def _anything(expected: Any, got: Any, arguments: Sequence[Any]) -> bool:
    return True


def _divisors(expected: Any, got: Any, arguments: Sequence[Any]) -> bool:
    return bool(got == expected or got == 0)


def _pyramid(expected: Any, got: Any, arguments: Sequence[Any]) -> bool:
    """The surface with the second argument as slant height, or as the height of the apex above the base."""
    if got == expected:
        return True
    edge, height = arguments
    slant = math.sqrt((edge / 2) ** 2 + height**2)
    return abs(got - round(edge**2 + 2 * edge * slant)) <= 0


def _digit_distance(expected: Any, got: Any, arguments: Sequence[Any]) -> bool:
    """The distance of the digits one by one; the shorter number may be filled with zeros on the left."""
    if got == expected:
        return True
    texts = [str(number) for number in arguments]
    width = max(map(len, texts))
    pairs = zip(*(text.zfill(width) for text in texts), strict=True)
    return bool(got == sum(abs(int(one) - int(other)) for one, other in pairs))


def _same_members(expected: Any, got: Any, arguments: Sequence[Any]) -> bool:
    return _members(got) == _members(expected)


def _members(value: Any) -> set[Any]:
    if isinstance(value, range) and len(value) > _MAX_RANGE:
        raise BadValueError("a range that is too long")
    return checked_set(value)


def _none_or_not(expected: Any, got: Any, arguments: Sequence[Any]) -> bool:
    found = expected is not None
    return (got if isinstance(got, bool) else got is not None) == found


_SPECIAL: dict[tuple[str, str], Callable[[Any, Any, Sequence[Any]], bool]] = {
    ("mbpp", "are_equivalent"): _anything,
    ("mbpp", "sum_div"): _divisors,
    ("mbpp", "surface_Area"): _pyramid,
    ("mbpp", "digit_distance_nums"): _digit_distance,
    ("mbpp", "similar_elements"): _same_members,
    ("mbpp", "find_char_long"): _same_members,
    ("mbpp", "common_in_nested_lists"): _same_members,
    ("mbpp", "extract_singly"): _same_members,
    ("mbpp", "larg_nnum"): _same_members,
    ("mbpp", "intersection_array"): _same_members,
    ("mbpp", "find_dissimilar"): _same_members,
    ("mbpp", "Diff"): _same_members,
    ("mbpp", "check_str"): _none_or_not,
    ("mbpp", "text_match_three"): _none_or_not,
    ("mbpp", "text_starta_endb"): _none_or_not,
}


def _polynomial(coefficients: Sequence[float], x: float) -> float:
    return sum(coefficient * math.pow(x, power) for power, coefficient in enumerate(coefficients))


def _is_floats(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return bool(value) and all(isinstance(item, float) for item in value)
    return isinstance(value, float)


def _close(expected: Any, got: Any, atol: float) -> bool:
    """Whether numbers, or sequences of them of one shape, are within atol + 1e-7 |expected| of each other."""
    if isinstance(expected, list | tuple):
        return (
            isinstance(got, list | tuple)
            and len(got) == len(expected)
            and all(_close(one, other, atol) for one, other in zip(expected, got, strict=True))
        )
    numbers = (int, float, complex)
    if not isinstance(expected, numbers) or not isinstance(got, numbers):
        return False
    return expected == got or bool(abs(got - expected) <= atol + _RTOL * abs(expected) < math.inf)


def json_equal(expected: Any, got: Any) -> bool:
    """Whether a function's output is the expected value of JSON: tuples count as lists, keys as their texts.

    >>> json_equal([[1, 2]], [(1, 2)]), json_equal({"1": 2}, {1: 2}), json_equal([1], {1}), json_equal(0.3, 0.1 + 0.2)
    (True, True, False, False)
    """
    try:
        if isinstance(expected, list):
            return (
                isinstance(got, list | tuple)
                and len(got) == len(expected)
                and all(json_equal(one, other) for one, other in zip(expected, got, strict=True))
            )
        if isinstance(expected, dict):
            if not isinstance(got, dict) or len(got) != len(expected):
                return False
            named = {_json_key(key): item for key, item in got.items()}
            return named.keys() == expected.keys() and all(json_equal(expected[key], named[key]) for key in named)
        return bool(got == expected)
    except _ERRORS:
        return False


def _json_key(key: Any) -> str:
    if key is None or isinstance(key, bool):
        return {None: "null", True: "true", False: "false"}[key]
    return key if isinstance(key, str) else repr(key)


def text_equal(expected: str, got: str) -> bool:
    r"""Whether printed text is the expected one: line by line, white space at the ends of lines and text left out.

    Lines that differ are compared word by word, numbers as decimals: exactly, but 1.50 is 1.5.

    >>> text_equal("1 2\n", "1 2 \n\n"), text_equal("0.5 yes", "0.50  yes"), text_equal("0.3", "0.30000000000000004")
    (True, True, False)
    """
    lines, others = expected.strip().split("\n"), got.strip().split("\n")
    return len(lines) == len(others) and all(map(_same_line, lines, others))


def _same_line(expected: str, got: str) -> bool:
    if expected.rstrip() == got.rstrip():
        return True
    words, others = expected.split(), got.split()
    return len(words) == len(others) and all(map(_same_word, words, others))


def _same_word(expected: str, got: str) -> bool:
    if expected == got:
        return True
    return bool(_NUMBER.fullmatch(expected) and _NUMBER.fullmatch(got)) and Decimal(expected) == Decimal(got)
