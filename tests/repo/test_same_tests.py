"""What scripts/same_tests.sh calls lost, and newly skipped or slow."""

from __future__ import annotations

import pytest

from tests.helpers.paths import ROOT
from tests.helpers.same_tests import collect, differences, main

BEFORE = {"a": [[]], "b[1]": [["slow"]], "b[2]": [[]], "twice": [[], ["skipped"]]}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"new": [["slow"]], "b[1]": [[]]}, []),
        ({"a": []}, ["lost: a"]),
        ({"twice": [[]]}, ["lost: twice (1 of 2)"]),
        ({"b[2]": [["slow"]]}, ["now slow: b[2]"]),
        ({"twice": [["skipped"], ["skipped"]]}, ["now skipped: twice"]),
        ({"a": [["gpu"]], "b[2]": []}, ["now gpu: a", "lost: b[2]"]),
    ],
)
def test_what_another_commit_had_and_this_one_lacks(changes, expected):
    assert differences(BEFORE, {name: tests for name, tests in {**BEFORE, **changes}.items() if tests}) == expected


SAMPLE = """
import sys

import pytest


@pytest.mark.parametrize("n", [1, 2])
def test_plain(n): ...


class TestClass:
    pytestmark = pytest.mark.slow

    @pytest.mark.skipif(sys.version_info > (3, 0), reason="always")
    def test_inside(self): ...

    @pytest.mark.skipif(sys.version_info < (3, 0), reason="never")
    def test_runs(self): ...
"""


def test_a_tree_is_collected_by_names_whatever_its_files(tmp_path):
    (tmp_path / "tests" / "deep").mkdir(parents=True)
    (tmp_path / "tests" / "deep" / "test_sample.py").write_text(SAMPLE)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow\n")
    assert collect(tmp_path) == {
        "test_plain[1]": [[]],
        "test_plain[2]": [[]],
        "TestClass::test_inside": [["skipped", "slow"]],
        "TestClass::test_runs": [["slow"]],
    }
    (tmp_path / "tests" / "test_broken.py").write_text("import nothing_of_this_name\n")
    with pytest.raises(SystemExit, match="cannot be collected"):
        collect(tmp_path)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs the repository")
def test_a_commit_that_is_not_there_is_named(capsys):
    with pytest.raises(SystemExit) as error:
        main("no-such-commit")
    assert error.value.code == 2
    assert "there is no commit 'no-such-commit' here" in capsys.readouterr().err
