"""The main job as a newcomer runs it: what it reaches, what it leaves behind, and a second call."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import warm

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def _command(directory: Path) -> list[str]:
    return [sys.executable, "-m", "renio_megatron.cli.main", "quickstart", "--output-dir", str(directory / "out")]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    directory = tmp_path_factory.mktemp("quickstart")
    # Fresh interpreters, as a newcomer has: nothing warns when they import.
    run = subprocess.run(_command(directory), cwd=directory, capture_output=True, text=True, timeout=800, check=False)
    return directory, run


def _rows(directory: Path, run: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (directory / "out" / run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("run", ["opd", "renio"])
def test_the_student_learns(done: tuple[Path, subprocess.CompletedProcess[str]], run: str) -> None:
    assert done[1].returncode == 0, done[1].stderr
    rows = _rows(done[0], run)
    assert [row["step"] for row in rows] == list(range(61))
    assert 0.30 <= rows[0]["eval/accuracy_greedy"] <= 0.50
    assert rows[-1]["eval/accuracy_greedy"] >= 0.90
    assert rows[-1]["eval/accuracy_sampled"] > rows[0]["eval/accuracy_sampled"] + 0.3


def test_the_raw_weight_finds_wrong_rollouts(done: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    second_half = [row["renio/auc_wrong"] for row in _rows(done[0], "opd")[31:] if "renio/auc_wrong" in row]
    assert len(second_half) > 10
    assert sum(second_half) / len(second_half) >= 0.75


def test_opd_is_unweighted_and_renio_is_not(done: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    assert all(row["weight/max"] == 1.0 for row in _rows(done[0], "opd")[1:])
    weighted = _rows(done[0], "renio")[1:]
    assert all(abs(row["weight/mean"] - 1.0) < 1e-5 for row in weighted)
    assert max(row["weight/max"] for row in weighted) > 2.0


def test_what_it_prints_and_leaves(done: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    directory, process = done
    for words in ("greedy accuracy, before / after", "largest weight", "does not beat", "modchain/student", "1234"):
        assert words in process.stdout
    assert "warning" not in (process.stdout + process.stderr).lower(), "no notice, and no library's warning"
    assert process.stdout.count("the first step's 64 completions") == 2, "canaries of both runs"
    assert "the first step, " not in process.stderr, "a canary warns"
    out = directory / "out"
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    for run in ("opd", "renio"):
        assert (out / run / "config.yaml").is_file()
        assert (out / run / "checkpoints" / "iter_0000060" / "metadata.json").is_file()
        assert list((out / run / "tensorboard").iterdir())


def test_a_second_call_says_that_it_is_finished(done: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    again = warm.run(_command(done[0]), cwd=done[0], timeout=200)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("is finished already") == 2
    assert "greedy accuracy, before / after" in again.stdout
    assert len(_rows(done[0], "opd")) == 61
