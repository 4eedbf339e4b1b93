"""Teachers of every kind in real runs: resumed bit for bit, their weights unchanged, averages against a plain sum."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from renio_megatron.config.sections.teacher import TEACHER_KINDS
from tests.helpers.multiprocess import Ranks
from tests.helpers.resuming import rows, same
from tests.helpers.training_cases import save_models
from tests.megatron.lora_run_cases import DISTRIBUTED
from tests.megatron.teacher_cases import CUT_OFF, LAYOUTS, TRAINED, averages_by_hand, moved, run_cut_off, run_whole

CASES = [f"{kind}, {trained}, {layout}" for kind in TEACHER_KINDS for trained in TRAINED for layout in LAYOUTS]
CASES += [f"ema, {trained}, DP2" for trained in TRAINED] + ["ema, full, PP2 tied"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teachers")
    save_models(folder)
    return folder


@pytest.mark.matrix(7)
@pytest.mark.parametrize("name", CASES)
def test_a_run_that_was_cut_off_ends_with_the_same_bits(name: str, folder: Path, two_ranks: Ranks) -> None:
    for whole, again in zip(
        two_ranks.once(run_whole, name, folder), two_ranks.once(run_cut_off, name, folder), strict=True
    ):
        assert (whole["outcome"], again["outcome"]) == ("new", "resumed")
        assert same(whole["parameters"], again["parameters"])
        assert same(whole["averages"], again["averages"])
        assert bool(whole["averages"]) == name.startswith("ema")
    assert rows(folder, name) == rows(folder, f"{name}, cut off")
    losses = [row["loss"] for row in rows(folder, name)]
    assert len(losses) == CUT_OFF
    assert losses[0] > 0


@pytest.mark.matrix(7)
@pytest.mark.parametrize("name", CASES)
def test_what_is_frozen_of_a_teacher_stays_as_it_is(name: str, folder: Path, two_ranks: Ranks) -> None:
    for found in two_ranks.once(run_whole, name, folder):
        assert found["changed"] == []
        is_trained_whole = name.startswith(("ema, full", "current, full"))
        assert (found["frozen"] == 0) == is_trained_whole


@pytest.mark.matrix(7)
def test_the_kinds_teach_different_things(folder: Path, two_ranks: Ranks) -> None:
    for trained in TRAINED:
        losses = {}
        for kind in TEACHER_KINDS:
            name = f"{kind}, {trained}, TP2"
            two_ranks.once(run_whole, name, folder)
            losses[kind] = [row["loss"] for row in rows(folder, name)]
        assert losses["initial"][0] == losses["ema"][0] == losses["current"][0] != losses["separate"][0]
        assert len({values[-1] for values in losses.values()}) == len(TEACHER_KINDS)


BY_HAND = {
    "TP2": {"parallel": LAYOUTS["TP2"]},
    "PP2 tied": {"parallel": LAYOUTS["PP2"], "model": "deep_tied"},
    "DP2, distributed optimiser": {"parallel": DISTRIBUTED},
    "PP2 x VPP2": {"parallel": replace(LAYOUTS["PP2"], virtual_pipeline_model_parallel_size=2)},
}


def _by_hand(name: str, trained: str, folder: Path) -> dict[str, Any]:
    changes: dict[str, Any] = {"model": "deep", **BY_HAND[name]}
    return averages_by_hand(folder, trained, {**changes, "model": str(folder / changes["model"])})


@pytest.mark.matrix(5)
@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("name", BY_HAND)
def test_the_average_is_that_of_the_weights_of_each_step(
    name: str, trained: str, folder: Path, two_ranks: Ranks
) -> None:
    for rank, found in enumerate(two_ranks.once(_by_hand, name, trained, folder)):
        assert len(found["average"]) == 4
        assert max(found["average"]) < 4e-7
        assert found["moved"] > 1e-3  # the student is elsewhere
        assert not found["skipped changes"]
        assert found["restored"]
        assert found["after an exception"]
        # A separate teacher with those values says the same, to what fp32 keeps of them.
        assert max(found["logp"]) < 5e-6
        assert max(found["payload"], default=0.0) < 5e-6
        assert max(found["loss"]) < 5e-6
        is_last = "PP2" not in name or rank == 1
        if is_last and trained == "full":  # else the head is not trained
            assert max(found["student loss"][1:]) > 1e-3


@pytest.mark.matrix(5)
@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("name", BY_HAND)
def test_the_students_rollouts_are_the_students(name: str, trained: str, folder: Path, two_ranks: Ranks) -> None:
    for found in two_ranks.once(_by_hand, name, trained, folder):
        for step, (error, differs) in enumerate(found["rollouts"]):
            assert error < 5e-6  # the sampler's own log-probabilities are the student's
            assert differs == (step > 0)  # and the teacher's weights would have drawn others


def test_averages_load_in_another_layout_and_other_runs_are_told(folder: Path, two_ranks: Ranks) -> None:
    for name in ("ema, full, TP2", "ema, LoRA, TP2", "initial, full, TP2"):
        two_ranks.once(run_whole, name, folder)
    for found in two_ranks(moved, folder):
        for trained, count in (("full", 11), ("LoRA", 14)):
            assert found[trained]["keys"] == count  # of a layer's parameters one each
            assert found[trained]["same"]
            assert found[trained]["differs from the student"]
        assert found["no average"].startswith("CheckpointError")
        assert "holds no moving average" in found["no average"]
        assert "teacher.kind" in found["no average"]
        assert found["to current"] == "resumed"  # its average is dropped
        assert "teacher.kind=ema with a student of which nothing is trained" in found["nothing trained"]
