"""Adapters on Megatron's parallel linear layers: logits, gradients and a step of AdamW against PEFT."""

from __future__ import annotations

import pytest

from tests.lora_cases import CASES, FOUR_RANKS, MUTANTS, MUTANTS_OF_FOUR, run_lora
from tests.lora_sft_cases import run_all
from tests.multiprocess import run_ranks
from tests.training_cases import save_models

pytest.importorskip("peft")
pytestmark = pytest.mark.timeout(1500)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    """Case -> largest figures over the ranks; two launches."""
    folder = tmp_path_factory.mktemp("lora")
    save_models(folder)
    merged: dict[str, dict[str, float]] = {}
    for by_rank in (run_ranks(run_all, 2, folder, timeout=800), run_ranks(run_lora, 4, folder, 4, timeout=600)):
        for name in by_rank[0]:
            merged[name] = {key: max(found[name][key] for found in by_rank) for key in by_rank[0][name]}
    return merged


@pytest.mark.parametrize("name", [*CASES, *FOUR_RANKS])
def test_a_step_equals_peft(name: str, results: dict[str, dict[str, float]]) -> None:
    found = results[name]
    assert found["frozen"] == 0.0
    assert found["trained"] == found["adapters"]  # nothing else is in the gradients' buffers
    assert found["smallest_gradient"] > 1e-4  # a gradient of 0 would prove nothing
    if name in CASES and CASES[name].train.get("bf16"):  # PEFT's own model in bf16 is as far from fp32
        assert found["all gradients"] < 2 * found["floor"]
        assert found["grad_norm"] < 2e-2
        return
    for figure in ("logits", "sampler", "loss", "gradient", "grad_norm", "weight"):
        assert found[figure] < 1e-5, (figure, found)


def test_a_step_of_fine_tuning_equals_peft(results: dict[str, dict[str, float]]) -> None:
    assert results["sft"]["loss"] < 1e-5
    assert results["sft"]["grad_norm"] < 1e-5


def test_gathers_under_way_are_waited_for(results: dict[str, dict[str, float]]) -> None:
    assert results["overlap"]["overlap"] < 1e-6
    assert results["overlap"]["not called"] > 1e-3


@pytest.mark.parametrize("name", [*MUTANTS, *MUTANTS_OF_FOUR])
def test_a_mutant_is_seen(name: str, results: dict[str, dict[str, float]]) -> None:
    _, _, figure = {**MUTANTS, **MUTANTS_OF_FOUR}[name]
    assert results[name][figure] > 1e-3, results[name]
