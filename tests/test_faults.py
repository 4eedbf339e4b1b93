"""What a real run does when a rank is killed, when one rank alone meets a bug, and when somebody presses Ctrl-C."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import renio_megatron
from tests.training_cases import save_models

ROOT = Path(renio_megatron.__file__).parents[1]
LIMIT = 60.0  # seconds from the fault to the end of everything

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the ranks in /proc"),
]

# Stands in every process that has it on its path: rank 1's role fails at its third call.
INJECTION = """
import os, sys, threading, time

if os.environ.get("RANK") == "1":
    import importlib.util

    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name != "renio_megatron.build":
                return None
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec(name)
            run = spec.loader.exec_module

            def load(module):
                run(module)
                PATCH(module)

            spec.loader.exec_module = load
            return spec

    sys.meta_path.insert(0, Finder())

calls = []

def fail_at_the_third(real):
    def call(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise ZeroDivisionError("injected")
        return real(*args, **kwargs)
    return call

def grader(module):
    real = module.build_grader
    module.build_grader = lambda *args: fail_at_the_third(real(*args))

def sampler(module):
    from renio_megatron.megatron.sampler import MegatronSampler
    MegatronSampler.sample = fail_at_the_third(MegatronSampler.sample)

PATCH = {"grader": grader, "sampler": sampler}[os.environ["FAULT"]]
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    return folder


class Job:
    """`renio train` on 2 tensor-parallel ranks, in a session of its own."""

    def __init__(self, folder: Path, models: Path, train_iters: int, **environment: str) -> None:
        self.run = folder / "run"
        self._log = folder / "stderr.txt"
        recipe: dict[str, Any] = {
            "model": str(models / "student"),
            "teacher": {"model": str(models / "teacher")},
            "rollout": {"max_completion_length": 4, "temperature": 1.1},
            "loss": {"temperature": 1.1},
            "parallel": {"tensor_model_parallel_size": 2},
            "train": {"train_iters": train_iters, "global_batch_size": 4, "micro_batch_size": 4},
            "checkpoint": {"save_interval": 4},
            "output_dir": str(self.run),
        }
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        paths = environment.pop("PATHS", "")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "renio_megatron.cli.main", "train", str(folder / "recipe.yaml")],
            env={**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{paths}{os.pathsep}{ROOT}", **environment},
            stdout=(folder / "stdout.txt").open("w"),
            stderr=self._log.open("w"),
            start_new_session=True,
        )

    def rows(self) -> list[dict[str, float]]:
        """The whole lines of metrics.jsonl."""
        path = self.run / "metrics.jsonl"
        text = path.read_text() if path.is_file() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def ranks(self) -> dict[int, int]:
        """Rank -> process id of the launcher's descendants that are ranks."""
        return {
            int(variables["RANK"]): pid
            for pid in _descendants(self.process.pid)
            if "RANK" in (variables := _environment(pid)) and "renio_megatron.cli.worker" in _command(pid)
        }

    def wait_for(self, step: int, seconds: float = 150.0) -> None:
        """Until the metrics of a step are written."""
        end = time.monotonic() + seconds
        while not any(row["step"] >= step for row in self.rows()):
            assert self.process.poll() is None, f"ended before step {step}: {self.error()}"
            assert time.monotonic() < end, f"no step {step} after {seconds} s"
            time.sleep(0.05)

    def wait(self, seconds: float) -> int:
        """The exit code; fails after `seconds`."""
        return self.process.wait(timeout=seconds)

    def error(self) -> str:
        """What was written to stderr so far."""
        return self._log.read_text()


@pytest.fixture
def start(models: Path, tmp_path: Path) -> Iterator[Any]:
    jobs: list[Job] = []

    def starter(train_iters: int, **environment: str) -> Job:
        jobs.append(Job(tmp_path, models, train_iters, **environment))
        return jobs[-1]

    yield starter
    for job in jobs:
        for pid in (*_descendants(job.process.pid), job.process.pid):
            if job.process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        job.process.wait()


def _descendants(pid: int) -> list[int]:
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found, waiting = [], [pid]
    while waiting:
        parent = waiting.pop()
        children = [child for child, its_parent in parents.items() if its_parent == parent]
        found += children
        waiting += children
    return found


def _environment(pid: int) -> dict[str, str]:
    with contextlib.suppress(OSError):
        entries = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
        return dict(entry.split("=", 1) for entry in entries if "=" in entry)
    return {}


def _command(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


def _is_alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def _assert_gone(pids: dict[int, int]) -> None:
    assert sorted(pids) == [0, 1], "both ranks were found"
    end = time.monotonic() + 5.0
    while any(map(_is_alive, pids.values())) and time.monotonic() < end:
        time.sleep(0.05)
    assert [rank for rank, pid in pids.items() if _is_alive(pid)] == []


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_run_and_is_named(victim, start):
    job = start(200)
    job.wait_for(1)
    ranks = job.ranks()
    killed_at = time.monotonic()
    os.kill(ranks[victim], signal.SIGKILL)
    code = job.wait(LIMIT)
    assert time.monotonic() - killed_at < LIMIT
    assert code == 128 + signal.SIGKILL
    error = job.error()
    assert error.startswith(f"error: rank {victim} was ended by signal 9 (SIGKILL)"), error
    assert error.count("\n") == 1
    _assert_gone(ranks)
    assert not (job.run / "finished.json").exists()


def test_a_run_killed_after_a_checkpoint_is_resumed_by_the_same_command(start):
    job = start(12)
    job.wait_for(5)
    os.kill(job.ranks()[1], signal.SIGKILL)
    assert job.wait(LIMIT) == 128 + signal.SIGKILL
    before = {row["step"]: row["loss"] for row in job.rows()}
    assert 12 not in before, "killed before its end"
    checkpoint = (job.run / "checkpoints" / "iter_0000004").stat()
    again = start(12)
    assert again.wait(180.0) == 0, again.error()
    rows = again.rows()
    assert [row["step"] for row in rows] == list(range(1, 13)), "every step once"
    after = (job.run / "checkpoints" / "iter_0000004").stat()
    assert (after.st_ino, after.st_mtime_ns) == (checkpoint.st_ino, checkpoint.st_mtime_ns), "not started over"
    assert {row["step"]: row["loss"] for row in rows if row["step"] in before} == before
    assert json.loads((again.run / "finished.json").read_text())["step"] == 12
    assert again.error() == ""


@pytest.mark.parametrize("role", ["grader", "sampler"])
def test_a_bug_on_rank_1_alone_ends_all_and_names_rank_1(role, start, tmp_path):
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "sitecustomize.py").write_text(INJECTION)
    job = start(200, FAULT=role, PATHS=str(tmp_path / "path"))
    ranks: dict[int, int] = {}
    end = time.monotonic() + 150.0
    while "injected" not in job.error() and job.process.poll() is None and time.monotonic() < end:
        ranks.update(job.ranks())
        time.sleep(0.1)
    assert job.wait(LIMIT) == 1
    error = job.error()
    assert error.startswith("[rank 1] unexpected error\nTraceback"), error
    assert error.endswith("ZeroDivisionError: injected\n")
    assert error.count("Traceback") == 1, "rank 0, which lost its peer, keeps still"
    _assert_gone(ranks)


@pytest.mark.parametrize("group", [False, True], ids=["parent", "group"])
def test_ctrl_c_ends_all_ranks(group, start):
    job = start(200)
    job.wait_for(1)
    ranks = job.ranks()
    if group:  # what a terminal does
        os.killpg(job.process.pid, signal.SIGINT)
    else:
        job.process.send_signal(signal.SIGINT)
    assert job.wait(LIMIT) == 130
    assert job.error() == "interrupted\n"
    _assert_gone(ranks)
    assert not (job.run / "finished.json").exists()
