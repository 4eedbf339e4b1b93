"""Teachers of every kind in real runs: resumed bit for bit, their weights unchanged, averages against a plain sum."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from renio_megatron.settings.teacher import TEACHER_KINDS
from tests.lora_run_cases import DISTRIBUTED
from tests.multiprocess import run_ranks
from tests.resuming import rows, same
from tests.teacher_cases import CUT_OFF, LAYOUTS, TRAINED, averages_by_hand, moved, run_all
from tests.training_cases import save_models

pytestmark = pytest.mark.timeout(1200)

CASES = [f"{kind}, {trained}, {layout}" for kind in TEACHER_KINDS for trained in TRAINED for layout in LAYOUTS]
CASES += [f"ema, {trained}, DP2" for trained in TRAINED] + ["ema, full, PP2 tied"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teachers")
    save_models(folder)
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return run_ranks(run_all, 2, folder, timeout=900)


@pytest.mark.parametrize("name", CASES)
def test_a_run_that_was_cut_off_ends_with_the_same_bits(name: str, folder: Path, ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        whole, again = found[name], found[f"{name}, cut off"]
        assert (whole["outcome"], again["outcome"]) == ("new", "resumed")
        assert same(whole["parameters"], again["parameters"])
        assert same(whole["averages"], again["averages"])
        assert bool(whole["averages"]) == name.startswith("ema")
    assert rows(folder, name) == rows(folder, f"{name}, cut off")
    losses = [row["loss"] for row in rows(folder, name)]
    assert len(losses) == CUT_OFF
    assert losses[0] > 0


@pytest.mark.parametrize("name", CASES)
def test_what_is_frozen_of_a_teacher_stays_as_it_is(name: str, ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found[name]["changed"] == []
        is_trained_whole = name.startswith(("ema, full", "current, full"))
        assert (found[name]["frozen"] == 0) == is_trained_whole


def test_the_kinds_teach_different_things(folder: Path, ranks: list[dict[str, Any]]) -> None:
    for trained in TRAINED:
        losses = {kind: [row["loss"] for row in rows(folder, f"{kind}, {trained}, TP2")] for kind in TEACHER_KINDS}
        assert losses["initial"][0] == losses["ema"][0] == losses["current"][0] != losses["separate"][0]
        assert len({values[-1] for values in losses.values()}) == len(TEACHER_KINDS)


BY_HAND = {
    "TP2": {"parallel": LAYOUTS["TP2"]},
    "PP2 tied": {"parallel": LAYOUTS["PP2"], "model": "deep_tied"},
    "DP2, distributed optimiser": {"parallel": DISTRIBUTED},
    "PP2 x VPP2": {"parallel": replace(LAYOUTS["PP2"], virtual_pipeline_model_parallel_size=2)},
}


def _all_by_hand(folder: Path) -> dict[str, Any]:
    found = {}
    for name, changes in BY_HAND.items():
        changes = {**changes, "model": str(folder / changes.get("model", "deep"))}
        for trained in TRAINED:
            found[f"{name}, {trained}"] = averages_by_hand(folder, trained, changes)
    return found


@pytest.fixture(scope="module")
def by_hand(folder: Path) -> list[dict[str, Any]]:
    return run_ranks(_all_by_hand, 2, folder, timeout=600)


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("name", BY_HAND)
def test_the_average_is_that_of_the_weights_of_each_step(name: str, trained: str, by_hand: Any) -> None:
    for rank, found in enumerate(ranks[f"{name}, {trained}"] for ranks in by_hand):
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


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("name", BY_HAND)
def test_the_students_rollouts_are_the_students(name: str, trained: str, by_hand: Any) -> None:
    for found in (ranks[f"{name}, {trained}"] for ranks in by_hand):
        for step, (error, differs) in enumerate(found["rollouts"]):
            assert error < 5e-6  # the sampler's own log-probabilities are the student's
            assert differs == (step > 0)  # and the teacher's weights would have drawn others


def test_averages_load_in_another_layout_and_other_runs_are_told(folder: Path, ranks: Any) -> None:
    for found in run_ranks(moved, 2, folder, timeout=300):
        for trained, count in (("full", 11), ("LoRA", 14)):
            assert found[trained]["keys"] == count  # of a layer's parameters one each
            assert found[trained]["same"]
            assert found[trained]["differs from the student"]
        assert found["no average"].startswith("CheckpointError")
        assert "holds no moving average" in found["no average"]
        assert "teacher.kind" in found["no average"]
        assert found["to current"] == "resumed"  # its average is dropped
        assert "teacher.kind=ema with a student of which nothing is trained" in found["nothing trained"]
