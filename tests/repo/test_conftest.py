"""What `--fast` takes, and which files are read where only tests marked `alone` are wanted."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace

import pytest

from tests.helpers import warm
from tests.helpers.jobs import python_path

CASES = """
import pytest

def test_plain(): ...

@pytest.mark.slow
def test_slow(): ...

@pytest.mark.matrix(3)
@pytest.mark.parametrize("one", "abcdefgh")
def test_of_a_matrix(one): ...

@pytest.mark.matrix(3)
def test_of_the_whole_matrix(): ...
"""
ALONE = """
import pytest

def test_beside(): ...

@pytest.mark.alone
def test_alone(): ...
"""


@pytest.fixture
def collected(tmp_path):
    """Names that pytest collects with some options; of the two files above and of one that cannot be imported."""
    (tmp_path / "test_cases.py").write_text(CASES)
    (tmp_path / "test_one_alone.py").write_text(ALONE)

    def of(*options):
        command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "no:cacheprovider", "-n", "0"]
        done = warm.run(
            [*command, "--collect-only", "-q", *options, "."],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": python_path()},
            timeout=100,
        )
        return [line.partition("::")[2] for line in done.stdout.splitlines() if "::" in line], done.returncode

    return of


def test_fast_takes_one_case_in_n_and_nothing_that_is_slow(collected):
    cases = [f"test_of_a_matrix[{letter}]" for letter in "abcdefgh"]
    beside = ["test_beside", "test_alone"]
    assert collected() == (["test_plain", "test_slow", *cases, "test_of_the_whole_matrix", *beside], 0)
    assert collected("--fast") == (["test_plain", "test_of_a_matrix[c]", "test_of_a_matrix[f]", *beside], 0)


def test_files_without_a_test_that_is_alone_are_not_imported(collected, tmp_path):
    (tmp_path / "test_broken.py").write_text("raise RuntimeError\n")
    assert collected("-m", "alone and not slow") == (["test_alone"], 0)
    names, code = collected("-m", "not alone")
    assert "test_beside" in names and code != 0


def test_no_name_of_a_test_depends_on_the_order_of_a_set(request):
    """Workers hash differently: they would collect different names, and run nothing."""

    def holds_a_set(value):
        if isinstance(value, (set, frozenset)):
            return len(value) > 1
        inner = (
            (*value, *value.values()) if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
        )
        return any(map(holds_a_set, inner))

    for item in request.session.items:
        for value in getattr(item, "callspec", SimpleNamespace(params={})).params.values():
            assert not (holds_a_set(value) and repr(value)[:10] in item.name), item.nodeid
