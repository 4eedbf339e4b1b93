from __future__ import annotations

import json
from fractions import Fraction

import pytest

from renio_megatron.evaluation.graders.final_answer import boxed
from renio_megatron.evaluation.graders.grader import CUT, NO_ANSWER, UNCLOSED_THINKING, Completion
from renio_megatron.evaluation.graders.number import find_number, grade_number, problem_of, same_answer
from renio_megatron.evaluation.graders.quantities import parse_number
from renio_megatron.types import Record
from tests.helpers.paths import SHARED


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("It costs $1,234.50.", "1234.50"),
        ("first 3, then 4.", "4"),
        ("10-4", "4"),
        ("x = -4", "-4"),
        ("(-4)", "-4"),
        ("\N{MINUS SIGN}4", "-4"),
        ("-$5", "-5"),
        (r"\frac{1}{2}", "1/2"),
        (r"\dfrac34", "3/4"),
        (r"1\frac{4}{5}", "1 4/5"),
        ("it takes 2 1/2 hours", "2 1/2"),
        ("in step 2, 1/2", "1/2"),
        ("a half is .5", ".5"),
        ("1{,}000", "1000"),
        ("between 3,4", "4"),
        ("12,345,678 people", "12345678"),
        ("nothing", None),
        ("", None),
    ],
)
def test_last_number(text, number):
    assert find_number(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("42", Fraction(42)),
        (" $1,200.50 ", Fraction(2401, 2)),
        ("50\\%", Fraction(50)),
        ("-3/6", Fraction(-1, 2)),
        ("2 1/2", Fraction(5, 2)),
        ("18.", Fraction(18)),
        ("3 apples", Fraction(3)),
        ("3/0", None),
        ("2x", None),
        ("(3, 5)", None),
        ("9" * 5000, None),
        ("1e999999999", None),
        (r"10^{999999999}", None),
    ],
)
def test_parse_number(text, number):
    assert parse_number(text) == number


def test_boxed_is_the_last_and_balanced():
    assert boxed(r"\boxed{1} then \boxed{\frac{a}{b}} end") == r"\frac{a}{b}"
    assert boxed(r"\boxed{\{1, 2\}}") == r"\{1, 2\}"
    assert boxed(r"\boxed{4}, as I wrote in \boxed{}") == "4"
    assert boxed(r"\boxed{") is None
    assert boxed("none") is None


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("She has 42 apples.", "42", True),
        ("She has 42 apples, not 43.", "42", False),
        ("48/2 = 24 and 48+24 = 72\n#### 72", "Natalia sold ... 72 clips.\n#### 72", True),
        ("#### 71", "12 of 72\n#### 72", False),
        ("#### 72\n\nThis took 3 steps.", "72", True),
        ("#### 72 (see step 2)", "72", True),
        ("#### 72 apples in 2 boxes", "72", True),
        ("#### 70 + 2 = 72", "72", True),
        ("####\n72", "72", True),
        ("#### $72.00", "72", True),
        ("0.5", "1/2", True),
        ("so it is 1/3", "0.3333", False),
        ("it takes 2 1/2 hours", "2.5", True),
        (r"\boxed{2 1/2}", "2.5", True),
        (r"\boxed{9/5}", r"1\frac{4}{5}", True),
        (r"\boxed{14/5}", r"1\frac{4}{5}", False),
        (r"\boxed{42}. I checked it 3 times.", "42", True),
        (r"42, or \boxed{41}", "42", False),
        (r"\boxed{x = 1,000 \text{ km}}", "1000", True),
        (r"\boxed{\text{The answer is } 42}", "42", True),
        (r"\boxed{-\frac{1}{2}}", "-0.5", True),
        (r"\boxed{(3, 5)}", "5", False),
        (r"\boxed{\$18.00}", "18", True),
        (r"\boxed{x+2}", "2", False),
        ("<think>Is it 3?</think> It is 4.", "4", True),
        ("<think>Is it 4?</think> It is 3.", "4", False),
        ("Is it 3? </think> It is 4.", "4", True),
        ("-7", "7", False),
        ("7", "-7", False),
        ("1" * 5000, "7", False),
        ("", "7", False),
    ],
)
def test_grade_number(text, answer, right):
    assert grade_number(Completion(text), Record("", answer=answer)).correct is right


@pytest.mark.parametrize(
    ("completion", "right", "reason"),
    [
        (Completion("it is 42"), True, ""),
        (Completion("it is 42", finished=False), False, CUT),  # 42 may be a number of the working
        (Completion(r"\boxed{42}", finished=False), True, ""),
        (Completion("#### 42", finished=False), True, ""),
        (Completion("it is so"), False, NO_ANSWER),
        (Completion("<think> it is 42"), False, UNCLOSED_THINKING),
        (Completion("it is 42", in_thinking=True), False, UNCLOSED_THINKING),
        (Completion("so </think> it is 42", in_thinking=True), True, ""),
    ],
)
def test_cut_completions_and_open_thoughts(completion, right, reason):
    verdict = grade_number(completion, Record("", answer="42"))
    assert (verdict.correct, verdict.reason) == (right, reason)


def test_answers_that_are_no_numbers_are_told():
    assert problem_of(Record("", answer="6 * 7 = 42\n#### 42")) is None
    assert problem_of(Record("", answer=r"\frac{1}{2}\text{ cm}")) is None
    assert problem_of(Record("", answer="x + 1")) == "the answer 'x + 1' is no number"


def test_the_same_number_in_two_spellings_is_one_answer():
    assert same_answer("1,000", "1000.0") and same_answer("a", "a")
    assert not same_answer("1,000", "1001") and not same_answer("a", "b")


@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="needs the benchmark files in ../shared/data")
@pytest.mark.parametrize("tail", ["", "\n\nThis took 3 steps.", " (see step 2)"])
def test_all_solutions_of_gsm8k_are_right(tail):
    rows = [json.loads(line) for line in (SHARED / "data" / "gsm8k_test.jsonl").read_text().splitlines()]
    right = [grade_number(Completion(row["answer"] + tail), Record("", answer=row["answer"])).correct for row in rows]
    assert len(rows) == 1319 and all(right)
