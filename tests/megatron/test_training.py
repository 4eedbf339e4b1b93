"""One update through the trainer and Megatron's own schedules, in every layout, against a single process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from renio_megatron.config import LossConfig, ParallelConfig, WeightingConfig
from renio_megatron.config.sections.combined_weighting import PermutedWeighting, ProductWeighting
from renio_megatron.config.sections.weighting import LengthWeighting, RenioWeighting, StudentEntropyWeighting
from tests.fakes.strategies import GateWeighting, HardestWeighting
from tests.helpers.multiprocess import Ranks
from tests.helpers.training_cases import layout_of, one_step, recipe

TOLERANCE = 1e-5
ABOVE = 2.3  # nats; about half of the tokens
RENIO = RenioWeighting(threshold=0.3, ceiling=1.5)
WEIGHTINGS = {
    "renio x entropies": ProductWeighting(factors=(RENIO, StudentEntropyWeighting())),
    "renio x length": ProductWeighting(factors=(RENIO, LengthWeighting())),
    "entropies of the batch": StudentEntropyWeighting(normalize="batch"),
    "permuted renio": PermutedWeighting(of=RENIO),
    "permuted entropies": PermutedWeighting(of=StudentEntropyWeighting()),
    "entropies where the teacher is unsure": GateWeighting(above=ABOVE),
    "divergence": HardestWeighting(),
}
DRAWS = {"prefixes": {"prefix_length": 3}, "4 a prompt": {"completions_per_prompt": 4}}


def _cases(folder: Path, world_size: int) -> dict[str, Any]:
    """Name -> settings; every case has the same rollouts."""
    base = recipe(folder)
    small = replace(base.train, micro_batch_size=1)
    large = replace(base.train, micro_batch_size=4)
    recompute = replace(base.rollout, student_scores="recompute")
    tp, pp, tied = layout_of(2), layout_of(1, 2), str(folder / "tied")
    shared, context = layout_of(2, sp=True), ParallelConfig(context_parallel_size=2)
    layouts = {"TP2 + SP": shared, "PP2": pp, "CP2": context, "DP2": layout_of()}
    if world_size == 4:
        both = layout_of(2, 2)
        return {
            "TP2 x PP2": recipe(folder, parallel=both),
            "TP2 x PP2, micro-batch 1": recipe(folder, parallel=both, train=small),
            "TP2 x PP2 + SP": recipe(folder, parallel=layout_of(2, 2, sp=True)),
            "TP2 x DP2": recipe(folder, parallel=tp),
            "PP2 x DP2, tied": recipe(folder, parallel=pp, model=tied),
        }
    # Neighbours share a layout: its process groups are made once.
    return {
        "TP2": recipe(folder, parallel=tp),
        "TP2, micro-batch 1": recipe(folder, parallel=tp, train=small),
        "TP2, micro-batch 4": recipe(folder, parallel=tp, train=large),
        "TP2, recompute": recipe(folder, parallel=tp, rollout=recompute),
        "TP2, tied": recipe(folder, parallel=tp, model=tied),
        "TP2, JSD": recipe(folder, parallel=tp, loss=LossConfig(beta=0.3, temperature=1.1)),
        "TP2, clipped": recipe(folder, parallel=tp, loss=LossConfig(temperature=1.1, entry_clip=0.05)),
        "TP2 + SP": recipe(folder, parallel=shared),
        "TP2 + SP, micro-batch 1": recipe(folder, parallel=shared, train=small),
        "TP2 + SP, recompute": recipe(folder, parallel=shared, rollout=recompute),
        "TP2 + SP, tied": recipe(folder, parallel=shared, model=tied),
        "PP2": recipe(folder, parallel=pp),
        "PP2, micro-batch 1": recipe(folder, parallel=pp, train=small),
        "PP2, micro-batch 4": recipe(folder, parallel=pp, train=large),
        "PP2, recompute": recipe(folder, parallel=pp, rollout=recompute),
        "PP2, tied": recipe(folder, parallel=pp, model=tied),
        "PP2, plain OPD": recipe(folder, parallel=pp, weighting=WeightingConfig(name="uniform")),
        "DP2": recipe(folder),
        "DP2, micro-batch 1": recipe(folder, train=small),
        "DP2, micro-batch 4": recipe(folder, train=large),
        "DP2, recompute": recipe(folder, rollout=recompute),
        "DP2, reverse KL": recipe(folder, loss=LossConfig(beta=1.0, temperature=1.1)),
        **{
            f"{layout}, weighting {name}": recipe(folder, parallel=parallel, weighting=weighting)
            for layout, parallel in layouts.items()
            for name, weighting in WEIGHTINGS.items()
        },
        **{
            f"{layout}, drawn {name}": recipe(folder, parallel=parallel, rollout=replace(base.rollout, **settings))
            for layout, parallel in layouts.items()
            for name, settings in DRAWS.items()
        },
    }


def _run_case(name: str, folder: Path) -> dict[str, Any]:
    return one_step((_cases(folder, 2) | _cases(folder, 4))[name], folder)


@pytest.fixture(scope="module")
def result(models: Path, two_ranks: Ranks, four_ranks: Ranks) -> Callable[[str], list[dict[str, Any]]]:
    """Case -> what each rank found."""

    def of(name: str) -> list[dict[str, Any]]:
        return (two_ranks if name in _cases(models, 2) else four_ranks).once(_run_case, name, models)

    return of


CASES = [name for world_size in (2, 4) for name in _cases(Path(), world_size)]


@pytest.mark.matrix(5)
@pytest.mark.parametrize("name", CASES)
def test_update_equals_the_single_process_reference(name: str, result: Any) -> None:
    for rank, found in enumerate(result(name)):
        assert found["gradient_error"] < TOLERANCE, f"rank {rank}: {found}"
        assert found["grad_norm_error"] < TOLERANCE
        assert found["loss_error"] < TOLERANCE
        assert found["weight_error"] < TOLERANCE
        # The comparison would prove nothing about weights if no token were pivotal.
        assert found["raw_weights_not_1"] > 2


@pytest.mark.matrix(5)
def test_every_layout_draws_the_same_rollouts(result: Any) -> None:
    untied = [found for name in CASES if "tied" not in name and "drawn" not in name for found in result(name)]
    tied = [found for name in CASES if "tied" in name for found in result(name)]
    for group in (untied, tied):
        assert all(found["tokens"] == group[0]["tokens"] for found in group)
    assert len(untied[0]["tokens"]) == 8
    assert len(set(untied[0]["tokens"])) > 4  # not eight copies of one completion


@pytest.mark.matrix(5)
def test_prefixes_are_the_first_tokens_of_the_same_draws(result: Any) -> None:
    whole = result("DP2")[0]["tokens"]
    assert max(map(len, whole)) == 6
    for found in _drawn("prefixes", result):
        assert found["tokens"] == [tokens[:3] for tokens in whole]
        assert found["unread"] == [tokens[3:] for tokens in whole]


@pytest.mark.matrix(5)
def test_completions_of_a_prompt_are_different_draws_and_the_same_ones_in_every_layout(result: Any) -> None:
    once = result("DP2")[0]["prompts"]
    first, *others = _drawn("4 a prompt", result)
    assert first["prompts"] == [prompt for prompt in once[:2] for _ in range(4)]
    assert len(set(first["tokens"][:4])) > 2 and len(set(first["tokens"][4:])) > 2
    assert all(found["tokens"] == first["tokens"] for found in others)


def _drawn(name: str, result: Any) -> list[dict[str, Any]]:
    return [found for case in CASES if case.endswith(f"drawn {name}") for found in result(case)]


@pytest.mark.matrix(5)
def test_micro_batch_and_layout_change_no_weight(result: Any) -> None:
    others = ("tied", "KL", "JSD", "clipped", "plain", "weighting", "drawn")
    plain = [name for name in CASES if not any(word in name for word in others)]
    first = result(plain[0])[0]
    assert max(first["weights"]) > 1.05
    for name in plain:
        for found in result(name):
            assert found["weights"] == pytest.approx(first["weights"], abs=1e-5)
            assert found["loss"] == pytest.approx(first["loss"], rel=1e-5)


@pytest.mark.matrix(5)
@pytest.mark.parametrize("name", WEIGHTINGS)
def test_every_strategy_gives_the_same_weights_in_every_layout(name: str, result: Any) -> None:
    first, *others = [found for case in CASES if case.endswith(f"weighting {name}") for found in result(case)]
    assert max(first["weights"] + first["token_weights"]) > 1.05
    for found in others:
        assert found["weights"] == pytest.approx(first["weights"], abs=1e-5)
        assert found["token_weights"] == pytest.approx(first["token_weights"], abs=1e-5)


@pytest.mark.matrix(5)
def test_permuted_weights_are_not_those_of_their_sequences(result: Any) -> None:
    for permuted, own, what in (
        ("DP2, weighting permuted renio", "DP2", "weights"),
        ("DP2, weighting permuted entropies", "DP2, weighting renio x entropies", "token_weights"),
    ):
        found, before = (result(name)[0][what] for name in (permuted, own))
        assert found != pytest.approx(before, abs=1e-3)
        assert sorted(found) == pytest.approx(sorted(before), abs=1e-5)
