"""Which virtual environment the scripts choose, and which interpreter the second lane finds; nothing is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = [
    pytest.mark.skipif(not (ROOT / "scripts").is_dir(), reason="needs the source tree"),
    pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash"),
]


def interpreter(path: Path, version: str) -> Path:
    """A program that says it is this version of Python, to the scripts' questions."""
    path.parent.mkdir(parents=True, exist_ok=True)
    major, minor = version.split(".")
    path.write_text(
        f"""#!/bin/sh
case "$2" in
    *print*) echo {version} ;;
    *"(3, 12)"*) [ {major}{minor} -ge 312 ] ;;
    *) [ "$1" = --version ] && echo "Python {version}.0" ;;
esac
"""
    )
    path.chmod(0o755)
    return path


def chosen(root: Path, python: Path | None) -> str:
    """Name of the virtual environment."""
    script = f'source "{ROOT}/scripts/environment.sh"; root="{root}"; choose_venv; echo "$venv"'
    environment = {name: value for name, value in os.environ.items() if name != "PYTHON"}
    if python is not None:
        environment["PYTHON"] = str(python)
    done = subprocess.run(["bash", "-euc", script], env=environment, capture_output=True, text=True, check=True)
    return Path(done.stdout.strip()).name


def test_another_interpreter_leaves_the_first_ones_environment_alone(tmp_path):
    old, new = interpreter(tmp_path / "old", "3.11"), interpreter(tmp_path / "new", "3.12")
    root = tmp_path / "root"
    root.mkdir()
    assert chosen(root, None) == chosen(root, old) == chosen(root, new) == ".venv", "the first one"
    interpreter(root / ".venv" / "bin" / "python", "3.11")
    assert chosen(root, None) == chosen(root, old) == ".venv"
    assert chosen(root, new) == ".venv-3.12"
    shutil.rmtree(root / ".venv")
    interpreter(root / ".venv-3.12" / "bin" / "python", "3.12")
    assert chosen(root, new) == ".venv-3.12", "which is there already"
    assert chosen(root, None) == chosen(root, old) == ".venv"


def second_lane(root: Path, path: str = "", home: str = "/none", **environment: str) -> tuple[int, list[str]]:
    """Exit code and lines of scripts/second_lane.sh in a tree whose test.sh only says what it was given."""
    (root / "scripts").mkdir(parents=True, exist_ok=True)
    for name in ("environment.sh", "second_lane.sh"):
        shutil.copy(ROOT / "scripts" / name, root / "scripts")
    (root / "scripts" / "test.sh").write_text('#!/bin/sh\necho "test.sh with $PYTHON: $*"\n')
    (root / "scripts" / "test.sh").chmod(0o755)
    (root / "tests").mkdir(exist_ok=True)
    for name in ("test_doctests.py", "test_training.py"):
        (root / "tests" / name).touch()
    done = subprocess.run(
        [str(root / "scripts" / "second_lane.sh"), "-x"],
        env={"PATH": f"{path}{os.pathsep}/usr/bin:/bin", "HOME": home, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, [*done.stdout.splitlines(), *done.stderr.splitlines()]


FILES = "tests/test_doctests.py tests/test_training.py -x"


@pytest.mark.skipif(Path("/usr/bin/python3.12").exists(), reason="the system has a python3.12 of its own")
def test_the_second_lane_finds_python_and_leaves_out_files_that_are_not_there(tmp_path):
    root, bin_, home = tmp_path / "root", tmp_path / "bin", tmp_path / "home"
    missing = "second lane: left out, there is no Python 3.12 on PATH or under pyenv"
    assert second_lane(root) == (0, [missing])
    pyenv = interpreter(home / ".pyenv" / "versions" / "3.12.1" / "bin" / "python3", "3.12")
    found = (0, ["second lane: Python 3.12.0", f"test.sh with {pyenv}: {FILES}"])
    assert second_lane(root, home=str(home)) == found
    assert second_lane(root, PYENV_ROOT=str(home / ".pyenv")) == found
    shim = bin_ / "python3.12"
    bin_.mkdir()
    shim.write_text("#!/bin/sh\nexit 127\n")
    shim.chmod(0o755)
    assert second_lane(root, path=str(bin_)) == (0, [missing]), "a shim that runs nothing"
    assert second_lane(root, path=str(bin_), home=str(home)) == found
    interpreter(shim, "3.12")
    assert second_lane(root, path=str(bin_), home=str(home))[1][1] == f"test.sh with python3.12: {FILES}"


def test_the_second_lane_needs_no_second_run_where_the_first_is_new_enough(tmp_path):
    interpreter(tmp_path / ".venv" / "bin" / "python", "3.13")
    assert second_lane(tmp_path) == (0, ["second lane: left out, .venv is Python 3.13 already"])
    other = interpreter(tmp_path / "other", "3.14")
    assert second_lane(tmp_path, PYTHON=str(other))[1][1] == f"test.sh with {other}: {FILES}"
