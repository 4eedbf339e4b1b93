r"""The grader `math`: the last ``\boxed{...}`` after the thinking, or the line behind ``####``, against the answer.

Rules of our own come first: numbers with units, text, choices, lists, sets, intervals, values with names. What they do
not decide, math-verify does (https://github.com/huggingface/Math-Verify), on single expressions.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field

from renio_megatron.data.sources.columns import behind_hashes
from renio_megatron.evaluation.graders.equality import MathVerify
from renio_megatron.evaluation.graders.final_answer import after_thinking, boxed, last_boxes
from renio_megatron.evaluation.graders.grader import CUT, NO_ANSWER, UNCLOSED_THINKING, Completion, Grader
from renio_megatron.evaluation.graders.latex import clean, compact, is_balanced
from renio_megatron.evaluation.graders.quantities import parse_quantity, same_quantity
from renio_megatron.evaluation.graders.structures import Parts, parts_of, same_parts, without_name
from renio_megatron.types import Record, Verdict

MAX_LENGTH = 1000
"""Characters of an answer; a longer one is no final answer, and would keep a parser busy."""
MAX_SECONDS = 10.0
"""After which nothing more is asked of math-verify about an answer of several parts."""
_MAX_DEPTH = 3

_CHOICE = re.compile(
    r"(?:\\text\s*\{)?\s*(?:option|choice|answer)?\s*(?:\(([A-Ja-j])\)|([A-J])(?=\s*(?:[).:]|\\text|$|\})))"
    r"\s*[).:]?\s*\}?(?P<rest>.*)",
    re.DOTALL | re.IGNORECASE,
)
_EXPECTED_CHOICE = re.compile(r"(?:\\text\s*\{)?\s*\(?([A-J])\)?\s*\.?\s*\}?")
_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_WORDS = re.compile(r"[^\W\d_]{2,}(?:[\s'\-]+[^\W\d_]+)*[.!]?")
_BASE = re.compile(r"\s*([0-9A-Za-z]+)_\s*\{?\s*(\d+|\\text\s*\{[a-z]+\})\s*\}?\s*")
_COMMON_TERMS = frozenset(
    ["sin", "cos", "tan", "cot", "sec", "csc", "log", "ln", "exp", "pi", "mod", "max", "min", "gcd", "lcm"]
)


@dataclass
class Comparison:
    """Compares an answer with the right one.

    Attributes:
        verifier: decides what the rules leave open.
        reason: what the verifier said where it could not tell.
    """

    verifier: MathVerify
    reason: str = field(default="", init=False)
    _deadline: float = field(default=0.0, init=False)

    def same(self, expected: str, given: str) -> bool:
        """Whether a given answer is the expected one; both as written, with or without dollars."""
        self.reason = ""
        if max(len(expected), len(given)) > MAX_LENGTH:  # before anything that looks at each character
            return False
        sides = clean(expected), clean(given)
        self._deadline = time.monotonic() + MAX_SECONDS
        return all(sides) and self._same(*sides, _MAX_DEPTH)

    def _same(self, expected: str, given: str, depth: int) -> bool:
        if compact(expected) == compact(given):
            return True
        for rule in (_same_choice, _same_base, _same_number, _same_text):
            if (verdict := rule(expected, given)) is not None:
                return verdict
        if (verdict := self._same_parts(expected, given, depth)) is not None:
            return verdict
        (value, name), (other, other_name) = without_name(expected), without_name(given)
        if (name is not None or other_name is not None) and depth > 0:
            # One name may be missing, or be another one for the same function; never a name against an equation.
            is_equation = (name is None and "=" in expected) or (other_name is None and "=" in given)
            if not is_equation:
                return self._same(value, other, depth - 1)
        if time.monotonic() > self._deadline:  # a list of many parts, each of which takes long
            self.reason = f"the comparison took more than {MAX_SECONDS:g} s"
            return False
        equality = self.verifier.same(expected, given)
        self.reason = equality.reason or self.reason
        return bool(equality.same)

    def _same_parts(self, expected: str, given: str, depth: int) -> bool | None:
        """Whether answers of several parts are the same; None where neither has parts."""
        sides = [parts_of(without_name(text)[0] if _is_set_of_values(text) else text) for text in (expected, given)]
        if not any(sides) or depth == 0:
            return None
        one, other = (side or Parts("list", (text,)) for side, text in zip(sides, (expected, given), strict=True))
        if {one.kind, other.kind} <= {"vector"}:
            return None  # math-verify knows matrices
        return same_parts(one, other, lambda left, right: self._same(clean(left), clean(right), depth - 1))


def _is_set_of_values(text: str) -> bool:
    r"""Whether a named answer is one name of a set, an interval or a tuple, as in ``x \in [0, 1]``."""
    value, name = without_name(text)
    return name is not None and value[:1] in ("[", "(", "]", "\\")


def _same_choice(expected: str, given: str) -> bool | None:
    """Whether a given answer names the expected choice, with or without what the choice says."""
    right = _EXPECTED_CHOICE.fullmatch(expected)
    if right is None:
        return None
    match = _CHOICE.fullmatch(given)
    if match is None:
        return None
    letter = match[1] or match[2]
    return letter.upper() == right[1] if match[1] or letter.isupper() else None


def _same_base(expected: str, given: str) -> bool | None:
    """Whether numerals with a base are the same; a numeral without a base is none of another base."""
    sides = [_BASE.fullmatch(text) for text in (expected, given)]
    if not any(sides):
        return None
    one, other = sides
    if one is None or other is None:
        return False if parse_quantity(expected) or parse_quantity(given) else None
    return one.groups() == other.groups()


def _same_number(expected: str, given: str) -> bool | None:
    """Whether two quantities are the same; None where either is none, its name left out."""
    sides = [parse_quantity(without_name(text)[0]) for text in (expected, given)]
    if sides[0] is None or sides[1] is None:
        return None
    return same_quantity(sides[0], sides[1])


def _plain_text(text: str) -> str | None:
    """The words of an answer that is text; None where it is mathematics."""
    words = _TEXT.sub(r" \1 ", text)
    words = " ".join(words.split())
    is_text = _TEXT.search(text) is not None and not re.search(r"[\\^_=<>+]", words)
    if not is_text and not _WORDS.fullmatch(words):
        return None
    if not re.search(r"[^\W\d_]", words):
        return None
    if not is_text and _COMMON_TERMS.intersection(words.lower().split()):
        return None
    return re.sub(r"^(?:the|a|an) |[\"'.!]", "", words.lower()).strip()


def _same_text(expected: str, given: str) -> bool | None:
    """Whether two texts are the same, capitals aside; None unless both are text."""
    sides = _plain_text(expected), _plain_text(given)
    if None in sides or any(parts_of(text) is not None for text in (expected, given)):
        return None
    return sides[0] == sides[1]


def _expected_answer(answer: str) -> str:
    """The answer itself, where the record's is a worked one with a box or ``####``."""
    line = behind_hashes(answer)
    if line is not None:
        return line
    return boxed(answer) or answer


def _given_answers(text: str) -> list[str] | None:
    """What could be meant as the final answer: the last box, and the last boxes as a list; None without an answer."""
    group = last_boxes(text)
    if group:
        return [group[-1]] if len(group) == 1 else [group[-1], ", ".join(group)]
    line = behind_hashes(text)
    if not line:
        return None
    statement = re.sub(r"\s+\(.*", "", line)  # without a remark in brackets
    return [statement] if statement == line else [statement, line]


def math_grader(verifier: MathVerify | None = None) -> Grader:
    """The grader `math`.

    Args:
        verifier: what decides about expressions; None: a worker with the usual limit.
    """
    comparison = Comparison(verifier or MathVerify())

    def grade(completion: Completion, record: Record) -> Verdict:
        text = after_thinking(completion)
        if text is None:
            return Verdict(False, None, UNCLOSED_THINKING)
        candidates = _given_answers(text)
        if candidates is None:
            return Verdict(False, None, NO_ANSWER if completion.finished else CUT)
        expected = _expected_answer(record.answer or "")
        reason = ""
        for candidate in candidates:
            if comparison.same(expected, candidate):
                return Verdict(True, candidate)
            reason = reason or comparison.reason
        return Verdict(False, candidates[0], reason or _too_long(candidates[0]))

    def same_answer(one: str, other: str) -> bool:
        return comparison.same(one, other) or comparison.same(other, one)

    return Grader("math", grade, problem_of, same_answer)


def _too_long(answer: str) -> str:
    return f"an answer of more than {MAX_LENGTH} characters" if len(answer) > MAX_LENGTH else ""


def problem_of(record: Record) -> str | None:
    """Why the grader cannot use a record's answer; None where it can."""
    answer = _expected_answer(record.answer or "")
    shown = repr(answer if len(answer) <= 60 else answer[:57] + "...")
    if len(answer) > MAX_LENGTH:
        return f"the answer {shown} has {len(answer)} characters, more than {MAX_LENGTH}, and no box"
    if not clean(answer):
        return f"the answer {shown} holds nothing"
    if not is_balanced(answer):
        return f"the answer {shown} has braces that do not match"
    return None
