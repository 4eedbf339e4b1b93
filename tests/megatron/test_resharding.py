"""A checkpoint of one layout in another: more data ranks or fewer, four ranks or one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from renio_megatron.config import CheckpointConfig, DataConfig, ParallelConfig
from tests.helpers.multiprocess import Ranks, run_ranks
from tests.helpers.resuming import full_at_step_4, rows, run, run_config, same, tensors, train_config
from tests.helpers.training_cases import VOCAB_SIZE, layout_of, save_models

LAYOUTS = {"2 data ranks": (2, 1), "2 tensor x 2 data ranks": (4, 2)}
"""Name: (ranks, tensor-parallel size)."""


def _first_part(folder: Path, name: str, tensor: int) -> Any:
    return run(run_config(folder, name, parallel=layout_of(tensor)), stop_before=4)["outcome"]


def _on_one_rank(folder: Path) -> dict[str, Any]:
    """A whole run on one rank; the other layouts' first parts saved as they are loaded, and continued."""
    from renio_megatron.megatron.checkpoint.checkpointer import MegatronCheckpointer
    from renio_megatron.megatron.runtime.initialize import start
    from renio_megatron.runner.build import build_trainer
    from renio_megatron.runner.inputs import read_inputs

    found: dict[str, Any] = {"whole": run(run_config(folder, "whole", parallel=layout_of(1)))["outcome"]}
    for name in LAYOUTS:
        config = run_config(folder, name, parallel=layout_of(1), train=train_config(micro_batch_size=8))
        trainer = build_trainer(
            config, read_inputs(config), start(config.parallel, seed=1), folder / name / "checkpoints"
        )
        assert trainer.resume() == 2
        MegatronCheckpointer(folder / f"{name} again", trainer.algorithm.learner).save(2, {})
        found[name] = run(config)["outcome"]
    # The common part of a checkpoint is the first rank's alone; the others would wait for it until they are ended.
    found["full"] = full_at_step_4(run_config(folder, "full", parallel=layout_of(1)), rank=0, limit=500)
    return found


_SHARDED = {"use_distributed_optimizer": True}
_OVERLAP = {**_SHARDED, "overlap_grad_reduce": True, "overlap_param_gather": True}
MOVES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "TP2 -> PP2 x VPP2": (
        {"tensor_model_parallel_size": 2},
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    ),
    "PP2 -> CP2, packed": ({"pipeline_model_parallel_size": 2}, {"context_parallel_size": 2}),
    "PP2 x VPP2 -> TP2 + SP": (
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
        {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    ),
    "distributed DP2 -> TP2": (_SHARDED, {**_SHARDED, "tensor_model_parallel_size": 2}),
    "overlapping DP2 -> PP2": (_OVERLAP, {**_SHARDED, "pipeline_model_parallel_size": 2}),
    "distributed CP2 -> overlapping DP2": ({**_SHARDED, "context_parallel_size": 2}, _OVERLAP),
    "overlapping DP2 -> itself": (_OVERLAP, _OVERLAP),
}
"""Name: the layout that saves, the layout that goes on; both on two ranks."""
STEPS, SAVED = 7, 3


def _config(name: str, parallel: dict[str, Any], folder: Path) -> Any:
    packed = "packed" in name and "context_parallel_size" in parallel
    return run_config(
        folder,
        name,
        model=str(folder / "deep"),
        parallel=ParallelConfig(**parallel),
        train=train_config(
            train_iters=STEPS,
            lr=1e-3,
            micro_batch_size=1 if packed else 2,
            max_tokens_per_micro_batch=64 if packed else None,
        ),
        data=DataConfig(seed=5, max_prompt_length=20),
        checkpoint=CheckpointConfig(save_interval=SAVED),
    )


def _whole(name: str, folder: Path) -> dict[str, Any]:
    """A run in one layout."""
    return run(_config(name, {"whole": {"tensor_model_parallel_size": 2}, "sharded whole": _OVERLAP}[name], folder))


def _move(name: str, folder: Path) -> dict[str, Any]:
    """Three steps in one layout, four more in the other."""
    first, second = MOVES[name]
    assert run(_config(name, first, folder), stop_before=SAVED + 2)["outcome"] == "stopped"
    return run(_config(name, second, folder))


@pytest.fixture(scope="module")
def moving(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moves")
    save_models(folder)
    return folder


@pytest.mark.matrix(4)
@pytest.mark.parametrize("name", MOVES)
def test_a_run_goes_on_in_another_layout(name: str, moving: Path, two_ranks: Ranks) -> None:
    two_ranks.once(_whole, "whole", moving)
    assert [found["outcome"] for found in two_ranks.once(_move, name, moving)] == ["resumed"] * 2
    mine, whole = rows(moving, name), rows(moving, "whole")
    assert [row["step"] for row in mine] == list(range(STEPS + 1))
    for row, other in zip(mine, whole, strict=True):
        if row["step"]:
            assert row["loss"] == pytest.approx(other["loss"], rel=1e-4)
            # The same prompts, and completions drawn alike.
            assert row["rollout/length"] == other["rollout/length"]
            assert row["renio/pivotal_frac"] == pytest.approx(other["renio/pivotal_frac"], abs=1e-9)
            assert row["weight/max"] == pytest.approx(other["weight/max"], rel=1e-4)


def test_a_distributed_optimiser_resumes_bit_for_bit(moving: Path, two_ranks: Ranks) -> None:
    again = two_ranks.once(_move, "overlapping DP2 -> itself", moving)
    for found, whole in zip(again, two_ranks.once(_whole, "sharded whole", moving), strict=True):
        assert same(found["parameters"], whole["parameters"])


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
        for values in (row, other):
            values.pop("memory/teacher_payload_mb", None)  # a rank's share of the batch
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
