"""Runs from adapters that took a part of the weights, and runs of a student with rows beyond the shared vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.multiprocess import Ranks
from tests.helpers.resuming import rows, same
from tests.helpers.training_cases import VOCAB_SIZE, save_models
from tests.megatron.start_cases import (
    LAYOUTS,
    MORE_ROWS,
    STARTS,
    exports_of_start,
    exports_with_rows,
    losses_at_the_start,
    run_of_start,
    run_with_rows,
    save_rows,
    save_starts,
)

pytest.importorskip("peft")
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("starts")
    save_models(folder)
    save_starts(folder)
    save_rows(folder)
    return folder


@pytest.fixture(scope="module")
def one_rank() -> Iterator[Ranks]:
    with Ranks(1, timeout=200) as rank:
        yield rank


@pytest.mark.matrix(3)
@pytest.mark.parametrize("start", STARTS)
def test_the_student_is_the_model_that_peft_merges(start: str, folder: Path, two_ranks: Ranks) -> None:
    for losses in two_ranks(losses_at_the_start, folder, start):
        assert losses["apart"] > 0.01
        assert all(losses[name] < 1e-6 for name in ("student", "both", "teacher")), losses


@pytest.mark.matrix(3)
@pytest.mark.parametrize("start", STARTS)
def test_its_run_goes_on_and_is_exported(start: str, folder: Path, two_ranks: Ranks, one_rank: Ranks) -> None:
    for found in two_ranks.once(run_of_start, folder, start):
        assert found["again"]["outcome"] == "resumed"
        assert same(found["whole"]["parameters"], found["again"]["parameters"])
        assert "trained beside other weights" in found["without"]
    assert rows(folder, f"{start} run") == rows(folder, f"{start} cut")
    found = one_rank(exports_of_start, folder, start)[0]
    assert found["start"] == start
    assert found["difference"] < 1e-5 and found["trained"] > 1e-3


ROWS = [("student", layout, False) for layout in LAYOUTS] + [
    ("tied", "TP2 + SP", False),
    ("tied", "PP2", True),
    ("student", "DP2, distributed", True),
]


@pytest.mark.matrix(8)
@pytest.mark.parametrize(("model", "layout", "bf16"), ROWS)
def test_rows_beyond_the_shared_vocabulary_stay(
    model: str, layout: str, bf16: bool, folder: Path, two_ranks: Ranks, one_rank: Ranks
) -> None:
    """Through weight decay, a resumption, `checkpoint.load`, `pretrained_checkpoint` and the export."""
    name = f"{model}, {layout}, {bf16}"
    for found in two_ranks(run_with_rows, folder, model, layout, bf16):
        assert all(loss < 1e-3 for loss in found["first losses"])  # student and teacher are one model
    one_rank(exports_with_rows, folder, [name])
    before = load_file(folder / f"{model} more" / "model.safetensors")
    for run in (name, f"{name}, loaded", f"{name}, own"):
        after = load_file(folder / f"{run} out" / "model.safetensors")
        for key in ("model.embed_tokens.weight", "lm_head.weight"):
            assert (key in before) == (key in after)
            if key in before:
                expected = before[key].to(torch.bfloat16).float() if bf16 else before[key]
                assert after[key].shape[0] == MORE_ROWS
                assert torch.equal(after[key][VOCAB_SIZE:].float(), expected[VOCAB_SIZE:]), (run, key)
                assert not torch.equal(after[key][:VOCAB_SIZE].float(), expected[:VOCAB_SIZE])
