"""scripts/gpu_check.sh at toy size: all stages run, a kill loses nothing, nothing outlives its limit."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import psutil
import pytest

from gpu_check import __main__ as command
from gpu_check import child, supervise
from gpu_check.record import Record, read
from gpu_check.tables import PAGES, write_tables
from gpu_check.unit import Unit, Wrong, require
from tests.helpers import warm
from tests.helpers.jobs import ROOT, python_path

SCRIPT = ROOT / "scripts" / "gpu_check.sh"
RESULTS = ROOT / "docs" / "results"
STAGES = list(command.LIMITS)
KEYS = {"complete", "skipped", "commit", "gpu", "driver", "versions", "command", "date", "units", "measurements"}

pytestmark = [
    pytest.mark.skipif(not SCRIPT.is_file(), reason="needs the source tree"),
    pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash"),
]


def environment(folder: Path, **more: str) -> dict[str, str]:
    """Of a run whose results go to `folder`; ranks' variables of this process left out."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    own = {"OUT": str(folder), "PYTHON": str(warm.interpreter(folder)), "PYTHONPATH": python_path()}
    return {**kept, **own, "GPU_CHECK_COMMIT": "abc", "OMP_NUM_THREADS": "1", **more}


def check(folder: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(SCRIPT), *arguments],
        env=environment(folder, **more),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def processes_of(folder: Path) -> list[psutil.Process]:
    """Those that were started for `folder`, or are warm for this file, whoever's children they are now."""
    found = []
    for process in psutil.process_iter():
        try:
            is_ours = process.name().startswith(warm.names()) or process.environ().get("OUT") == str(folder)
            if process.status() != psutil.STATUS_ZOMBIE and is_ours:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def is_sleeping(process: psutil.Process) -> bool:
    """Whether it is the `sleep` of a stage that hangs; not where it has ended since it was listed."""
    try:
        return "sleep" in process.cmdline()
    except (psutil.NoSuchProcess, psutil.AccessDenied):  # a zombie is a NoSuchProcess
        return False


def nothing_is_left(folder: Path, seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while processes_of(folder):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """All stages at toy size, one after the other."""
    folder = tmp_path_factory.mktemp("gpu_check")
    return folder, check(folder, "--toy")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_stage_runs_to_its_end(whole):
    folder, done = whole
    assert done.returncode == 0, done.stdout + done.stderr
    for stage in STAGES:
        found = read(folder / f"{stage}.json")
        assert found is not None and set(found) >= KEYS
        assert found["complete"] and found["skipped"] is None, stage
        assert set(found["units"].values()) == {"done"}, stage
        assert found["commit"] == "abc" and found["toy"] and found["versions"]["torch"]
        names = [one["name"] for one in found["measurements"]]
        assert len(names) == len(set(names)) > 10
        assert all(set(one) >= {"name", "value", "unit", "time"} for one in found["measurements"])
        assert f"{stage}: complete, {len(names)} measurements" in done.stdout
    # What a hand can count: 4 sequences of 16 prompt tokens and 8 drawn ones; models that are the same.
    step = {one["name"]: one["value"] for one in read(folder / "step.json")["measurements"]}
    assert step["teacher, model operations"] == step["rollout, model operations"] > 2 * 4 * 23 * 2 * 64 * (3 * 192)
    cli = {one["name"]: one["value"] for one in read(folder / "cli.json")["measurements"]}
    assert cli["modchain, fp32 on cpu, loss, relative difference"] == 0.0, "the same device twice"
    assert cli["modchain, bf16 on cpu, loss, relative difference"] > 0.0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_has_a_result_is_not_repeated(whole):
    folder, _ = whole
    before = {path.name: path.read_bytes() for path in folder.glob("*.json")}
    began = time.monotonic()
    done = check(folder, "--toy")
    assert done.returncode == 0 and done.stdout.count("from before") == 2 * len(STAGES)
    assert time.monotonic() - began < 20, "no stage was started"
    assert {path.name: path.read_bytes() for path in folder.glob("*.json")} == before


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_at_five_moments_it_loses_nothing(whole, tmp_path):
    """By SIGKILL, which leaves it no time for anything: what was written stays as it was, nothing of it goes on."""
    draw, seen = random.Random(), {}
    for _ in range(5):
        process = subprocess.Popen(
            [str(SCRIPT), "--toy"], env=environment(tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(draw.uniform(0.5, 6.0))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert nothing_is_left(tmp_path)
        for stage in STAGES:
            found = read(tmp_path / f"{stage}.json")
            mine = [] if found is None else found["measurements"]
            before = seen.get(stage, [])
            assert mine[: len(before)] == before, "what was written before is unaltered"
            seen[stage] = mine
    done = check(tmp_path, "--toy")
    assert done.returncode == 0, done.stdout + done.stderr
    for stage in STAGES:
        ended = read(tmp_path / f"{stage}.json")
        assert ended["complete"]
        assert ended["measurements"][: len(seen[stage])] == seen[stage]
        expected = read(whole[0] / f"{stage}.json")
        names = [{one["name"] for one in found["measurements"]} for found in (ended, expected)]
        assert names[0] == names[1] and ended["units"].keys() == expected["units"].keys()


@pytest.mark.timeout(120)
def test_a_stage_that_hangs_is_ended_with_its_children(tmp_path):
    """It has a child in a session of its own, which no signal to a process group reaches."""
    began = time.monotonic()
    done = check(tmp_path, "--toy", "--seconds", "4", "smoke", "step", GPU_CHECK_HANG="smoke")
    assert time.monotonic() - began < 40
    assert done.returncode == 1
    assert "smoke: CUT OFF after 4 s" in done.stdout and "step: not begun, the time is up" in done.stdout
    assert nothing_is_left(tmp_path, 1.0)


@pytest.mark.timeout(120)
def test_without_a_gpu_it_says_what_to_do_once(tmp_path):
    done = check(tmp_path, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert done.stdout.count("torch sees no GPU here; --toy runs every stage") == 1


def test_an_interpreter_without_the_packages_is_refused(tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E "$@"\n')
    python.chmod(0o755)
    done = check(tmp_path, "--toy", PYTHON=str(python))
    assert done.returncode == 2
    assert "lacks the project's packages" in done.stderr and "PYTHON=/path/to/python" in done.stderr


@pytest.mark.timeout(120)
def test_where_it_is_asked_to_end_its_stage_ends_too(tmp_path):
    process = subprocess.Popen(
        [str(SCRIPT), "--toy", "smoke"],
        env=environment(tmp_path, GPU_CHECK_HANG="smoke"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not any(is_sleeping(one) for one in processes_of(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.terminate()
    assert process.wait(timeout=30) == 128 + signal.SIGTERM
    assert nothing_is_left(tmp_path, 1.0)


def test_the_stages_fit_into_two_commands(capsys):
    assert command.main(["--list"]) == 0
    printed = {line.split()[0]: float(line.split()[1]) for line in capsys.readouterr().out.splitlines()}
    assert list(printed) == STAGES == ["smoke", "kernels", "loss", "step", "fp8", "cli"]
    assert printed.pop("smoke") <= 100 and sum(printed.values()) <= 520


def test_a_stage_that_is_not_there_is_named(capsys):
    with pytest.raises(SystemExit):
        command.main(["smok"])
    assert "there is no stage smok; there are smoke, kernels" in capsys.readouterr().err


HEADER = {"commit": "abc", "gpu": None, "driver": None, "versions": {}, "command": "x", "date": "y", "toy": True}


def test_a_file_goes_on_only_for_the_same_commit_and_device(tmp_path):
    path = tmp_path / "step.json"
    first = Record(path, HEADER)
    first.add("a", 1.0, "s", note="kept")
    first.finish("one")
    again = Record(path, {**HEADER, "date": "later"})
    assert again.has("a") and again.value("a") == 1.0 and again.is_done("one")
    again.add("a", 2.0, "s")
    assert again.value("a") == 1.0, "a measurement that stands is not written again"
    kept = path.read_bytes()
    for number, changed in enumerate(({"commit": "def"}, {"gpu": "H100"}), start=1):
        other = Record(path, {**HEADER, **changed})
        assert not other.has("a")
        other.add("b", None, "s", why="none")
        assert path.with_name(f"step.{number}.json").is_file()
    assert path.with_name("step.1.json").read_bytes() == kept
    path.write_text('{"measurements": [{"na')
    assert read(path) is None
    assert not Record(path, HEADER).has("b")
    assert path.with_name("step.3.json").read_text() == '{"measurements": [{"na', "nothing is thrown away"


def fake_stage(monkeypatch, units, **more):
    """The stage `fake` of these units."""
    module = types.SimpleNamespace(units=lambda setting: units, **more)
    monkeypatch.setitem(sys.modules, "gpu_check.stages.fake", module)


def test_after_a_fault_the_other_units_run_and_the_fault_is_kept(tmp_path, monkeypatch, capsys):
    def wrong(record, setting):
        record.add("before the fault", 1.0, "s")
        require(record, "too large", 3.0, 2.0, "m")

    fake_stage(monkeypatch, [Unit("wrong", wrong), Unit("right", lambda record, setting: record.add("r", 2.0, "s"))])
    arguments = ["fake", str(tmp_path), "600", "--toy"]
    assert child.main(arguments) == child.FAULT
    found = read(tmp_path / "fake.json")
    assert found["complete"] and found["units"] == {"wrong": "Wrong: too large: 3 m is above 2", "right": "done"}
    assert [one["name"] for one in found["measurements"]] == ["before the fault", "too large", "r"]
    assert command._words(found).startswith("FAULTS in 1 of 2: wrong: Wrong: too large")
    assert child.main(arguments) == 0, "nothing is left to do"


def test_the_driver_is_asked_for_the_gpu(tmp_path, monkeypatch):
    """A program in nvidia-smi's place; one that fails, or answers less than it was asked, says nothing."""
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\necho "H100, 580.1, 80 GiB, 345 MHz, 1980 MHz, 2619 MHz, 700 W"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    found = command.machine.header("x", toy=False)
    assert (found["gpu"], found["driver"]) == ("H100", "580.1")
    assert found["machine"]["power.limit"] == "700 W" and "name" not in found["machine"]
    assert command.machine.header("x", toy=True)["gpu"] is None
    for text in ("exit 9", "echo H100"):
        program.write_text(f"#!/bin/sh\n{text}\n")
        found = command.machine.header("x", toy=False)
        assert (found["gpu"], found["driver"], set(found["machine"])) == (None, None, {"cpu_count"})


def test_numbers_that_are_none_are_outside_every_limit(tmp_path):
    with pytest.raises(Wrong):
        require(Record(tmp_path / "x.json", HEADER), "a", float("nan"), 1.0)


def test_no_unit_is_begun_when_the_time_is_up(tmp_path, monkeypatch):
    fake_stage(monkeypatch, [Unit("late", lambda record, setting: record.add("a", 1.0, "s"))])
    assert child.main(["fake", str(tmp_path), "1", "--toy"]) == child.NO_TIME
    assert child.main(["fake", str(tmp_path), "600", "--toy"]) == 0
    assert read(tmp_path / "fake.json")["complete"]


def test_a_stage_that_cannot_run_here_says_why(tmp_path, monkeypatch):
    fake_stage(monkeypatch, [], obstacle=lambda setting: "no such thing")
    assert child.main(["fake", str(tmp_path), "600", "--toy"]) == 0
    found = read(tmp_path / "fake.json")
    assert found["complete"] and found["skipped"] == "no such thing"
    assert command._words(found) == "skipped: no such thing"


def test_a_process_that_lost_its_device_is_followed_by_another(tmp_path, monkeypatch):
    """Three exits: the device is gone, gone again, and the stage is complete."""
    codes = [child.BROKEN, child.BROKEN, 0]

    def run(arguments, log, seconds):
        if len(codes) == 1:
            record = Record(tmp_path / "smoke.json", {**HEADER, "commit": command.machine.commit()})
            record.close()
        return codes.pop(0)

    monkeypatch.setattr(supervise, "run", run)
    options = command.parse(["smoke", "--toy", "--out", str(tmp_path)])
    assert command.run_stage("smoke", options, float("inf")).startswith("complete")
    assert codes == []


def test_the_tables_of_the_docs_are_those_of_what_was_measured(tmp_path, capsys):
    """What docs/ says of a GPU is what the files beside it hold; another figure in a file changes the page."""
    docs = tmp_path / "docs"
    for name in PAGES:
        (docs / name).parent.mkdir(parents=True)
        shutil.copy(ROOT / "docs" / name, docs / name)
    before = {name: (docs / name).read_text() for name in PAGES}
    folder = max((path for path in RESULTS.iterdir() if path.is_dir()), key=lambda path: path.name.partition("-")[2])
    assert write_tables(folder, docs) == 0
    assert {name: (docs / name).read_text() for name in PAGES} == before
    changed = tmp_path / "changed"
    shutil.copytree(folder, changed)
    for name in ("step", "fp8"):
        found = json.loads((changed / f"{name}.json").read_text())
        for one in found["measurements"]:
            if one["value"] and one["unit"] == "s":
                one["value"] *= 2
        (changed / f"{name}.json").write_text(json.dumps(found))
    write_tables(changed, docs)
    assert all((docs / name).read_text() != text for name, text in before.items())
    assert write_tables(tmp_path, docs) == 2
    assert "holds no file of a stage" in capsys.readouterr().out
