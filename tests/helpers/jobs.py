"""Starts `renio train` as a user does, on real ranks, and watches it from outside."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.helpers import warm
from tests.helpers.paths import ROOT

LIMIT = 60.0  # seconds from a fault to the end of everything


def python_path(*folders: str | Path) -> str:
    """PYTHONPATH of a process that a test starts: these folders, the source tree, and what this process was given."""
    given = os.environ.get("PYTHONPATH")
    return os.pathsep.join(map(str, (*folders, ROOT, *([given] if given else []))))


# Stands in every process that has it on its path; on the ranks RANKS, PATCH changes what runner/build.py imports.
INJECTION = """
import os, sys

if os.environ.get("RANK", os.environ.get("SLURM_PROCID")) in RANKS:
    import importlib.util

    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name != "renio_megatron.runner.build":
                return None
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec(name)
            run = spec.loader.exec_module

            def load(module):
                run(module)
                patch(module)

            spec.loader.exec_module = load
            return spec

    sys.meta_path.insert(0, Finder())

PATCH
"""


def injected(folder: Path, patch: str, ranks: tuple[str, ...] = ("1",)) -> str:
    """A path for `PATHS`: on these ranks `patch`, a function `patch(module)` in source, runs after build's imports."""
    (folder / "path").mkdir()
    source = INJECTION.replace("RANKS", repr(ranks)).replace("PATCH", patch)
    (folder / "path" / "sitecustomize.py").write_text(source)
    return str(folder / "path")


class Job:
    """`renio train` on 2 tensor-parallel ranks, in a session of its own."""

    def __init__(
        self,
        folder: Path,
        models: Path,
        train_iters: int,
        sections: dict[str, dict[str, Any]] | None = None,
        **environment: str,
    ) -> None:
        """`sections` are merged into the recipe's."""
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
        for name, section in (sections or {}).items():
            recipe[name] = {**recipe.get(name, {}), **section}
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        paths = python_path(*filter(None, [environment.pop("PATHS", "")]))
        self.process = warm.Popen(
            [sys.executable, "-m", "renio_megatron.cli.main", "train", str(folder / "recipe.yaml")],
            env={**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **environment},
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
        """Rank -> process id of the launcher's children that are ranks."""
        return ranks_of(self.process.pid)

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

    def end(self) -> None:
        """Kills what is left of it."""
        for pid in (*descendants(self.process.pid), self.process.pid):
            if self.process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.process.wait()


@contextlib.contextmanager
def job_starter(folder: Path, models: Path) -> Iterator[Any]:
    """A function (train_iters, sections, **environment) -> Job; at the end none of its jobs is left."""
    jobs: list[Job] = []

    def start(train_iters: int, sections: dict[str, dict[str, Any]] | None = None, **environment: str) -> Job:
        jobs.append(Job(folder, models, train_iters, sections, **environment))
        return jobs[-1]

    try:
        yield start
    finally:
        for job in jobs:
            job.end()


def ranks_of(launcher: int) -> dict[int, int]:
    """Rank -> process id of a launcher's children that are ranks; a warm one has it in its name alone."""
    found = {}
    for pid in descendants(launcher):
        name, _, parent = _stat(pid)
        rank = name.partition(" r")[2] if name.startswith("warm ") else _environment(pid).get("RANK")
        if parent == launcher and rank:
            found[int(rank)] = pid
    return found


def descendants(pid: int) -> list[int]:
    """Processes that were started by `pid`, directly or not."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            parents[int(entry.name)] = _stat(int(entry.name))[2]
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


def _stat(pid: int) -> tuple[str, str, int]:
    """Name, state and parent of a process; empty where it is gone."""
    with contextlib.suppress(OSError):
        before, _, after = Path(f"/proc/{pid}/stat").read_text().rpartition(")")
        state, parent = after.split()[:2]
        return before.partition("(")[2], state, int(parent)
    return "", "", 0


def _is_alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    return _stat(pid)[1] not in ("", "Z")


def assert_gone(pids: dict[int, int], world_size: int = 2) -> None:
    assert sorted(pids) == list(range(world_size)), "all ranks were found"
    end = time.monotonic() + 5.0
    while any(map(_is_alive, pids.values())) and time.monotonic() < end:
        time.sleep(0.05)
    assert [rank for rank, pid in pids.items() if _is_alive(pid)] == []
