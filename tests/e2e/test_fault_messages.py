"""A fault of a real run is told once, in words that name what to do: a rank that hangs, a broken teacher, a grader."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from renio_megatron.cli import worker
from renio_megatron.errors import DataError, NumericsError, Scope
from tests.helpers.jobs import LIMIT, assert_gone, injected, job_starter
from tests.helpers.training_cases import save_models

pytestmark = [pytest.mark.timeout(300)]
real_run = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the ranks in /proc"),
]

# The grader fails on the third and the fourth of every eight completions.
BROKEN_GRADER = """
def patch(module):
    from renio_megatron.evaluation.graders import generated
    real, graded = generated.grade_modchain, []

    def judge(*args):
        graded.append(1)
        if (len(graded) - 1) % 8 in (2, 3):
            raise ValueError("no such answer")
        return real(*args)

    generated.grade_modchain = judge
"""

NAN_GRADIENT = """
def patch(module):
    from renio_megatron.megatron.student.learner import MegatronLearner
    real = MegatronLearner._bad_gradient

    def look(self):
        named = dict(self.part.named_parameters())
        named["decoder.layers.1.mlp.linear_fc2.weight"].main_grad[0, 0] = float("nan")
        return real(self)

    MegatronLearner._bad_gradient = look
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    teacher = shutil.copytree(folder / "teacher", folder / "broken")
    weights = load_file(teacher / "model.safetensors")
    weights["lm_head.weight"][3] = float("inf")
    save_file(weights, teacher / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def start(models: Path, tmp_path: Path) -> Iterator[Any]:
    with job_starter(tmp_path, models) as starter:
        yield starter


@pytest.fixture
def broken_grader(tmp_path: Path) -> str:
    return injected(tmp_path, BROKEN_GRADER, ranks=("0", "1"))


class TestRealRuns:
    pytestmark = real_run

    def test_a_rank_that_hangs_ends_the_run_by_the_timeout(self, start):
        job = start(500, {"parallel": {"distributed_timeout_minutes": 0.25}})
        job.wait_for(1)
        ranks = job.ranks()
        os.kill(ranks[1], signal.SIGSTOP)
        try:
            # The collective's timeout, and the 30 s that torch's launcher gives a rank to end: a stopped one takes all.
            assert job.wait(100.0) == 1
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(ranks[1], signal.SIGKILL)
        error = job.error()
        assert re.match(r"\[rank 0\] error: waited \d+ s for another rank, which did not answer", error), error
        assert error.count("\n") == 1
        assert_gone(ranks)

    def test_a_teacher_of_infinite_weights_is_told_once_before_any_update(self, start, models):
        job = start(4, {"teacher": {"model": str(models / "broken")}})
        assert job.wait(120.0) == 2
        error = job.error()
        assert error.startswith("error: ") and "broken: lm_head.weight holds NaN or inf" in error, error
        assert error.count("\n") == 1
        assert job.rows() == []
        assert not list((job.run / "checkpoints").glob("iter_*"))

    def test_a_number_that_is_none_on_one_rank_is_told_by_that_rank(self, start, models, tmp_path):
        copy = shutil.copytree(models / "teacher", tmp_path / "teacher")
        state = load_file(copy / "model.safetensors")
        state["lm_head.weight"][-1, 3] = float("nan")  # the last row is the last tensor rank's
        save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
        job = start(4, {"teacher": {"model": str(copy)}})
        assert job.wait(120.0) == 2
        error = job.error()
        assert error.startswith("[rank 1] error: ") and "lm_head.weight holds NaN or inf" in error, error
        assert error.count("\n") == 1

    def test_nan_in_the_gradient_of_rank_1_is_told_by_rank_1(self, start, tmp_path):
        job = start(4, PATHS=injected(tmp_path, NAN_GRADIENT))
        assert job.wait(120.0) == 2
        error = job.error()
        assert error.startswith("[rank 1] error: step 1, rank 1: the gradient of decoder.layers.1.mlp.linear_fc2"), (
            error
        )
        assert error.count("\n") == 1, "rank 0, whose gradient is finite, keeps still"
        assert job.rows() == []

    def test_a_grader_that_raises_is_told_once(self, start, broken_grader):
        job = start(4, PATHS=broken_grader)
        assert job.wait(120.0) == 2
        error = job.error()
        assert error.startswith("error: prompt 2: the grader 'modchain' raised ValueError: no such answer."), error
        assert "data.grader_errors=count_wrong" in error
        assert error.count("\n") == 1

    def test_a_grader_that_raises_can_be_counted_instead(self, start, broken_grader):
        job = start(4, {"data": {"grader_errors": "count_wrong"}}, PATHS=broken_grader)
        assert job.wait(LIMIT + 60.0) == 0, job.error()
        # Two of the first four prompts, none of the next four, and again.
        assert [row["rollout/grader_error_frac"] for row in job.rows()] == [0.5, 0.0, 0.5, 0.0]
        lines = sorted(job.error().splitlines())
        assert [line.partition("warning: ")[0] for line in lines] == ["", ""]
        assert "the grader failed on 50.0% of the completions of step 1" in lines[1]
        assert lines[0].startswith("warning: prompt 2: the grader 'modchain' raised ValueError: no such answer.")


TIMEOUT = "[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 15000ms for recv operation to complete"
CLOSED = "[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:9"


@pytest.mark.parametrize(
    ("text", "beginning"),
    [
        (TIMEOUT, "[rank 2] error: waited 15 s for another rank, which did not answer"),
        (CLOSED, "[rank 2] error: lost the connection to another rank, which has ended"),
        ("a bug", "[rank 2] unexpected error\nTraceback"),
    ],
)
def test_what_a_rank_says_of_a_peer(text, beginning, monkeypatch, capsys):
    monkeypatch.setattr(worker, "_PATIENCE", 0.0)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")

    def fail() -> None:
        raise RuntimeError(text)

    assert worker._guard(fail) == 1
    said = capsys.readouterr().err
    assert said.startswith(beginning)
    assert ("Traceback" in said) == (text == "a bug")
    monkeypatch.setenv("RENIO_TRACEBACK", "1")
    assert worker._guard(fail) == 1
    assert capsys.readouterr().err.endswith(f"RuntimeError: {text}\n")


def test_several_ranks_tell_one_error_in_turn(monkeypatch):
    slept: list[float] = []
    monkeypatch.setattr(worker.time, "sleep", slept.append)
    monkeypatch.setenv("WORLD_SIZE", "64")

    def fail(error: Exception) -> Any:
        def run() -> None:
            raise error

        return run

    shared, own = DataError("every rank's", scope=Scope.ALL_RANKS), DataError("of some")
    follows = NumericsError("stopped", scope=Scope.FOLLOWS)
    for error, expected in (
        (own, [0.5, 1.0, 10.0, 10.0]),
        (follows, [4.5, 5.0, 5.5, 14.5, 14.5]),
        (shared, [5.0, 5.5, 14.5, 14.5]),
        (RuntimeError("a bug"), [1.0, 2.0, 2.5, 11.5, 11.5]),
    ):
        slept.clear()
        for rank in (0, 1, 2, 20, 63):
            monkeypatch.setenv("RANK", str(rank))
            worker._guard(fail(error))
        assert slept == expected
