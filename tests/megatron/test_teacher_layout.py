"""A teacher whose layout is not the student's: the same step, the bytes that travel, ranks that only score."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from renio_megatron.config import ParallelConfig, TeacherConfig, TeacherParallelConfig
from renio_megatron.config.load import check_models, check_world, load_recipe
from renio_megatron.config.teachers import has_own_layout, teacher_parallel
from renio_megatron.errors import ConfigError
from renio_megatron.parallel.layout import Axis
from renio_megatron.parallel.row_exchange import RowAllToAll
from tests.helpers.jobs import LIMIT, assert_gone, job_starter
from tests.helpers.multiprocess import run_ranks
from tests.helpers.slow import SECONDS, SlowDraws
from tests.megatron.teacher_layout_cases import (
    HIDDEN,
    PREFIX,
    READS,
    colocated_cases,
    dedicated_cases,
    run_colocated,
    run_dedicated,
)

TOLERANCE = 1e-5
COLOCATED = tuple(colocated_cases(Path("models")))
DEDICATED = tuple(dedicated_cases(Path("models")))


@pytest.fixture(scope="module")
def colocated(models: Path) -> list[dict[str, Any]]:
    return run_ranks(run_colocated, 4, models, list(COLOCATED), timeout=400)


@pytest.fixture(scope="module")
def dedicated(models: Path) -> list[dict[str, Any]]:
    return run_ranks(run_dedicated, 4, models, timeout=400)


def _assert_as_reference(found: dict[str, Any]) -> None:
    assert found["gradient_error"] < TOLERANCE
    assert found["grad_norm_error"] < TOLERANCE
    assert found["loss_error"] < TOLERANCE
    assert found["weight_error"] < TOLERANCE
    assert found["raw_weights_not_1"] >= 4, "weights that say nothing prove nothing"


@pytest.mark.slow
@pytest.mark.timeout(500)
@pytest.mark.parametrize("name", COLOCATED)
def test_a_step_beside_a_teacher_in_its_own_layout_is_the_reference(name, colocated):
    for rank in colocated:
        _assert_as_reference(rank[name])


@pytest.mark.slow
@pytest.mark.timeout(500)
@pytest.mark.parametrize("name", DEDICATED)
def test_a_step_beside_ranks_that_only_score_is_the_reference(name, dedicated):
    for rank in dedicated[:2]:
        _assert_as_reference(rank[name])
    assert [rank[name] for rank in dedicated[2:]] == [(1, READS[DEDICATED.index(name)])] * 2, "one step each"


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_each_hidden_state_travels_once(colocated, dedicated):
    """Completion rows x hidden x bytes of an element, to the byte, where no rank has both; else at most that."""

    def payload_of(found: dict[str, Any]) -> int:
        return sum(len(ids) for ids in found["tokens"]) * HIDDEN * 4

    payload = payload_of(colocated[0][COLOCATED[0]])
    for name in DEDICATED:
        assert dedicated[0][name]["sent_mb"] * 2**20 == payload_of(dedicated[0][name])
        assert ("prefixes" in name) == (payload_of(dedicated[0][name]) < payload)
    own = [name for name in COLOCATED if colocated[0][name]["sent_mb"] is not None]
    assert len(own) == len(COLOCATED) - 1
    for name in own:
        assert 0 < colocated[0][name]["sent_mb"] * 2**20 < payload


@pytest.mark.slow
@pytest.mark.timeout(500)
@pytest.mark.parametrize("name", [name for name in DEDICATED if "prefixes" in name])
def test_prefixes_are_the_first_tokens_of_the_same_draws(name, dedicated):
    whole, prefixes = (dedicated[0][one]["tokens"] for one in (name.replace("prefixes ", ""), name))
    assert sorted(prefixes) == sorted(ids[:PREFIX] for ids in whole)  # packed ranks share them out by their length
    assert max(map(len, whole)) > PREFIX == max(map(len, prefixes))


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_every_layout_draws_and_weighs_the_same_sequences(colocated, dedicated):
    first = colocated[0][COLOCATED[0]]
    for found in (*(colocated[0][name] for name in COLOCATED), *(dedicated[0][name] for name in DEDICATED)):
        assert len(found["tokens"]) == len(first["tokens"]) == 8


OWN_RANKS = {
    "teacher": {"ranks": "dedicated", "parallel": {"tensor_model_parallel_size": 2}},
    "checkpoint": {"save_interval": 100},
}


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the ranks in /proc")
def test_a_run_with_ranks_that_only_score_is_stopped_and_goes_on(models, tmp_path):
    """SIGTERM to all ranks saves; the same command ends the run, with the losses of one on 2 ranks."""
    plain, own = tmp_path / "plain", tmp_path / "own"
    plain.mkdir()
    own.mkdir()
    with job_starter(plain, models) as start:
        job = start(12)
        assert job.wait(150.0) == 0, job.error()
        losses = [row["loss"] for row in job.rows()]
    with job_starter(own, models) as start:
        job = start(12, OWN_RANKS)
        job.wait_for(2)
        ranks = job.ranks()
        assert sorted(ranks) == [0, 1, 2, 3]
        os.kill(job.process.pid, signal.SIGTERM)
        assert job.wait(LIMIT) == 128 + signal.SIGTERM, job.error()
        assert_gone(ranks, 4)
        assert len(job.rows()) < 12
        again = start(12, OWN_RANKS)
        assert again.wait(180.0) == 0, again.error()
        assert again.error() == ""
        assert [row["step"] for row in again.rows()] == list(range(1, 13))
        assert [row["loss"] for row in again.rows()] == pytest.approx(losses, rel=1e-6)
        finished = start(12, OWN_RANKS)
        assert finished.wait(LIMIT) == 0, finished.error()
        assert json.loads((own / "run" / "finished.json").read_text())["step"] == 12


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the ranks in /proc")
def test_a_scoring_rank_that_is_told_to_stop_ends_the_draws_of_which_it_has_read_a_group(models, tmp_path):
    draws = SlowDraws(tmp_path, "drawing", after=2, ranks=("0", "1"), pause=1.0)
    sections = OWN_RANKS | {"rollout": {"micro_batch_size": 1}}  # the teacher reads one while the next is drawn
    with job_starter(tmp_path, models) as start:
        job = start(4, sections, PATHS=draws.path)
        draws.wait(lambda: None if job.process.poll() is None else job.error())
        time.sleep(4.0)  # 16 passes of a second, of which the first group has four
        ranks = job.ranks()
        os.kill(ranks[3], signal.SIGTERM)
        assert job.wait(SECONDS) == 128 + signal.SIGTERM, job.error()
        assert_gone(ranks, 4)
        assert "Traceback" not in job.error()
        assert [row["step"] for row in job.rows()] == [1, 2]
        draws.end()
        again = start(4, sections, PATHS=draws.path)
        assert again.wait(180.0) == 0, again.error()
        assert [row["step"] for row in again.rows()] == [1, 2, 3, 4]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the ranks in /proc")
@pytest.mark.parametrize("victim", [0, 3])
def test_where_a_rank_of_either_kind_is_killed_all_end(victim, models, tmp_path):
    with job_starter(tmp_path, models) as start:
        job = start(500, OWN_RANKS)
        job.wait_for(1)
        ranks = job.ranks()
        os.kill(ranks[victim], signal.SIGKILL)
        assert job.wait(LIMIT) == 128 + signal.SIGKILL
        assert job.error().startswith(f"error: rank {victim} was ended by signal 9 (SIGKILL)"), job.error()
        assert_gone(ranks, 4)


def exchange_rows() -> list[list[float]]:
    """3 ranks hold rows 0-3, 4, and 5-9 of a table; what each asks for in 3 rounds."""
    import torch.distributed as dist

    from renio_megatron.parallel.row_exchange import axis_of

    axis = axis_of(dist.distributed_c10d._get_default_group())
    stops, starts = torch.tensor([4, 5, 10]), torch.tensor([0, 4, 5])
    wanted = [[[9, 0, 4], [5]], [[2, 2, 1]], [[], [9, 8, 0, 4], [7]]][axis.rank]
    exchange = RowAllToAll(
        [torch.tensor(rows, dtype=torch.int64) for rows in wanted],
        lambda rows: torch.bucketize(rows, stops, right=True),
        axis,
        torch.device("cpu"),
    )
    table = torch.arange(10, dtype=torch.bfloat16)[:, None].repeat(1, 3)[starts[axis.rank] : stops[axis.rank]]
    rounds = [
        exchange.fetch(number, lambda rows: table[rows - starts[axis.rank]], 3, torch.bfloat16)
        for number in range(exchange.num_rounds)
    ]
    assert all(bool((rows == rows[:, :1]).all()) for rows in rounds)
    return [*(rows[:, 0].tolist() for rows in rounds), [exchange.bytes_sent / 6]]


@pytest.mark.timeout(120)
def test_rows_arrive_in_the_order_in_which_they_were_asked_for():
    """The last number: rows that a rank sent to others, of 3 bf16 each."""
    found = run_ranks(exchange_rows, 3, timeout=100)
    assert found[0] == [[9, 0, 4], [5], [], [1 + 2 + 1]]  # to rank 1: 2, 2, 1; to rank 2: 0
    assert found[1] == [[2, 2, 1], [], [], [2]]  # 4 to rank 0 and to rank 2
    assert found[2] == [[], [9, 8, 0, 4], [7], [2]]  # 9 and 5 to rank 0


def test_one_rank_alone_sends_nothing():
    exchange = RowAllToAll([torch.tensor([1, 0])], torch.zeros_like, Axis(), torch.device("cpu"))
    table = torch.tensor([[1.0], [2.0]])
    assert exchange.fetch(0, lambda rows: table[rows], 1, torch.float32).tolist() == [[2.0], [1.0]]
    assert exchange.bytes_sent == 0


def test_a_layout_that_is_the_students_is_no_layout_of_its_own():
    student = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
    same = TeacherConfig(model="a", parallel=TeacherParallelConfig(tensor_model_parallel_size=2))
    assert not has_own_layout(student, TeacherConfig(model="a"))
    assert not has_own_layout(student, same)
    assert has_own_layout(student, TeacherConfig(model="a", ranks="dedicated"))
    alone = TeacherConfig(model="a", parallel=TeacherParallelConfig(tensor_model_parallel_size=1))
    assert has_own_layout(student, alone)
    assert not teacher_parallel(student, alone).sequence_parallel, "one tensor rank has nothing to share"


def _recipe(tmp_path: Path, *overrides: str) -> Any:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: modchain/student\noutput_dir: runs/a\nteacher:\n  model: modchain/teacher\n")
    return load_recipe("train", path, overrides).config


TP, PP = "teacher.parallel.tensor_model_parallel_size", "teacher.parallel.pipeline_model_parallel_size"


@pytest.mark.parametrize(
    ("overrides", "world", "words"),
    [
        ([f"{TP}=4"], 2, ["copy of the teacher takes 4 ranks", "world of 2", "Start a multiple of 4"]),
        ([f"{TP}=2", f"{PP}=2"], 6, ["TP 2 x PP 2", "world of 6"]),
        (["teacher.ranks=dedicated", f"{TP}=2"], 2, ["takes 2 ranks", "none remains", "at least 3 ranks"]),
        (
            ["teacher.ranks=dedicated", "parallel.tensor_model_parallel_size=2", f"{TP}=1"],
            4,
            ["takes 2 ranks", "does not divide the world of 3"],
        ),
        (["teacher.parallel.sequence_parallel=true"], 2, ["teacher.parallel.sequence_parallel=true would be ignored"]),
    ],
)
def test_ranks_that_do_not_cover_both_layouts_are_refused(overrides, world, words, tmp_path):
    config = _recipe(tmp_path, *overrides)
    with pytest.raises(ConfigError) as caught:
        check_world(config, world)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([f"{TP}=0"], ["teacher.parallel.tensor_model_parallel_size"]),
        (["teacher.parallel.tensor=2"], ["unknown key 'teacher.parallel.tensor'", "tensor_model_parallel_size"]),
        (["teacher.ranks=own"], ["teacher.ranks", "colocated", "dedicated"]),
        (["teacher.data_parallel_size=2"], ["teacher.data_parallel_size", "would be ignored", "colocated"]),
        ([f"{TP}=2", "teacher.payload_device=recompute"], ["payload_device=recompute", "Choose host"]),
    ],
)
def test_settings_that_cannot_be_are_refused(overrides, words, tmp_path):
    with pytest.raises(ConfigError) as caught:
        _recipe(tmp_path, *overrides)
    for word in words:
        assert word in str(caught.value)


def test_the_teacher_is_checked_in_its_own_layout(tmp_path):
    check_models(_recipe(tmp_path, f"{TP}=4"))
    words = r"teacher\.model: teacher\.parallel\.tensor_model_parallel_size=3 does not divide num_attention_heads"
    with pytest.raises(ConfigError, match=words):
        check_models(_recipe(tmp_path, f"{TP}=3"))


def test_the_smallest_world_holds_one_copy_of_each(tmp_path):
    student = "parallel.pipeline_model_parallel_size=2"
    assert _recipe(tmp_path, student, f"{TP}=3", f"{PP}=1").fewest_ranks == 6
    assert _recipe(tmp_path, student, f"{TP}=3", f"{PP}=1", "teacher.ranks=dedicated").fewest_ranks == 5
    copies = "teacher.data_parallel_size=4"
    assert _recipe(tmp_path, student, f"{TP}=3", f"{PP}=1", "teacher.ranks=dedicated", copies).fewest_ranks == 14


def test_a_section_inside_a_section_is_read_from_a_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: modchain/student\noutput_dir: runs/a\nteacher:\n  model: modchain/teacher\n"
        "  parallel: {tensor_model_parallel_size: 4}\n"
    )
    config = load_recipe("train", path, ["teacher.parallel.pipeline_model_parallel_size=2"]).config
    assert config.teacher.parallel == TeacherParallelConfig(
        tensor_model_parallel_size=4, pipeline_model_parallel_size=2
    )
    config = load_recipe("train", path, ["teacher.parallel={pipeline_model_parallel_size: 2}"]).config
    assert config.teacher.parallel == TeacherParallelConfig(
        tensor_model_parallel_size=4, pipeline_model_parallel_size=2
    )
    path.write_text(path.read_text().replace("{tensor_model_parallel_size: 4}", "4"))
    with pytest.raises(ConfigError, match=r"teacher.parallel is a section with the keys tensor_model_parallel_size"):
        load_recipe("train", path)
