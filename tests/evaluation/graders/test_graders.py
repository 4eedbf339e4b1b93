"""Which grader a run takes, answers that it cannot read, and graders of one's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from renio_megatron.config import DataConfig
from renio_megatron.data.sources import build_source
from renio_megatron.data.sources.source import Source
from renio_megatron.errors import ConfigError, DataError
from renio_megatron.evaluation.graders import Completion, Grader, Verdict, build_grader, grader_name
from renio_megatron.evaluation.graders.generated import grade_modchain
from renio_megatron.types import Record


@pytest.fixture
def records(tmp_path: Path) -> Any:
    """Answers -> (settings, source) of a file with them."""

    def made(*answers: str | None, **settings: Any) -> tuple[DataConfig, Source]:
        path = tmp_path / "records.jsonl"
        path.write_text("".join(json.dumps({"problem": "?", "answer": answer}) + "\n" for answer in answers))
        config = DataConfig(source="jsonl", path=str(path), **settings)
        return config, build_source(config, "train")

    return made


def verdict(grader: Grader | None, text: str, answer: str) -> bool | None:
    assert grader is not None
    return grader.grade(Completion(text), Record("", answer=answer)).correct


def test_numbers_are_graded_by_number_and_anything_else_by_math(records):
    assert grader_name(*records("1", "2 cm", "1/2")) == ("number", None)
    config, source = records("1", "x + 1", "2")
    name, notice = grader_name(config, source)
    assert name == "math" and notice is not None
    assert "records.jsonl:2: the answer 'x + 1' is no number" in notice and "\\boxed{}" in notice
    grader = build_grader(config, source)
    assert verdict(grader, r"\boxed{1+x}", "x + 1") and not verdict(grader, "1", "1")


def test_a_grader_that_is_named_is_taken(records):
    assert verdict(build_grader(*records("1", "2")), "It is 1.", "1")
    assert not verdict(build_grader(*records("1", "2", grader="math")), "It is 1.", "1")
    assert build_grader(*records("1", grader="none")) is None
    assert build_grader(*records(None, None)) is None


@pytest.mark.parametrize(
    ("grader", "answers", "words"),
    [
        (
            "number",
            ("1", "x + 1", "y"),
            ["records.jsonl:2: the answer 'x + 1' is no number", "2 of 3", "data.grader=math"],
        ),
        ("math", ("1", r"\frac{1}{2"), ["records.jsonl:2: ", "braces", "data.grader=none"]),
        (None, ("1", r"\frac{1}{2"), ["records.jsonl:2: ", "braces"]),
    ],
)
def test_answers_that_cannot_be_read_are_refused_at_the_start(records, grader, answers, words):
    with pytest.raises(DataError) as caught:
        build_grader(*records(*answers, grader=grader))
    assert all(word in str(caught.value) for word in words), caught.value


def test_settings_that_fit_no_grader_are_refused(records):
    with pytest.raises(ConfigError, match=r"data\.answer_key"):
        build_grader(*records(None, grader="number"))
    with pytest.raises(ConfigError, match=r"data\.source=reasoning_gym"):
        build_grader(*records("1", grader="reasoning_gym"))
    with pytest.raises(ConfigError, match=r"number, math, .*module:function.*; got 'numbers'"):
        DataConfig(grader="numbers")


@pytest.mark.parametrize(
    ("text", "finished", "right"),
    [
        ("+52*36-88", True, True),
        ("+52*36-88", False, False),
        ("+52*36-87", True, False),
        ("+52*36-88<pad>", True, False),  # a padding token that was drawn is not invisible
        ("+52*36-88^", True, False),
        ("8+", True, False),
        ("", True, False),
    ],
)
def test_modchain_reads_the_last_character(text, finished, right):
    assert grade_modchain(Completion(text, finished), Record("", answer="8")).correct is right


OWN = """
from renio_megatron.evaluation.graders import Completion, Verdict

def grade(completion, record):
    if record.metadata["level"] > 3:
        return None
    if completion.text == "odd":
        return "yes"
    return Verdict(completion.text == record.answer, completion.text, "by own rules")

def is_right(completion, record):
    return completion.text == record.answer

number = 5
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own_grader_of_a_test.py").write_text(OWN)
    (tmp_path / "broken_grader.py").write_text("raise RuntimeError('not today')")
    monkeypatch.chdir(tmp_path)
    return tmp_path


class TestOfOnesOwn:
    """A grader named by its place."""

    @pytest.mark.parametrize("place", ["own_grader_of_a_test:grade", "own_grader_of_a_test.py:grade", "{own}:grade"])
    def test_by_module_and_by_file(self, records, own, place):
        place = place.format(own=own / "own_grader_of_a_test.py")
        grader = build_grader(*records("a", "b", grader=place))
        assert grader is not None and grader.name == place
        assert grader.grade(Completion("a"), Record("", answer="a", metadata={"level": 1})) == Verdict(
            True, "a", "by own rules"
        )
        assert grader.grade(Completion("a"), Record("", answer="a", metadata={"level": 9})) == Verdict(None)
        with pytest.raises(DataError, match=r"returned 'yes', which is no Verdict"):
            grader.grade(Completion("odd"), Record("", metadata={"level": 1}))

    def test_a_bool_is_enough_and_answers_are_not_needed(self, records, own):
        grader = build_grader(*records(None, None, grader="own_grader_of_a_test:is_right"))
        assert grader is not None and grader.grade(Completion("a"), Record("", answer="a")) == Verdict(True)

    @pytest.mark.parametrize(
        ("place", "words"),
        [
            ("no_such_module_here:grade", ["'no_such_module_here' cannot be imported", "path/to/file.py:grade"]),
            ("no_such_file.py:grade", ["no_such_file.py", "there is no file"]),
            ("broken_grader.py:grade", ["RuntimeError: not today"]),
            ("own_grader_of_a_test:grad", ["has no function 'grad'", "(completion, record)"]),
            ("own_grader_of_a_test:number", ["has no function 'number'"]),
        ],
    )
    def test_a_place_where_there_is_none_is_refused_at_the_start(self, records, own, place, words):
        with pytest.raises(ConfigError) as caught:
            build_grader(*records("a", grader=place))
        assert all(word in str(caught.value) for word in words), caught.value
