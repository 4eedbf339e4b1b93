from fractions import Fraction

import pytest

from renio_megatron.config import DataConfig
from renio_megatron.evaluation.graders import build_grader
from renio_megatron.evaluation.graders.math import boxed, find_number, grade_number, parse_number
from renio_megatron.types import Prompt, Rollout


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
        ("18.", Fraction(18)),
        ("3/0", None),
        ("3 apples", None),
        ("2x", None),
        ("(3, 5)", None),
        ("9" * 5000, None),
    ],
)
def test_parse_number(text, number):
    assert parse_number(text) == number


def test_boxed_is_the_last_and_balanced():
    assert boxed(r"\boxed{1} then \boxed{\frac{a}{b}} end") == r"\frac{a}{b}"
    assert boxed(r"\boxed{") is None
    assert boxed("none") is None


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("She has 42 apples.", "42", True),
        ("She has 42 apples, not 43.", "42", False),
        ("48/2 = 24 and 48+24 = 72\n#### 72", "Natalia sold ... 72 clips.\n#### 72", True),
        ("#### 71", "12 of 72\n#### 72", False),
        ("0.5", "1/2", True),
        ("so it is 1/3", "0.3333", False),
        (r"\boxed{42}. I checked it 3 times.", "42", True),
        (r"42, or \boxed{41}", "42", False),
        (r"\boxed{x = 1,000 \text{ km}}", "1000", True),
        (r"\boxed{-\frac{1}{2}}", "-0.5", True),
        (r"\boxed{(3, 5)}", "5", False),
        (r"\boxed{\$18.00}", "18", True),
        (r"\boxed{ x+1 }", "x + 1", True),
        (r"\boxed{x+2}", "x + 1", False),
        ("it is x + 1", "x + 1", False),
        ("-7", "7", False),
        ("7", "-7", False),
        ("1" * 5000, "7", False),
        ("", "7", False),
    ],
)
def test_grade_number(text, answer, right):
    assert grade_number(text, answer) is right


class _Characters:
    def decode(self, token_ids, *, skip_special_tokens):
        return "".join(map(chr, token_ids))


class _Source:
    name, grader, has_answers, score = "jsonl", "number", True, None


@pytest.mark.parametrize(
    ("text", "finished", "right"),
    [
        ("it is 42|", True, True),
        ("it is 42", False, False),  # cut: 42 may be a number of the working
        (r"\boxed{42}", False, True),
        ("it is 4|", True, False),
    ],
)
def test_cut_completions_need_a_box(text, finished, right):
    grader = build_grader(DataConfig(source="jsonl", path="x"), _Source(), _Characters())
    rollout = Rollout(Prompt(0, (1,), (1,), answer="42"), tuple(map(ord, text)), finished=finished)
    assert grader(rollout) is right
