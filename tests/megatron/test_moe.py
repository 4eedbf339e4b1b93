"""Students and teachers with experts: steps in every layout against transformers, their mutants, and whole runs."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.multiprocess import Ranks, run_ranks
from tests.helpers.paths import ROOT
from tests.helpers.resuming import rows, same
from tests.helpers.training_cases import VOCAB_SIZE
from tests.megatron import moe_run_cases
from tests.megatron.moe_cases import CASES, CASES_ON_4, MIXTURES, MUTANTS, run_mutant, run_named, save_mixtures

pytestmark = pytest.mark.timeout(700)

TOLERANCE = 1e-5
FIGURES = ("experts", "router", "others", "loss", "weight", "sampler", "grad_norm")
OF_ROUTERS = ("moe/aux_loss", "moe/load_max_over_mean", "moe/idle_frac", "moe/router_entropy")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mixtures")
    save_mixtures(root)
    return root


def _is_right(case: Any, found: dict[str, float]) -> None:
    is_mixture = case.model in MIXTURES
    if case.train.get("bf16"):  # nearness of single tensors, and of the drawn tokens' logits, is bf16's own affair
        assert found["all"] < 0.03
        assert found["loss"] < 0.01
        assert found["moe/aux_loss"] < 0.01
        return
    for figure in (*FIGURES, *(OF_ROUTERS if is_mixture else ())):
        assert found[figure] < TOLERANCE, figure
    assert found["unlike_1"] >= 4, "sample weights that do something"
    if is_mixture and case.train.get("moe_aux_loss_coeff") != 0:
        assert found["aux_share"] > 0.3, "the load-balancing loss makes a good part of the router's gradient"


@pytest.mark.matrix(9)
@pytest.mark.parametrize("name", CASES)
def test_a_step_is_that_of_a_single_process(two_ranks: Ranks, folder: Path, name: str) -> None:
    for found in two_ranks.once(run_named, name, folder):
        _is_right(CASES[name], found)


@pytest.mark.matrix(2)
@pytest.mark.parametrize("name", CASES_ON_4)
def test_a_step_on_four_ranks_is_that_of_a_single_process(four_ranks: Ranks, folder: Path, name: str) -> None:
    for found in four_ranks(run_named, name, folder):
        _is_right(CASES_ON_4[name], found)


def test_some_expert_has_no_token(two_ranks: Ranks, folder: Path) -> None:
    assert two_ranks.once(run_named, "EP2", folder)[0]["idle_experts"] > 0


@pytest.mark.matrix(9)
@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_seen(two_ranks: Ranks, folder: Path, name: str) -> None:
    figure = MUTANTS[name][3]
    assert max(found[figure] for found in two_ranks(run_mutant, name, folder)) > 100 * TOLERANCE


@pytest.fixture(scope="module")
def exports(folder: Path) -> None:
    """A run directory for each export, as a run leaves it, still without checkpoints."""
    from renio_megatron.config.load import load_recipe
    from renio_megatron.config.resume import to_yaml

    recipe = ROOT / "examples" / "modchain" / "student.yaml"
    for model in MIXTURES:
        for layout in moe_run_cases.SAVED_IN:
            run = folder / "exports" / f"{model}, {layout}"
            run.mkdir(parents=True)
            settings = [f"model='{folder / model}'", f"output_dir='{run}'"]
            (run / "config.yaml").write_text(to_yaml(load_recipe("sft", recipe, settings).config))


@pytest.mark.matrix(9)
@pytest.mark.parametrize("layout", moe_run_cases.LAYOUTS)
@pytest.mark.parametrize("model", MIXTURES)
def test_logits_are_those_of_transformers(
    two_ranks: Ranks, exports: None, folder: Path, model: str, layout: str
) -> None:
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(folder / model, dtype=torch.float32)
    with torch.no_grad():
        expected = torch.cat([reference(torch.tensor([row])).logits[0] for row in moe_run_cases.rows()])
    found = two_ranks.once(moe_run_cases.logits_in, layout, model, folder)
    assert any(logits is not None for logits, *_ in found)
    for logits, num_bytes, own_bytes in found:
        if logits is not None:
            torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0.0)
        # Each rank reads what its parameters are made of, less the rows that pad its vocabulary.
        assert num_bytes <= own_bytes <= num_bytes + 2 * 4 * 32


@pytest.mark.matrix(9)
def test_exports_are_bit_for_bit_what_was_imported(two_ranks: Ranks, exports: None, folder: Path) -> None:
    for model, layout in itertools.product(MIXTURES, moe_run_cases.SAVED_IN):
        two_ranks.once(moe_run_cases.logits_in, layout, model, folder)
    [names] = run_ranks(moe_run_cases.export_all, 1, folder, timeout=200)
    assert len(names) == 2 * len(MIXTURES)
    for name in names:
        source = load_file(folder / name.rpartition(",")[0] / "model.safetensors")
        source.pop("lm_head.weight") if "tied" in name else None
        assert same(load_file(folder / "exported" / name / "model.safetensors"), source)


@pytest.mark.matrix(3)
@pytest.mark.parametrize("layout", ["EP2", "CP2", "SP"])
def test_fine_tuning_weighs_sequences_as_its_loss_does(two_ranks: Ranks, folder: Path, layout: str) -> None:
    for found in two_ranks(moe_run_cases.fine_tune, layout, folder):
        assert max(found.values()) < TOLERANCE, found


def test_adapters_on_attention_learn_beside_shared_experts(two_ranks: Ranks, folder: Path) -> None:
    for found in two_ranks(moe_run_cases.adapters_on_attention, folder):
        assert max(found.values()) < TOLERANCE, found


def test_ranks_that_share_experts_may_have_different_numbers_of_prompts(two_ranks: Ranks, folder: Path) -> None:
    sampled = two_ranks(moe_run_cases.uneven_sampling, folder)
    for key, own in sampled[0].items():
        completions = {**own, **sampled[1][key]}
        assert len(completions) == 3
        assert completions == {**sampled[0]["EP1", (3, 0)]}


@pytest.mark.matrix(9)
@pytest.mark.parametrize("name", moe_run_cases.MOVES)
def test_a_run_goes_on_in_another_layout(two_ranks: Ranks, folder: Path, name: str) -> None:
    assert [found["outcome"] for found in two_ranks.once(moe_run_cases.move, name, folder)] == ["resumed"] * 2
    two_ranks.once(moe_run_cases.whole, "whole", folder)
    mine, whole = rows(folder, name), rows(folder, "whole")
    assert [row["step"] for row in mine] == list(range(moe_run_cases.STEPS + 1))
    for row, other in zip(mine, whole, strict=True):
        assert row.keys() == other.keys()
        for key in {"loss", "moe/aux_loss", "rollout/length", "eval/accuracy_greedy"} & row.keys():
            assert row[key] == pytest.approx(other[key], rel=1e-4), (row["step"], key)


def test_a_resumed_run_ends_with_the_same_bits(two_ranks: Ranks, folder: Path) -> None:
    again = two_ranks.once(moe_run_cases.move, "EP2 -> itself", folder)
    for found, whole in zip(again, two_ranks.once(moe_run_cases.whole, "whole EP2", folder), strict=True):
        assert same(found["parameters"], whole["parameters"])


def test_parameters_have_the_names_of_the_whole_model(two_ranks: Ranks, folder: Path) -> None:
    names = [set(found["parameters"]) for found in two_ranks.once(moe_run_cases.whole, "whole EP2", folder)]
    experts = [{name for name in mine if ".experts." in name} for mine in names]
    assert len(experts[0]) == len(experts[1]) == 4 * 3 * 2
    assert not experts[0] & experts[1]
    assert VOCAB_SIZE == 17
