"""What a real run does when a rank is killed, when one rank alone meets a bug, and when somebody presses Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.jobs import LIMIT, assert_gone, injected, job_starter
from tests.helpers.training_cases import save_models

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the ranks in /proc"),
]

# A role fails at its third call.
FAILURES = """
calls = []

def fail_at_the_third(real):
    def call(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise ZeroDivisionError("injected")
        return real(*args, **kwargs)
    return call

def learner(module):
    from renio_megatron.megatron.student.learner import MegatronLearner
    MegatronLearner.make_micro_batches = fail_at_the_third(MegatronLearner.make_micro_batches)

def sampler(module):
    from renio_megatron.megatron.student.sampler import MegatronSampler
    MegatronSampler.sample = fail_at_the_third(MegatronSampler.sample)

patch = {"learner": learner, "sampler": sampler}[os.environ["FAULT"]]
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    return folder


@pytest.fixture
def start(models: Path, tmp_path: Path) -> Iterator[Any]:
    with job_starter(tmp_path, models) as starter:
        yield starter


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
    assert_gone(ranks)
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


@pytest.mark.parametrize("role", ["learner", "sampler"])
def test_a_bug_on_rank_1_alone_ends_all_and_names_rank_1(role, start, tmp_path):
    job = start(200, FAULT=role, PATHS=injected(tmp_path, FAILURES))
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
    assert_gone(ranks)


@pytest.mark.parametrize("group", [False, True], ids=["parent", "group"])
def test_ctrl_c_ends_all_ranks(group, start):
    # No checkpoint: of its writer, a process that a terminal interrupts as well, nobody could say in which state it is.
    job = start(200, {"checkpoint": {"save_interval": 200}})
    job.wait_for(1)
    ranks = job.ranks()
    if group:  # what a terminal does
        os.killpg(job.process.pid, signal.SIGINT)
    else:
        job.process.send_signal(signal.SIGINT)
    assert job.wait(LIMIT) == 130
    assert job.error() == "interrupted\n"
    assert_gone(ranks)
    assert not (job.run / "finished.json").exists()
