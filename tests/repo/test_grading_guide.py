"""The page about graders: its table is what the grader says, and its grader is run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from renio_megatron.config import DataConfig
from renio_megatron.config.sections.data import GRADERS, SANDBOXES
from renio_megatron.evaluation.graders import Completion, build_grader
from renio_megatron.evaluation.graders.math import MAX_LENGTH, math_grader
from renio_megatron.types import Record, Verdict
from tests.helpers.paths import ROOT

PAGE = (ROOT / "docs" / "guides" / "grading.md").read_text()
ROWS = re.findall(r"^\| `(.+?)` \| `(.+?)` \| (right|wrong)\b", PAGE, flags=re.MULTILINE)


@pytest.fixture(scope="module")
def grader():
    return math_grader()


@pytest.mark.parametrize(("answer", "box", "verdict"), ROWS)
def test_a_row_is_what_the_grader_says(grader, answer, box, verdict):
    found = grader.grade(Completion(rf"So \boxed{{{box}}}."), Record("", answer=answer))
    assert found.correct is (verdict == "right")


def test_every_grader_has_a_row():
    assert len(ROWS) > 20 and f"more than {MAX_LENGTH} characters" in PAGE
    table = PAGE.partition("| `data.grader` |")[2].partition("\n\n")[0]
    assert {*GRADERS, "none"} <= set(re.findall(r"`([a-z_]+)`", table))
    assert set(re.findall(r"^\| `(\w+)` \|", PAGE.partition("`data.sandbox` is")[2], flags=re.MULTILINE)) == set(
        SANDBOXES
    )


def test_its_own_grader_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    (tmp_path / "my_grader.py").write_text(block)
    monkeypatch.chdir(tmp_path)
    (place,) = re.findall(r"`data\.grader=(my_grader:\w+)`", PAGE)
    grader = build_grader(DataConfig(grader=place), None)  # type: ignore[arg-type]
    assert grader is not None
    record = Record("", answer="4")
    assert grader.grade(Completion("so\n4"), record) == Verdict(True, "4")
    assert grader.grade(Completion("so\n4", finished=False), record) == Verdict(False, "4")
    assert grader.grade(Completion("4"), Record("", answer="4", metadata={"level": 5})).correct is None
