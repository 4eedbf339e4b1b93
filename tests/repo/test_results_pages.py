"""Pages of results name tests: they are there."""

from __future__ import annotations

import re

import pytest

from tests.helpers.paths import ROOT

PAGE = (ROOT / "docs" / "results" / "trouble-cases.md").read_text()
NAMED = sorted(set(re.findall(r"`(test_\w+\.py)::(test_\w+)`", PAGE)))


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_a_named_test_is_there(file: str, name: str) -> None:
    (path,) = (ROOT / "tests").rglob(file)
    assert f"def {name}(" in path.read_text()


def test_every_row_names_one() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| case |")]
    assert len(rows) >= 40
    assert all("`test_" in row or "| the same |" in row for row in rows)
