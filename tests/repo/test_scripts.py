"""Which environments the scripts choose, which interpreters the lanes find, and what the lane of torch 2.11 runs.

Nothing is installed. That the versions of both files of constraints fit the project's ranges is tested here, too.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.helpers.paths import ROOT

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
    for name in ("repo/test_doctests.py", "megatron/test_training.py"):
        (root / "tests" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "tests" / name).touch()
    done = subprocess.run(
        [str(root / "scripts" / "second_lane.sh"), "-x"],
        env={"PATH": f"{path}{os.pathsep}/usr/bin:/bin", "HOME": home, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, [*done.stdout.splitlines(), *done.stderr.splitlines()]


FILES = "tests/repo/test_doctests.py tests/megatron/test_training.py -x"


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


PYTEST = """#!/bin/sh
echo "$*"
case "$4" in "not alone"*) exit $BESIDE ;; *) exit $ALONE ;; esac
"""


@pytest.mark.parametrize(
    ("arguments", "beside", "alone", "expected"),
    [
        ([], 0, 0, (0, ["not alone -n 2 --dist loadfile --no-loadscope-reorder", "alone"])),
        (["--fast", "-x"], 0, 5, (0, ["not alone -n 2 {} --fast -x", "alone --fast -x"])),
        (["tests/a.py", "-m", "gpu or slow"], 5, 1, (1, ["not alone and (gpu or slow) -n 2 {} tests/a.py", None])),
        (["-k", "a b"], 2, 1, (2, ["not alone -n 2 {} -k a b", "alone -k a b"])),
        (["-k", "none"], 5, 5, (5, [None, None])),
    ],
)
def test_tests_that_are_timed_run_after_the_others(tmp_path, arguments, beside, alone, expected):
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(PYTEST)
    python.chmod(0o755)
    script = f'source "{ROOT}/scripts/environment.sh"; venv="{tmp_path}"; run_tests "$@"'
    done = subprocess.run(
        ["bash", "-euc", script, "bash", *arguments],
        env={**os.environ, "BESIDE": str(beside), "ALONE": str(alone)},
        capture_output=True,
        text=True,
        check=False,
    )
    code, lines = expected
    said = [line.removeprefix("-m pytest -m ") for line in done.stdout.splitlines()]
    assert done.returncode == code
    assert len(said) == 2
    for found, line in zip(said, lines, strict=True):
        assert line is None or found == line.format("--dist loadfile --no-loadscope-reorder")
    assert ("no test was run" in done.stderr) == (code == 5)


MAKER = """#!/bin/sh
# A Python 3.12 whose environments note in calls.txt what they are asked to do.
case "$1 $2" in
    "-m venv")
        mkdir -p "$3/bin"
        cp "$0" "$3/bin/python"
        ;;
    "-m pip") echo "$*" >>"{root}/calls.txt" ;;
    "-m pytest")
        case ":$PYTHONPATH:" in *transformer-engine:*) kind=with ;; *) kind=without ;; esac
        echo "pytest $kind: $*"
        exit $(cat "{root}/$kind" 2>/dev/null || echo 0)
        ;;
    *print*) echo 3.12 ;;
    *"import torch, transformer_engine.pytorch"*) [ ! -e "{root}/broken" ] ;;
esac
"""


class Lane:
    """scripts/torch211_lane.sh in a tree of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "scripts").mkdir()
        for name in ("scripts/environment.sh", "scripts/torch211_lane.sh", "constraints-torch2.11.txt"):
            shutil.copy(ROOT / name, root / name)
        (root / "pyproject.toml").touch()
        self.python = root / "python"
        self.python.write_text(MAKER.replace("{root}", str(root)))
        self.python.chmod(0o755)

    def run(self, **environment: str) -> tuple[int, list[str], str]:
        """Exit code, what pytest was asked, and the other lines."""
        done = subprocess.run(
            [str(self.root / "scripts" / "torch211_lane.sh"), "-x"],
            env={"PATH": "/usr/bin:/bin", "HOME": "/none", "PYTHON": str(self.python), **environment},
            cwd=self.root,
            capture_output=True,
            text=True,
            check=False,
        )
        lines = done.stdout.splitlines()
        tests = [line for line in lines if line.startswith("pytest")]
        return done.returncode, tests, "\n".join([line for line in lines if line not in tests] + [done.stderr])

    def installed(self) -> list[str]:
        return (self.root / "calls.txt").read_text().splitlines()


HALVES = ("-m not alone -n 2 --dist loadfile --no-loadscope-reorder -x", "-m alone -x")
WITH, WITHOUT = ([f"pytest {kind}: -m pytest {half}" for half in HALVES] for kind in ("with", "without"))


@pytest.fixture
def lane(tmp_path):
    return Lane(tmp_path)


def test_the_lane_runs_both_halves_in_an_environment_of_its_own(lane):
    (lane.root / ".te").mkdir()
    (lane.root / ".te" / "transformer_engine-2.0-py3-none-any.whl").touch()
    assert lane.run()[:2] == (0, [*WITH, *WITHOUT])
    assert (lane.root / ".venv-torch2.11" / "bin" / "python").exists() and not (lane.root / ".venv").exists()
    pinned = [line for line in lane.installed() if "--no-index" not in line]
    assert len(pinned) == 3 and all(f"-c {lane.root}/constraints-torch2.11.txt" in line for line in pinned)
    assert lane.installed()[-1].endswith(" .te/transformer_engine-2.0-py3-none-any.whl")
    (lane.root / ".te").rename(lane.root / "elsewhere")
    assert lane.run(TE_WHEELS="elsewhere")[:2] == (0, [*WITH, *WITHOUT])
    assert lane.installed()[-1].endswith(f" {lane.root}/elsewhere/transformer_engine-2.0-py3-none-any.whl")
    assert len([line for line in lane.installed() if " -e " in line]) == 1, "the project is installed once"


@pytest.mark.parametrize(("with_te", "without", "expected"), [(1, 0, 1), (0, 5, 5), (2, 1, 2)])
def test_the_lane_ends_with_what_failed(lane, with_te, without, expected):
    (lane.root / ".te").mkdir()
    (lane.root / ".te" / "transformer_engine-2.0-py3-none-any.whl").touch()
    (lane.root / "with").write_text(str(with_te))
    (lane.root / "without").write_text(str(without))
    assert lane.run()[:2] == (expected, [*WITH, *WITHOUT])


def test_the_lane_says_what_is_missing(lane):
    code, tests, said = lane.run()
    assert (code, tests) == (77, WITHOUT)
    assert "no wheels of Transformer Engine in .te" in said and "TE_WHEELS=" in said
    (lane.root / "without").write_text("1")
    assert lane.run()[0] == 1
    (lane.root / ".te").mkdir()
    (lane.root / ".te" / "transformer_engine-2.0-py3-none-any.whl").touch()
    (lane.root / "broken").touch()
    code, tests, said = lane.run()
    assert (code, tests) == (2, []) and "does not import" in said
    interpreter(lane.python, "3.11")
    code, tests, said = lane.run()
    assert (code, tests) == (2, []) and "is Python 3.11" in said


@pytest.mark.skipif(Path("/usr/bin/python3.12").exists(), reason="the system has a python3.12 of its own")
def test_the_lane_names_the_python_that_is_missing(lane):
    code, tests, said = lane.run(PYTHON="")
    assert (code, tests) == (2, []) and "there is no Python 3.12" in said


def pins(name: str) -> dict[str, str]:
    """Of the packages that Python 3.12 gets."""
    requirements = [Requirement(line) for line in (ROOT / name).read_text().splitlines() if line and line[0] != "#"]
    chosen = [one for one in requirements if one.marker is None or one.marker.evaluate({"python_version": "3.12"})]
    return {one.name: str(one.specifier).removeprefix("==") for one in chosen}


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-torch2.11.txt"])
def test_the_tested_versions_are_within_the_projects_ranges(name):
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11 or newer")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    ranges = {one.name: one.specifier for one in map(Requirement, asked)}
    tested = pins(name)
    shared = {one: version for one, version in tested.items() if one in ranges or one.lower() in ranges}
    assert {"torch", "triton", "transformers", "numpy", "megatron-core"} <= set(shared)
    assert [one for one, version in shared.items() if version not in ranges.get(one, ranges.get(one.lower()))] == []


def test_the_lanes_differ_in_what_a_gpu_machine_brings_only():
    """What is there, as read on one: torch 2.11.0, Triton 3.6.0, transformers 5.17.0, numpy 2.5.2."""
    newest, lane = pins("constraints.txt"), pins("constraints-torch2.11.txt")
    assert {name: version for name, version in lane.items() if newest.get(name, version) != version} == {
        "torch": "2.11.0",
        "triton": "3.6.0",
        "transformers": "5.17.0",
        "numpy": "2.5.2",
        "huggingface-hub": "1.33.0",  # the newest that this transformers takes
    }
    assert set(newest) <= set(lane)
