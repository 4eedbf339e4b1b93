"""A stop that is requested where drawing or evaluating takes a minute: all are gone soon, and the run can go on."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.jobs import Job, assert_gone, job_starter
from tests.helpers.resuming import rows
from tests.helpers.slow import SECONDS, SlowDraws
from tests.helpers.training_cases import save_models

STEPS = 4

SECTIONS = {
    "rollout": {"max_completion_length": 100, "temperature": 1.1},
    "evaluate": {"every": 2, "samples": 4},
    "checkpoint": {"save_interval": 100},
}


def one_rank(job: Job) -> None:
    os.kill(job.ranks()[1], signal.SIGTERM)


def the_command(job: Job) -> None:
    job.process.send_signal(signal.SIGTERM)


def ctrl_c(job: Job) -> None:
    os.killpg(job.process.pid, signal.SIGINT)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    return folder


@pytest.fixture(scope="module")
def whole(models: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """The metrics of a run that is not stopped."""
    folder = tmp_path_factory.mktemp("whole")
    with job_starter(folder, models) as start:
        job = start(STEPS, SECTIONS)
        assert job.wait(150.0) == 0, job.error()
    return rows(folder, "run")


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the ranks in /proc")
@pytest.mark.parametrize(
    ("phase", "after", "request_stop", "code"),
    [
        ("drawing", 0, one_rank, 143),
        ("drawing", 2, ctrl_c, 130),
        ("evaluating", 0, the_command, 143),
        ("evaluating", 2, one_rank, 143),
        ("evaluating", 5, ctrl_c, 130),
    ],
)
def test_all_are_gone_soon_and_the_same_command_goes_on(
    phase: str,
    after: int,
    request_stop: Callable[[Job], None],
    code: int,
    models: Path,
    whole: list[dict[str, float]],
    tmp_path: Path,
) -> None:
    draws = SlowDraws(tmp_path, phase, after=after, ranks=("0", "1"))
    with job_starter(tmp_path, models) as start:
        job = start(STEPS, SECTIONS, PATHS=draws.path)
        draws.wait(lambda: None if job.process.poll() is None else job.error())
        ranks = job.ranks()
        request_stop(job)
        assert job.wait(SECONDS) == code, job.error()
        assert_gone(ranks)
        assert "Traceback" not in job.error()
        draws.end()
        again = start(STEPS, SECTIONS, PATHS=draws.path)
        assert again.wait(150.0) == 0, again.error()
    assert rows(tmp_path, "run") == whole
