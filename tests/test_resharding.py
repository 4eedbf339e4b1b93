"""A checkpoint of one layout in another: more data ranks or fewer, four ranks or one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.multiprocess import run_ranks
from tests.resuming import full_at_step_4, rows, run, run_config, same, tensors, train_config
from tests.training_cases import VOCAB_SIZE, layout_of, save_models

LAYOUTS = {"2 data ranks": (2, 1), "2 tensor x 2 data ranks": (4, 2)}
"""Name: (ranks, tensor-parallel size)."""


def _first_part(folder: Path, name: str, tensor: int) -> Any:
    return run(run_config(folder, name, parallel=layout_of(tensor)), stop_before=4)["outcome"]


def _on_one_rank(folder: Path) -> dict[str, Any]:
    """A whole run on one rank; the other layouts' first parts saved as they are loaded, and continued."""
    from renio_megatron.build import build_trainer, read_inputs
    from renio_megatron.megatron.checkpoint import MegatronKeeper
    from renio_megatron.megatron.start import start

    found: dict[str, Any] = {"whole": run(run_config(folder, "whole", parallel=layout_of(1)))["outcome"]}
    for name in LAYOUTS:
        config = run_config(folder, name, parallel=layout_of(1), train=train_config(micro_batch_size=8))
        trainer = build_trainer(
            config, read_inputs(config), start(config.parallel, seed=1), folder / name / "checkpoints"
        )
        assert trainer.resume() == 2
        MegatronKeeper(folder / f"{name} again", trainer.algorithm.learner).save(2, {})
        found[name] = run(config)["outcome"]
    # The common part of a checkpoint is the first rank's alone; the others would wait for it until they are ended.
    found["full"] = full_at_step_4(run_config(folder, "full", parallel=layout_of(1)), rank=0, limit=500)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("layouts")
    save_models(folder)
    for name, (ranks, tensor) in LAYOUTS.items():
        assert run_ranks(_first_part, ranks, folder, name, tensor, timeout=200) == ["stopped"] * ranks
    return folder, run_ranks(_on_one_rank, 1, folder, timeout=200)[0]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_checkpoint_of_many_ranks_is_whole_on_one(name: str, found: tuple[Path, dict[str, Any]]) -> None:
    folder, outcomes = found
    assert outcomes[name] == "resumed"
    before, after = folder / name / "checkpoints" / "iter_0000002", folder / f"{name} again" / "iter_0000002"
    saved = tensors(before, VOCAB_SIZE)
    assert any("exp_avg_sq" in key for key in saved)
    assert same(saved, tensors(after, VOCAB_SIZE)), "weights and optimiser, bit for bit"
    for row, other in zip(rows(folder, name), rows(folder, "whole"), strict=True):
        assert row == pytest.approx(other, rel=1e-4, abs=1e-6)
    whole = tensors(folder / "whole" / "checkpoints" / "iter_0000005", VOCAB_SIZE)
    for key, value in tensors(folder / name / "checkpoints" / "iter_0000005", VOCAB_SIZE).items():
        torch.testing.assert_close(value, whole[key], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_a_full_disk_on_the_first_rank_is_named_as_well(found: tuple[Path, dict[str, Any]]) -> None:
    full = found[1]["full"]
    assert full["message"].startswith("CheckpointError: the checkpoint of step 4 cannot be written to ")
    assert full["left"] == (2, [2], [])
    assert full["again"]["outcome"] == "resumed"
    assert rows(found[0], "full") == rows(found[0], "whole")
