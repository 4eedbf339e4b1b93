"""Kills a run again and again and compares what it leaves with the same run uninterrupted.

    python -m tests.helpers.crash [--kills 24] [--inside-saves 6] [--stops 4] [--steps 30] [--seed 1] [--keep DIRECTORY]

A kill is SIGKILL to the whole process tree; or a request to stop: SIGTERM to the command or to one rank, or SIGINT to
the whole process group, which is what Ctrl-C in a terminal is; at a random moment or inside a save. After each one the
same command is given again, until the run is finished. Then both runs must have the same parameters and optimiser state
bit for bit, and the same rows of metrics (but for times) and rollouts, each once. Prints a line for every kill and a
verdict; exit code 0 or 1.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from renio_megatron.megatron.checkpoint.directory import latest_step
from tests.helpers import warm
from tests.helpers.jobs import descendants, python_path, ranks_of
from tests.helpers.resuming import TIMES, same, tensors
from tests.helpers.training_cases import VOCAB_SIZE, save_models

SAVE_INTERVAL = 3
STOPS = {"term": 143, "one rank": 143, "int": 130}
"""Ways to request a stop: SIGTERM to the command, to one rank, Ctrl-C; and the exit code of each."""
LIMIT = 180.0
"""Seconds after which a command that neither ends nor gets anywhere is a failure."""


@dataclass
class Job:
    """One call of the command, and where its run stands."""

    recipe: Path
    run: Path
    log: Path
    process: subprocess.Popen[bytes] = field(init=False)
    started: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        with self.log.open("ab") as log:
            self.process = warm.Popen(
                [sys.executable, "-m", "renio_megatron.cli.main", "train", str(self.recipe)],
                env={**environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path()},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def last_step(self) -> int:
        """The newest step that this call has written a row of metrics for; -1 before it wrote one."""
        path = self.run / "metrics.jsonl"
        if not path.is_file() or path.stat().st_mtime < self.started + 1.0:  # the first second goes to imports
            return -1
        lines = path.read_bytes().split(b"\n")[:-1]
        return json.loads(lines[-1])["step"] if lines else -1

    def being_written(self) -> set[str]:
        """Names of the files of a checkpoint that is being written."""
        return {path.name for path in (self.run / "checkpoints").glob(".iter_*.partial*/*")}

    def wait_until(self, condition: Callable[[], bool]) -> bool:
        """Waits until it holds; False where the command ended before."""
        end = time.monotonic() + LIMIT
        while not condition():
            if self.process.poll() is not None:
                return False
            if time.monotonic() > end:
                self.kill()
                raise TimeoutError(f"nothing happened for {LIMIT} s; see {self.log}")
            time.sleep(0.001)
        return self.process.poll() is None

    def kill(self) -> bool:
        """SIGKILL to the command and everything that descends from it; whether that was inside a save."""
        pids: list[int] = []
        while new := [pid for pid in (self.process.pid, *descendants(self.process.pid)) if pid not in pids]:
            for pid in new:  # stopped first, so that none notices the others' end, and the moment is one
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGSTOP)
            pids += new
        inside = bool(self.being_written())
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        return inside

    def stop(self, kind: str, draw: random.Random) -> int:
        """Requests a stop in one of the ways of `STOPS`; the exit code."""
        if kind == "term":
            self.process.send_signal(signal.SIGTERM)
        elif kind == "int":
            os.killpg(self.process.pid, signal.SIGINT)
        else:
            ranks = ranks_of(self.process.pid)
            os.kill(ranks[draw.choice(sorted(ranks))], signal.SIGTERM)
        try:
            return self.process.wait(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            self.kill()
            raise


def write_recipe(folder: Path, name: str, num_steps: int, async_save: bool) -> Path:
    """The recipe of a run of tiny models on two tensor-parallel ranks."""
    recipe: dict[str, Any] = {
        "model": str(folder / "student"),
        "teacher": {"model": str(folder / "teacher")},
        "rollout": {"max_completion_length": 4, "temperature": 1.1, "log": True},
        "loss": {"temperature": 1.1},
        "weighting": {"name": "renio", "normalize": "ema", "threshold": 0.3, "ceiling": 1.5},
        "parallel": {"tensor_model_parallel_size": 2},
        "train": {"train_iters": num_steps, "global_batch_size": 4, "micro_batch_size": 4, "lr": 3.0e-3},
        "checkpoint": {"save_interval": SAVE_INTERVAL, "keep_last": 2, "async_save": async_save},
        "evaluate": {"every": 5, "samples": 4},
        "output_dir": str(folder / name),
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def run_whole(recipe: Path, run: Path, log: Path) -> None:
    """The run from its start to its end without a break."""
    job = Job(recipe, run, log)
    job.wait_until(lambda: False)
    if job.process.returncode:
        raise RuntimeError(f"the uninterrupted run ended with exit code {job.process.returncode}; see {log}")


def run_killed(recipe: Path, run: Path, log: Path, kinds: list[str], num_steps: int, draw: random.Random) -> list[str]:
    """The run, killed once for each of `kinds` (`anywhere`, `inside save`, one of `STOPS`); what went wrong.

    Each kill waits until the run has got beyond its share of the steps, but for some that come at its start.
    """
    problems: list[str] = []
    num_inside = 0
    for number, kind in enumerate(kinds):
        job = Job(recipe, run, log)
        goal = num_steps * number // len(kinds) - draw.choice((0, 1, 2))
        if not _wait_for_moment(job, kind, goal, min(goal + 3, num_steps - 2), draw):
            job.kill()
            problems.append(f"kill {number + 1}: the run had ended with exit code {job.process.returncode}; see {log}")
            break
        if kind in STOPS:
            inside, code = bool(job.being_written()), job.stop(kind, draw)
            if code != STOPS[kind]:
                problems.append(f"kill {number + 1}, {kind}: exit code {code} and not {STOPS[kind]}; see {log}")
            # A step whose evaluation was given up is saved and has no row yet.
            if (latest_step(run / "checkpoints") or 0) - max(job.last_step(), 0) not in (0, 1):
                problems.append(f"kill {number + 1}, {kind}: step {job.last_step()} was not saved; see {log}")
        else:
            inside, code = job.kill(), job.process.returncode
        num_inside += inside
        where = "inside a save" if inside else "outside saves"
        print(f"kill {number + 1:2} {kind:11} {where}, exit code {code:4}, last step {job.last_step()}", flush=True)
    last = Job(recipe, run, log)
    last.wait_until(lambda: False)
    if last.process.returncode:
        problems.append(f"the last call ended with exit code {last.process.returncode}; see {log}")
    if num_inside < kinds.count("inside save"):
        problems.append(f"only {num_inside} of the kills were inside a save; try another --seed")
    return problems


def _wait_for_moment(job: Job, kind: str, goal: int, most: int, draw: random.Random) -> bool:
    """Waits for a moment that a kill of this kind may come at; False where the command ended before.

    It comes when step `most` is done at the latest: a quick machine must leave steps for the kills that follow.
    """

    def pause(seconds: float) -> bool:
        end = time.monotonic() + seconds
        return job.wait_until(lambda: time.monotonic() > end or job.last_step() >= most)

    if kind == "anywhere" and draw.random() < 0.25:
        return pause(draw.uniform(0.0, 12.0))
    arrived = job.wait_until(lambda: job.last_step() >= max(goal, 0))
    if kind == "inside save" and arrived:
        part = draw.choice(("common.pt", ".distcp", ".metadata", "metadata.json"))
        return job.wait_until(lambda: any(name.endswith(part) for name in job.being_written()))
    return arrived and pause(draw.uniform(0.0, 0.5))


def rows(run: Path) -> list[dict[str, Any]]:
    """Metrics without times; every line must be whole."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in found]


def compare(whole: Path, killed: Path, num_steps: int) -> list[str]:
    """Every way in which the run that was killed differs from the other."""
    problems = []
    if [row["step"] for row in rows(killed)] != list(range(num_steps + 1)):
        problems.append(f"steps of metrics.jsonl are {[row['step'] for row in rows(killed)]}")
    problems += [
        f"metrics of step {one['step']} differ"
        for one, other in zip(rows(whole), rows(killed), strict=False)
        if one != other
    ]
    name = f"iter_{num_steps:07d}"
    states = [tensors(run / "checkpoints" / name, VOCAB_SIZE) for run in (whole, killed)]
    if not same(*states):
        different = [key for key, value in states[0].items() if key not in states[1] or (value != states[1][key]).any()]
        problems.append(f"tensors of the last checkpoint differ: {different}")
    if (whole / "rollouts.jsonl").read_bytes() != (killed / "rollouts.jsonl").read_bytes():
        problems.append("rollouts.jsonl differs")
    kept, wanted = (sorted(path.name for path in (run / "checkpoints").iterdir()) for run in (killed, whole))
    # One that SIGTERM had written may be among the last ones, in the place of an older one.
    if len(kept) != len(wanted) or kept[-2:] != wanted[-2:]:
        problems.append(f"checkpoints/ holds {kept}")
    if (whole / "finished.json").exists() != (killed / "finished.json").exists():
        problems.append("only one of the runs is marked as finished")
    return problems


def crash(folder: Path, *, kinds: list[str], num_steps: int, seed: int, async_save: bool = False) -> list[str]:
    """Both runs below `folder`, the second killed as `kinds` say; every difference and every wrong exit code."""
    save_models(folder)
    for name in ("whole", "killed"):
        write_recipe(folder, name, num_steps, async_save)
    run_whole(folder / "whole.yaml", folder / "whole", folder / "whole.log")
    draw = random.Random(seed)
    log = folder / "killed.log"
    problems = run_killed(folder / "killed.yaml", folder / "killed", log, kinds, num_steps, draw)
    return problems or compare(folder / "whole", folder / "killed", num_steps)


def main() -> int:
    """The command line; 0 where the killed run equals the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=24, help="kills in all (default: %(default)s)")
    parser.add_argument("--inside-saves", type=int, default=6, help="of them inside a save (default: %(default)s)")
    parser.add_argument("--stops", type=int, default=4, help="of them requests to stop (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=30, help="optimiser steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the moments (default: %(default)s)")
    parser.add_argument("--async-save", action="store_true", help="checkpoints are written while training goes on")
    parser.add_argument("--keep", type=Path, help="directory for both runs and their logs (default: a temporary one)")
    options = parser.parse_args()
    kinds = ["inside save"] * options.inside_saves + list(itertools.islice(itertools.cycle(STOPS), options.stops))
    kinds += ["anywhere"] * (options.kills - len(kinds))
    random.Random(options.seed).shuffle(kinds)
    with contextlib.ExitStack() as stack:
        folder = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="renio_crash_")))
        folder.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        problems = crash(folder, kinds=kinds, num_steps=options.steps, seed=options.seed, async_save=options.async_save)
        print(f"{len(kinds)} kills, {time.monotonic() - start:.0f} s")
        for problem in problems:
            print(f"DIFFERENT: {problem}")
        if not problems:
            print("the same: parameters, optimiser state, metrics, rollouts, checkpoints")
    return bool(problems)


if __name__ == "__main__":
    raise SystemExit(main())
