"""Adapters on Megatron's parallel linear layers: logits, gradients and a step of AdamW against PEFT."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from renio_megatron.config import LoraConfig
from tests.helpers.multiprocess import Ranks
from tests.helpers.training_cases import save_models
from tests.megatron.lora_cases import ALL, CASES, DROPPED, FOUR_RANKS
from tests.megatron.lora_mutants import MUTANTS, MUTANTS_OF_FOUR, run_named
from tests.megatron.lora_sft_cases import run_overlap, run_sft

pytest.importorskip("peft")
Result = Callable[..., dict[str, float]]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory, two_ranks: Ranks, four_ranks: Ranks) -> Result:
    """(function, names) -> the largest figures over the ranks, of which there are as many as the names ask for."""
    folder = tmp_path_factory.mktemp("lora")
    save_models(folder)

    def of(function: Callable[..., dict[str, float]], *names: Any) -> dict[str, float]:
        on_four = any(name in (*FOUR_RANKS, *MUTANTS_OF_FOUR) for name in names)
        by_rank = (four_ranks if on_four else two_ranks)(function, *names, folder)
        return {key: max(found[key] for found in by_rank) for key in by_rank[0]}

    return of


@pytest.mark.matrix(9)
@pytest.mark.parametrize("name", [*CASES, *FOUR_RANKS])
def test_a_step_equals_peft(name: str, result: Result) -> None:
    found = result(run_named, name)
    assert found["frozen"] == 0.0
    assert found["trained"] == found["adapters"]  # nothing else is in the gradients' buffers
    assert found["smallest_gradient"] > 1e-4  # a gradient of 0 would prove nothing
    if name in CASES and CASES[name].train.get("bf16"):  # PEFT's own model in bf16 is as far from fp32
        assert found["all gradients"] < 2 * found["floor"]
        assert found["grad_norm"] < 2e-2
        return
    for figure in ("logits", "sampler", "loss", "gradient", "grad_norm", "weight"):
        assert found[figure] < 1e-5, (figure, found)


@pytest.mark.parametrize("lora", [ALL, DROPPED], ids=["plain", "dropout"])
def test_a_step_of_fine_tuning_equals_peft(lora: LoraConfig, result: Result) -> None:
    found = result(run_sft, lora)
    assert found["loss"] < 1e-5
    assert found["grad_norm"] < 1e-5


def test_gathers_under_way_are_waited_for(result: Result) -> None:
    found = result(run_overlap)
    assert found["overlap"] < 1e-6
    assert found["not called"] > 1e-3


@pytest.mark.matrix(9)
@pytest.mark.parametrize("name", [*MUTANTS, *MUTANTS_OF_FOUR])
def test_a_mutant_is_seen(name: str, result: Result) -> None:
    _, _, figure = {**MUTANTS, **MUTANTS_OF_FOUR}[name]
    found = result(run_named, name)
    assert found[figure] > 1e-3, found
