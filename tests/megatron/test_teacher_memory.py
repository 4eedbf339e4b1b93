"""What a teacher takes of memory; offloaded, in a dtype of its own, with an adapter merged by PEFT's arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.multiprocess import run_ranks
from tests.helpers.training_cases import save_models
from tests.megatron.teacher_cases import LAYOUTS
from tests.megatron.teacher_memory_cases import ADAPTERS, measured, merged, own_dtype, save_adapters

pytestmark = pytest.mark.timeout(900)
SLACK = 4096
"""Bytes of buffers that are no parameters: rotary frequencies, counters."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher memory")
    save_models(folder)
    return folder


def _everything(folder: Path) -> dict[str, Any]:
    return {"measured": measured(folder), "dtypes": own_dtype(folder)}


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return run_ranks(_everything, 2, folder, timeout=600)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["separate", "initial"])
def test_a_frozen_teacher_takes_its_parameters(kind: str, layout: str, ranks: Any) -> None:
    for found in (rank["measured"][f"{kind}, {layout}, None"] for rank in ranks):
        assert found["parameters"] > 20_000
        for when in ("at first", "during", "between"):
            assert found["parameters"] <= found[when] <= 1.05 * found["parameters"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["separate", "initial"])
def test_an_offloaded_teacher_is_on_the_device_during_its_passes_only(kind: str, layout: str, ranks: Any) -> None:
    for rank, found in enumerate(rank["measured"] for rank in ranks):
        away, here = found[f"{kind}, {layout}, host"], found[f"{kind}, {layout}, None"]
        has_head = layout == "TP2" or rank == 1
        stays = away["parameters"] - away["waiting"]  # the head, which may be the embedding
        assert (stays > 0) == has_head
        assert stays < 0.2 * away["parameters"]
        assert away["during"] >= away["parameters"]
        for when in ("at first", "between"):
            assert stays <= away[when] <= stays + SLACK
        assert len(here["scores"]) == len(away["scores"])
        assert all(torch.equal(a, b) for a, b in zip(here["scores"], away["scores"], strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "added"), [("fp32", 0), ("bf16", 2)])
def test_an_average_takes_four_bytes_a_parameter_and_its_dtype_during_a_pass(
    dtype: str, added: int, layout: str, ranks: Any
) -> None:
    for found in (rank["measured"][f"ema, {layout}, {dtype}"] for rank in ranks):
        for when, each in (("at first", 4), ("during", 4 + added), ("between", 4)):
            assert 0 <= found[when] - each * found["entries"] <= SLACK, when


def test_a_teacher_may_have_a_dtype_of_its_own(ranks: Any) -> None:
    for found in (rank["dtypes"] for rank in ranks):
        fp32, bf16 = "torch.float32", "torch.bfloat16"
        assert found["same"]["dtypes"] == (fp32, fp32)
        assert found["bf16 teacher"]["dtypes"] == (fp32, bf16)
        assert found["fp32 teacher"]["dtypes"] == (bf16, fp32)
        one, other = found["same"], found["bf16 teacher"]  # the same rollouts
        assert 0 < float((one["logp"] - other["logp"]).abs().max()) < 0.1
        for name in ("bf16 teacher", "fp32 teacher"):
            assert found[name]["loss"] == pytest.approx(one["loss"], rel=0.3)


def test_an_adapter_is_merged_as_peft_merges_it(folder: Path) -> None:
    pytest.importorskip("peft")
    save_adapters(folder)
    for found in run_ranks(merged, 2, folder, timeout=300):
        for adapter in ADAPTERS:
            for layout in ("TP2 + SP", "PP2", "TP1"):
                error, change = found[f"{adapter}, {layout}"]
                assert error < 1e-6
                assert change > 0.1
        assert "It was trained beside another model" in found["other model"]
        assert "teacher.adapter: " in found["nowhere"]
        assert "adapter_config.json cannot be read" in found["nowhere"]
        assert "use_dora=True" in found["dora"]
