"""Hostile programs in every back end, as this user and as another one; and outside, so that the test can fail."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.evaluation.sandbox import reaching_out
from tests.evaluation.sandbox.programs import CASES
from tests.helpers.paths import ROOT

OTHER_UID = 65533
RUNS = {
    "namespaces": ("self", ["namespaces"]),
    "landlock": ("self", ["landlock"]),
    "outside": ("self", ["control"]),
    "namespaces, another user": ("other", ["namespaces"]),
    "landlock, another user": ("other", ["landlock"]),
    "landlock of Linux 5.13, another user": ("other", ["landlock", "1"]),
    "outside, another user": ("other", ["control"]),
}
"""Name: (user, what the driver is told). Of an older Landlock more is left to the system call filter."""


def as_other() -> dict[str, Any]:
    return {"user": OTHER_UID, "group": OTHER_UID, "extra_groups": []}


def interpreter_of_other() -> str:
    """A Python that the other user may run, and that can read this repository; skips where there is none."""
    if os.geteuid() != 0:
        pytest.skip("only root can run programs as another user")
    needed = "import sys, tests.evaluation.sandbox.driver; assert sys.version_info >= (3, 10)"
    for python in filter(None, (sys.executable, shutil.which("python3", path="/usr/local/bin"), "/usr/bin/python3")):
        try:
            done = subprocess.run(
                [python, "-c", needed], cwd=ROOT, env=environment(), capture_output=True, **as_other()
            )
        except OSError:
            continue
        if done.returncode == 0:
            return python
    pytest.skip(f"neither {sys.executable} nor the system's python3 with this repository is readable for another user")


def environment() -> dict[str, str]:
    return {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "LANG": "C.UTF-8"}


@pytest.fixture(scope="module")
def drivers() -> Iterator[dict[str, subprocess.Popen[str] | str]]:
    """All runs side by side, since programs mostly wait; where a run cannot be, the reason."""
    found: dict[str, subprocess.Popen[str] | str] = {}
    for name, (who, told) in RUNS.items():
        python, options = sys.executable, {}
        if who == "other":
            try:
                python, options = interpreter_of_other(), as_other()
            except pytest.skip.Exception as reason:
                found[name] = str(reason)
                continue
        command = [python, "-m", "tests.evaluation.sandbox.driver", *told]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        found[name] = subprocess.Popen(command, cwd=ROOT, env=environment(), **pipes, **options)
    yield found
    for driver in found.values():
        if not isinstance(driver, str):
            driver.kill()
            driver.wait()


def findings(drivers: dict[str, subprocess.Popen[str] | str], name: str) -> dict[str, list[str]]:
    driver = drivers[name]
    if isinstance(driver, str):
        pytest.skip(driver)
    output, errors = driver.communicate(timeout=240)
    assert driver.returncode == 0, errors[-3000:]
    found = json.loads(output)
    if "problem" in found:
        pytest.skip(found["problem"])
    return found


@pytest.mark.parametrize("name", [name for name in RUNS if "outside" not in name])
def test_nothing_gets_out(drivers, name):
    found = findings(drivers, name)
    got_out = {case: marks for case, marks in found.items() if marks}
    assert not got_out, "\n".join(["", *(f"{case}: {marks}" for case, marks in got_out.items())])
    cases = reaching_out.CASES if "Linux" in name else CASES
    assert found.keys() == cases.keys() | {"later"}


@pytest.mark.parametrize("name", [name for name in RUNS if "outside" in name])
def test_outside_the_same_programs_leave_marks(drivers, name):
    found = findings(drivers, name)
    may_be_refused = {"new_namespaces", "ptrace", "read_memory"}  # by the kernel's settings, or a container's
    assert not [case for case, marks in found.items() if not marks and case not in may_be_refused]
    assert len(found) > 25
