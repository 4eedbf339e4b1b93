"""The loss in Megatron's own loop: the weights of the whole batch, and the trainer's gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.multiprocess import run_ranks
from tests.helpers.training_cases import save_models
from tests.megatron.own_loop_cases import refusals, routers, run_cases

TOLERANCE = 1e-5


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("world_size", "num_cases"), [(2, 35), (4, 7)])
def test_a_step_is_the_trainers(world_size: int, num_cases: int, tmp_path: Path) -> None:
    save_models(tmp_path)
    ranks: list[dict[str, Any]] = run_ranks(run_cases, world_size, world_size, tmp_path, timeout=280)
    for rank, found in enumerate(ranks):
        assert len(found) == num_cases
        for case, errors in found.items():
            assert errors["gradient"] < TOLERANCE, f"rank {rank}, {case}: {errors}"
            assert errors.get("weight", 0.0) < TOLERANCE, f"rank {rank}, {case}: {errors}"
            assert errors["batches"] == 4 and errors.get("sequences", 8) == 8
            assert errors.get("loss", 0.0) < TOLERANCE, f"rank {rank}, {case}: {errors}"
    for case in ranks[0]:
        last = [found[case] for found in ranks if "weight" in found[case]]
        assert last and min(one["unlike_1"] for one in last) > 0.05, "the weights would prove nothing"


REFUSED = {
    "none": "at least one micro-batch",
    "labels": "LoopBatch.labels is (1, 4), and tokens are (2, 4)",
    "shapes": "micro-batches of one step have one shape; got (2, 4) and (2, 3)",
    "given": "weights have the shape (3,), and this rank's batches hold 2 sequences",
    "no teacher": "the teacher's logits of a batch are None; the student's at its completion positions are (3, 17)",
    "narrow teacher": "the teacher's logits of a batch are (3, 5)",
    "other rows": "the teacher's logits of a batch are (4, 17)",
    "another batch": "a batch that `weigh` did not see",
    "twice in a step": "a batch is in the step twice",
    "drawn twice": "given a batch twice",
    "tokens weigh": "weighting=student_entropy weighs tokens. Leave one of the two out",
    "labels beyond": "token_ids must lie in [0, 17)",
    "a plan": "overlap_moe_expert_parallel_comm",
    "more predictions": "mtp_num_layers=1",
    "sequence first": "the model's output is (4, 2, 17), and the batch (2, 4)",
    "teacher sequence first": "the teacher's logits of a batch are (4, 2, 17)",
    **dict.fromkeys(("right", "rows", "hidden"), ""),
}


def test_what_does_not_fit_is_named() -> None:
    (said,) = run_ranks(refusals, 1)
    assert said.keys() == REFUSED.keys()
    for name, words in REFUSED.items():
        assert words in said[name] and bool(words) == bool(said[name]), f"{name}: {said[name]}"


def test_losses_of_routers_count_the_same_under_both_divisions() -> None:
    """Megatron scales them for a count of positions, and divides by what the loss counts."""
    for found in run_ranks(routers, 2):
        for coefficient in ("0.0", "5.0"):
            for one, other in zip(found[f"{coefficient}, False"], found[f"{coefficient}, True"], strict=True):
                assert float((one - other).norm()) <= TOLERANCE * float(one.norm())
        pairs = zip(found["0.0, True"], found["5.0, True"], strict=True)
        assert max(float((one - other).norm() / one.norm().clamp(min=1e-9)) for one, other in pairs) > 0.05
