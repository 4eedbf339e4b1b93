"""Texts that would keep a careless reader busy: every grader ends, and soon."""

from __future__ import annotations

import time

import pytest

from renio_megatron.evaluation.graders import math as math_module
from renio_megatron.evaluation.graders.equality import Equality
from renio_megatron.evaluation.graders.grader import Completion
from renio_megatron.evaluation.graders.math import math_grader
from renio_megatron.evaluation.graders.number import grade_number
from renio_megatron.types import Record

LIMIT_S = 5.0
LONG = 100_000
HOSTILE = {
    "letters behind a number": r"\boxed{5 " + "a" * 900 + "!}",
    "words behind a number": r"\boxed{5 " + "ab. " * 220 + "!}",
    "carets": r"\boxed{5 cm" + "^  { " * 150 + "!}",
    "units": r"\boxed{5 " + "cm^2 " * 150 + "?}",
    "braces": r"\boxed{" + "{" * 450 + "1" + "}" * 450 + "}",
    "deep braces": r"\boxed{" + "{" * LONG + "1" + "}" * LONG + "}",
    "many boxes": r"\boxed{1}, " * (LONG // 10),
    "open boxes": r"\boxed{" * (LONG // 7),
    "bare boxes": r"\boxed" * (LONG // 6),
    "spaces": r"\boxed{1" + " " * LONG + "2}",
    "dots": r"\boxed{1" + ". " * 450 + "x}",
    "digits": "1" * LONG,
    "digits with spaces": "1 " * (LONG // 2),
    "commas": "1,111" * (LONG // 5),
    "slashes": "1/1" * (LONG // 3),
    "hashes": "####" * (LONG // 4) + "5",
    "fractions": r"\frac" * (LONG // 5),
    "thoughts": "<think></think>" * (LONG // 15),
    "names": r"\boxed{" + "x = " * 240 + "1}",
    "list": r"\boxed{" + "1, " * 300 + "2}",
    "brackets": r"\boxed{" + "([" * 240 + "}",
    "inequalities": r"\boxed{" + "x < " * 240 + "1}",
    "texts": r"\boxed{" + r"\text{a} " * 100 + "!}",
    "both signs": r"\boxed{" + r"1 \pm " * 150 + "1}",
}


class Never:
    def same(self, expected: str, given: str) -> Equality:
        return Equality(False)


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("answer", ["5", "x + 1", "1, 2, 3", "(0, 1)"])
def test_it_is_graded_soon(name, answer):
    completion, record = Completion(HOSTILE[name]), Record("", answer=answer)
    started = time.process_time()
    grade_number(completion, record)
    math_grader(Never()).grade(completion, record)  # type: ignore[arg-type]
    assert time.process_time() - started < LIMIT_S


def test_many_parts_that_take_long_are_given_up(monkeypatch):
    clock, asked = [0.0], []

    class Slow:
        def same(self, expected: str, given: str) -> Equality:
            asked.append((expected, given))
            clock[0] += 4.0
            return Equality(None, "too slow")

    monkeypatch.setattr(math_module.time, "monotonic", lambda: clock[0])
    answer = ", ".join(f"x^{number}+1" for number in range(20))
    given = ", ".join(f"y^{number}+1" for number in range(20))
    verdict = math_grader(Slow()).grade(Completion(rf"\boxed{{{given}}}"), Record("", answer=answer))  # type: ignore[arg-type]
    assert verdict.correct is False and verdict.reason == "the comparison took more than 10 s"
    assert len(asked) == 3
