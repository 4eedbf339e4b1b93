r"""Grading of numeric answers: a boxed answer, a ``#### 42`` line, or the last number of the completion.

No expression is evaluated: numbers are read as exact fractions. Answers that are not plain numbers (``x + 1``) are
compared as text with the boxed answer.
"""

from __future__ import annotations

import re
from fractions import Fraction

_MAX_DIGITS = 200  # longer digit strings are not answers, and Python refuses to convert very long ones
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
_NUMBER = re.compile(rf"(?:(?<![\w)\]}}])-)?(?:{_DIGITS})(?:/(?:{_DIGITS}))?")
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{\s*(-?[0-9.,]+)\s*\}\s*\{\s*([0-9.,]+)\s*\}|([0-9])([0-9]))")
_LATEX_TEXT = re.compile(r"\\(?:text|mathrm|mbox)\s*\{[^{}]*\}")
_LATEX_NOISE = re.compile(r"\\left|\\right|\\[!,;:% ]|[$%]|\\circ|\^\{?\\circ\}?|\\(?=\$)")


def boxed(text: str) -> str | None:
    r"""Contents of the last ``\boxed{...}``, braces balanced; None without one, or where it is not closed.

    >>> boxed(r"so \boxed{1} or rather \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    """
    start = text.rfind(r"\boxed{")
    if start < 0:
        return None
    depth = 0
    for position in range(start + len(r"\boxed"), len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start + len(r"\boxed{") : position]
    return None


def find_number(text: str) -> str | None:
    r"""The last number of a text, cleaned of currency signs and thousands separators; None where there is none.

    A minus belongs to the number unless a digit, a letter or a bracket stands right before it.

    >>> find_number("5-3 makes $1,234.50."), find_number("no"), find_number(r"-\frac{1}{2}"), find_number("7-4")
    ('1234.50', None, '-1/2', '4')
    """
    found = _NUMBER.findall(_plain(text))
    return found[-1].replace(",", "") if found else None


def parse_number(text: str) -> Fraction | None:
    """The number that a text consists of, ignoring currency and percent signs; None where it holds anything else.

    >>> parse_number("$1,200.50"), parse_number("50%"), parse_number("3/0"), parse_number("x + 1")
    (Fraction(2401, 2), Fraction(50, 1), None, None)
    """
    plain = _plain(text).strip().rstrip(".").strip()
    return _fraction(plain.replace(",", "")) if _NUMBER.fullmatch(plain) else None


def grade_number(text: str, answer: str) -> bool:
    r"""Whether the completion's final answer equals `answer`.

    The final answer is the last ``\boxed{...}``, else what follows the last ``####``, else the last number. A worked
    `answer` is read behind its own ``####``.

    >>> grade_number("Half of 84 is $42.00.", "... #### 42"), grade_number(r"\boxed{41}, not 42", "42")
    (True, False)
    """
    expected_text = answer.rpartition("####")[2]
    expected, box = parse_number(expected_text), boxed(text)
    if expected is None:
        return box is not None and "".join(_plain(box).split()) == "".join(_plain(expected_text).split())
    if box is not None:
        return parse_number(_LATEX_TEXT.sub("", box.rpartition("=")[2])) == expected
    found = find_number(text.rpartition("####")[2])
    return found is not None and _fraction(found) == expected


def _plain(text: str) -> str:
    text = text.replace("{,}", ",").replace("\N{MINUS SIGN}", "-")
    text = _LATEX_FRACTION.sub(lambda m: f"{m[1] or m[3]}/{m[2] or m[4]}", text)
    return _LATEX_NOISE.sub("", text)


def _fraction(text: str) -> Fraction | None:
    if len(text) > _MAX_DIGITS:
        return None
    numerator, _, denominator = text.partition("/")
    value = Fraction(denominator or "1")
    return Fraction(numerator) / value if value else None
