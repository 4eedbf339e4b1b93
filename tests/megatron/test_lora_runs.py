"""Runs with adapters: checkpoints that hold nothing else, export and import as PEFT's, the student as teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from renio_megatron.megatron.checkpoint.directory import step_directory
from tests.helpers.multiprocess import Ranks, run_ranks
from tests.helpers.resuming import rows, same, tensors
from tests.helpers.training_cases import VOCAB_SIZE, save_models
from tests.megatron.lora_run_cases import (
    exported,
    generated,
    imported,
    refused,
    run_cut_off,
    run_moved,
    run_whole,
    self_teacher,
)

pytest.importorskip("peft")
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora runs")
    save_models(folder)
    return folder


@pytest.fixture(scope="module")
def peft_side(folder: Path, two_ranks: Ranks) -> dict[str, Any]:
    two_ranks.once(run_whole, "whole", folder)
    two_ranks.once(refused, folder)
    prompts = [[1, 4, 9, 2], [3, 3, 7], [5, 2, 8, 6, 4]]
    return run_ranks(exported, 1, folder, prompts, timeout=200)[0]


@pytest.mark.matrix(2)
@pytest.mark.parametrize("name", ["whole", "distributed"])
def test_a_run_that_was_cut_off_ends_with_the_same_bits(name: str, folder: Path, two_ranks: Ranks) -> None:
    whole = two_ranks.once(run_whole, name, folder)
    for found, again in zip(whole, two_ranks.once(run_cut_off, name, folder), strict=True):
        assert again["outcome"] == "resumed"
        assert same(found["parameters"], again["parameters"])
    assert rows(folder, name) == rows(folder, f"{name}, cut off")


@pytest.mark.matrix(2)
@pytest.mark.parametrize("name", ["distributed", "moved"])
def test_other_layouts_end_with_the_same_adapters(name: str, folder: Path, two_ranks: Ranks) -> None:
    """Which needs the same A at the start, and a checkpoint that loads in another layout with recomputation."""
    two_ranks.once(run_whole, "whole", folder)
    two_ranks.once(run_moved, folder) if name == "moved" else two_ranks.once(run_whole, name, folder)
    one, other = (tensors(step_directory(folder / run / "checkpoints", 5), VOCAB_SIZE) for run in ("whole", name))
    names = [key for key in one if "optimizer" not in key]
    assert names
    for key in names:
        torch.testing.assert_close(other[key], one[key], rtol=1e-3, atol=1e-5)


def test_a_checkpoint_holds_adapters_and_their_moments_alone(folder: Path, two_ranks: Ranks) -> None:
    two_ranks.once(run_whole, "whole", folder)
    keys = tensors(step_directory(folder / "whole" / "checkpoints", 5), VOCAB_SIZE)
    assert len(keys) == 3 * 2 * 7  # a parameter and two moments, of A and B, of seven targets
    assert all(".adapters." in key for key in keys)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("other rank", ["holds adapters (lora.r: 3", "adapters (lora.r: 2", "Set `lora`"]),
        ("no adapters", ["holds adapters (lora.r: 3", "a whole model (lora.r: null)", "--merge"]),
        ("other base", ["trained beside other weights than those of `model`", "Point the setting to", "--fresh"]),
        ("whole model", ["holds a whole model", "adapters (lora.r: 3"]),
    ],
)
def test_checkpoints_of_other_adapters_are_refused(name: str, words: list[str], folder: Path, two_ranks: Ranks) -> None:
    two_ranks.once(run_whole, "whole", folder)
    for found in two_ranks.once(refused, folder):
        assert found[name].startswith("CheckpointError"), found[name]
        for word in words:
            assert word in found[name]


def test_the_teacher_is_the_student_without_its_adapters(folder: Path, two_ranks: Ranks) -> None:
    for found in two_ranks(self_teacher, folder):
        assert found["is the student"]
        assert max(found["errors"]) == 0.0
        assert min(found["student differs"][1:]) > 1e-3  # before the first step B is 0, and the views differ alone
        assert len(found["trained"]) == 14
        assert found["steps"] == 5


def test_the_adapter_and_the_merged_model_generate_the_same(peft_side: dict[str, Any]) -> None:
    assert peft_side["files"]["adapter"] == ["adapter_config.json", "adapter_model.safetensors"]
    assert peft_side["tokens"]["adapter"] == peft_side["tokens"]["merged"]
    assert peft_side["merged logits"] < 1e-5
    assert peft_side["change"] > 1e-2
    assert "--merge has nothing to merge" in peft_side["not merged"]
    for message in peft_side["other base"].values():
        assert "trained beside other weights than those of `model`" in message


def test_an_imported_adapter_generates_what_peft_generates(
    folder: Path, two_ranks: Ranks, peft_side: dict[str, Any]
) -> None:
    by_rank = two_ranks(imported, folder)
    ours = by_rank[0]["TP2 + SP"]
    theirs = run_ranks(generated, 1, folder, ours["prompts"], timeout=200)[0]
    for name in ("TP2 + SP", "PP2"):
        for tokens, expected in zip(by_rank[0][name]["tokens"], theirs, strict=True):
            assert tokens == expected[: len(tokens)]
    for whole, found in zip(two_ranks.once(run_whole, "whole", folder), by_rank, strict=True):
        for key, value in found["TP2 + SP"]["parameters"].items():
            assert torch.equal(value, whole["parameters"][key])
    for word in ("lora.r: 3 there, 4 here", "lora.targets", "['q_proj'] here"):
        assert word in by_rank[0]["other"]
    assert "trained beside another model" in by_rank[0]["other model"]
    assert "adapter_config.json cannot be read" in by_rank[0]["nowhere"]
