"""Whether every test of another commit is here, and none is skipped or slow that was not: scripts/same_tests.sh.

As a pytest plugin it writes what is collected; as a program it collects both trees, each with its own files.
Tests are known by their names with classes and parameters, whatever file they are in.
"""

from __future__ import annotations

import collections
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

_FILE = "SAME_TESTS_FILE"

Tests = dict[str, list[list[str]]]
"""Name -> the marks of each test that has it."""


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Writes the collected tests; does nothing where nobody has asked."""
    from _pytest.skipping import evaluate_skip_marks

    found: Tests = collections.defaultdict(list)
    for item in session.items:
        marks = {mark.name for mark in item.iter_markers()} & {"slow", "gpu"}
        if evaluate_skip_marks(item) is not None:
            marks.add("skipped")
        found[item.nodeid.partition("::")[2]].append(sorted(marks))
    if _FILE in os.environ:
        Path(os.environ[_FILE]).write_text(json.dumps(found))


def collect(tree: Path) -> Tests:
    """The tests of a tree, imported from its own files."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copy(__file__, folder / "same_tests_plugin.py")
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "same_tests_plugin", "-n", "0"]
        command = command if _has_xdist() else command[:-2]
        done = subprocess.run(
            command,
            cwd=tree,
            env={**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{tree}", _FILE: str(folder / "tests.json")},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise SystemExit(f"{done.stdout[-4000:]}{done.stderr}\nerror: the tests of {tree} cannot be collected.")
        return json.loads((folder / "tests.json").read_text())


def _has_xdist() -> bool:
    import importlib.util

    return importlib.util.find_spec("xdist") is not None


def differences(before: Tests, after: Tests) -> list[str]:
    """A line for each test that is lost, and for each that has a mark which it had not; empty where there is none."""
    found = []
    for name, old in sorted(before.items()):
        new = after.get(name, [])
        if len(new) < len(old):
            found.append(f"lost: {name}" + (f" ({len(old) - len(new)} of {len(old)})" if len(old) > 1 else ""))
        for mark in ("slow", "skipped", "gpu"):
            counts = [sum(mark in marks for marks in tests) for tests in (old, new)]
            if counts[1] > counts[0] and len(new) <= len(old):
                found.append(f"now {mark}: {name}")
    return found


def main(revision: str) -> int:
    """0 where nothing is lost, 1 where something is; leaves with 2 where there is no such commit."""
    from tests.helpers.commits import tree_of  # not above: as a plugin this file is alone in another commit's tree
    from tests.helpers.paths import ROOT

    with tree_of(revision) as tree:
        before, after = collect(tree), collect(ROOT)
    found = differences(before, after)
    counts = [sum(map(len, tests.values())) for tests in (before, after)]
    new = sum(max(0, len(tests) - len(before.get(test, []))) for test, tests in after.items())
    print("\n".join([*found, f"{revision}: {counts[0]} tests; here: {counts[1]}, of which {new} are new"]))
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
