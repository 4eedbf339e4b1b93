r"""The grader `number`: a boxed number, the one behind ``####``, or the last number of the completion.

Numbers are read as exact fractions; no expression is evaluated. Source: GSM8K's form of an answer, ``#### 42``.
"""

from __future__ import annotations

import re

from renio_megatron.data.sources.columns import behind_hashes
from renio_megatron.evaluation.graders.final_answer import after_thinking, boxed
from renio_megatron.evaluation.graders.grader import CUT, NO_ANSWER, UNCLOSED_THINKING, Completion
from renio_megatron.evaluation.graders.latex import clean
from renio_megatron.evaluation.graders.quantities import Quantity, parse_quantity, same_quantity
from renio_megatron.evaluation.graders.structures import without_name
from renio_megatron.types import Record, Verdict

_MAX_BOX = 1000
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
_NUMBER = re.compile(
    rf"(?:(?<![\w)\]}}])-)?(?:(?<![0-9.,/])[0-9]+ +[0-9]+/[1-9][0-9]*(?![0-9./])|(?:{_DIGITS})(?:/(?:{_DIGITS}))?)"
)
_LATEX_FRACTION = re.compile(
    r"(?:(?<![0-9.])([0-9]+)\s*)?\\[dt]?frac\s*(?:\{\s*(-?[0-9.,]+)\s*\}\s*\{\s*([0-9.,]+)\s*\}|([0-9])([0-9]))"
)
_LATEX_TEXT = re.compile(r"\\(?:text|mathrm|mbox)\s*\{[^{}]*\}")
_LATEX_NOISE = re.compile(r"\\left|\\right|\\[!,;:% ]|[$%]|\\circ|\^\{?\\circ\}?|\\(?=\$)")


def find_number(text: str) -> str | None:
    r"""The last number of a text, cleaned of currency signs and thousands separators; None where there is none.

    A minus belongs to the number unless a digit, a letter or a bracket stands right before it.

    >>> find_number("5-3 makes $1,234.50."), find_number("no"), find_number(r"-\frac{1}{2}"), find_number("2 1/2")
    ('1234.50', None, '-1/2', '2 1/2')
    """
    found = _numbers(text)
    return found[-1] if found else None


def _numbers(text: str) -> list[str]:
    """All numbers of a text, in order."""
    text = text.replace("{,}", ",").replace("\N{MINUS SIGN}", "-")
    text = _LATEX_FRACTION.sub(lambda m: f"{m[1] + ' ' if m[1] else ''}{m[2] or m[4]}/{m[3] or m[5]}", text)
    return [number.replace(",", "") for number in _NUMBER.findall(_LATEX_NOISE.sub("", text))]


def _in_box(box: str) -> Quantity | None:
    """The number in a box, around which words may stand; None in one that is longer than any number."""
    if len(box) > _MAX_BOX:
        return None
    value, _ = without_name(clean(box))
    return parse_quantity(value) or parse_quantity(clean(_LATEX_TEXT.sub(" ", value)))


def _behind_hashes(line: str) -> str | None:
    """The number that a line behind ``####`` states: the first one, or what its equation ends in."""
    statement = line.partition("(")[0] or line
    found = _numbers(statement.rpartition("=")[2])
    return found[0] if found else None


def expected_number(answer: str) -> Quantity | None:
    r"""The number in a right answer, which may be a worked one with ``####`` or a box; None where it is none.

    >>> expected_number("6 * 7 = 42\n#### 42").value, expected_number(r"\boxed{1\frac{1}{2}}").value
    (Fraction(42, 1), Fraction(3, 2))
    >>> expected_number("x + 1")
    """
    line, box = behind_hashes(answer), boxed(answer)
    return _in_box(answer if line is None and box is None else line or box or "")


def grade_number(completion: Completion, record: Record) -> Verdict:
    r"""The verdict on a completion's final number.

    The final answer is the last ``\boxed{...}``, else what follows the last ``####``, else the last number; a
    completion that was cut has no last number, since it may be one of its working. Thoughts are not read.

    >>> record = Record("", answer="... #### 42")
    >>> grade_number(Completion("Half of 84 is $42.00."), record).correct
    True
    >>> grade_number(Completion(r"\boxed{41}, not 42"), record)
    Verdict(correct=False, answer='41', reason='')
    """
    expected = expected_number(record.answer or "")
    text = after_thinking(completion)
    if text is None:
        return Verdict(False, None, UNCLOSED_THINKING)
    if (box := boxed(text)) is not None:
        given = _in_box(box)
        return Verdict(_same(expected, given), box, "" if given is not None else "the box holds no number")
    if (line := behind_hashes(text)) is not None:
        answer = _behind_hashes(line)
    elif completion.finished:
        answer = find_number(text)
    else:
        return Verdict(False, None, CUT)
    given = None if answer is None else parse_quantity(answer)
    return Verdict(_same(expected, given), answer, NO_ANSWER if answer is None else "")


def _same(expected: Quantity | None, given: Quantity | None) -> bool:
    return expected is not None and given is not None and same_quantity(expected, given)


def problem_of(record: Record) -> str | None:
    """Why the grader cannot use a record's answer; None where it can."""
    if expected_number(record.answer or "") is None:
        return f"the answer {record.answer!r} is no number"
    return None


def same_answer(one: str, other: str) -> bool:
    """Whether two answers are the same number, or the same text."""
    numbers = _in_box(one), _in_box(other)
    return one == other or _same(*numbers) or _same(*reversed(numbers))
