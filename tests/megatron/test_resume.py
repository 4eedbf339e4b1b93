"""Stop, go on, and end bit for bit where an uninterrupted run ends; and what a checkpoint refuses."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from renio_megatron.config.resume import to_yaml
from tests.helpers.multiprocess import run_ranks
from tests.helpers.resuming import error_of, rows, run, run_config
from tests.helpers.training_cases import save_models


def _nan_in_one_rank(folder: Path) -> str:
    """Rank 1's first norm weight becomes NaN before the first step."""
    from renio_megatron.megatron.runtime.initialize import start
    from renio_megatron.runner.build import build_trainer
    from renio_megatron.runner.inputs import read_inputs

    config = run_config(folder, "nan")
    layout = start(config.parallel, seed=1)
    trainer = build_trainer(config, read_inputs(config), layout, folder / "nan")
    learner = trainer.algorithm.learner
    finalize = learner.part.config.finalize_model_grads_func

    def poison(model: Any, *args: Any, **kwargs: Any) -> None:
        finalize(model, *args, **kwargs)
        if layout.rank == 1:
            learner.part.chunks[0].decoder.layers[1].mlp.linear_fc2.weight.main_grad[0, 0] = float("nan")

    learner.part.config.finalize_model_grads_func = poison
    before = {name: parameter.detach().clone() for name, parameter in learner.part.named_parameters()}
    message = error_of(trainer.run)
    after = dict(learner.part.named_parameters())
    unchanged = all(torch.equal(before[name], after[name]) for name in before)
    return f"{message} unchanged={unchanged}"


def _all(folder: Path) -> dict[str, Any]:
    """Everything that wants two ranks, in one launch."""
    found: dict[str, Any] = {"whole": run(run_config(folder, "whole"))}
    found["stopped"] = run(run_config(folder, "parts"), stop_before=4)
    found["resumed"] = run(run_config(folder, "parts"))
    found["again"] = run(run_config(folder, "parts"))
    other = replace(run_config(folder, "parts"), train=replace(run_config(folder, "parts").train, lr=1e-4))
    found["other settings"] = error_of(lambda: run(other))
    # Stopped before its first checkpoint: it starts over and writes no row twice.
    found["stopped early"] = run(run_config(folder, "early"), stop_before=2)
    found["restarted"] = run(run_config(folder, "early"))
    found["nan"] = _nan_in_one_rank(folder)
    import torch.distributed as dist

    if dist.get_rank() == 0:  # the same run directory, but its model was replaced by another one
        directory = folder / "replaced"
        shutil.copytree(folder / "whole", directory)
        (directory / "finished.json").unlink()
        (directory / "origins.json").unlink()  # as a version before this file left it
        (directory / "config.yaml").write_text(to_yaml(run_config(folder, "replaced", model=str(folder / "tied"))))
    dist.barrier()
    from megatron.core import dist_checkpointing

    common = dist_checkpointing.load_common_state_dict(str(folder / "whole" / "checkpoints" / "iter_0000004"))
    found["checkpoint holds"] = {key: common[key] for key in ("run", "config")}
    found["replaced"] = error_of(lambda: run(run_config(folder, "replaced", model=str(folder / "tied"))))
    if dist.get_rank() == 0:  # a run that is not over, and another teacher under the same path
        shutil.copytree(folder / "whole", folder / "swapped")
        (folder / "swapped" / "finished.json").unlink()
        weights = folder / "teacher" / "model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    dist.barrier()
    found["another teacher"] = error_of(lambda: run(run_config(folder, "swapped")))
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("resume")
    save_models(folder)
    return folder, run_ranks(_all, 2, folder, timeout=280)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", ["resumed", "restarted"])
def test_an_interrupted_run_ends_bit_for_bit_like_a_whole_one(name: str, found: Any) -> None:
    for rank in found[1]:
        assert rank[name]["step"] == rank["whole"]["step"] == 5
        for parameter, value in rank["whole"]["parameters"].items():
            assert torch.equal(rank[name]["parameters"][parameter], value), parameter


def test_the_parts_were_parts(found: Any) -> None:
    for rank in found[1]:
        assert (rank["stopped"]["outcome"], rank["stopped"]["step"]) == ("stopped", 3)
        assert rank["resumed"]["outcome"] == "resumed"
        assert rank["restarted"]["outcome"] == "new"
        whole, stopped = rank["whole"]["parameters"], rank["stopped"]["parameters"]
        assert not all(torch.equal(stopped[name], whole[name]) for name in whole)


@pytest.mark.parametrize("name", ["parts", "early"])
def test_metrics_hold_each_step_once_with_the_same_numbers(name: str, found: Any) -> None:
    found_rows = rows(found[0], name)
    assert [row["step"] for row in found_rows] == [0, 1, 2, 3, 4, 5]
    assert ["eval/accuracy_greedy" in row for row in found_rows] == [True, False, True, False, True, True]
    assert found_rows == rows(found[0], "whole")


def test_a_checkpoint_holds_cursor_weighting_state_and_settings(found: Any) -> None:
    folder, ranks = found
    holds = ranks[0]["checkpoint holds"]
    assert holds["run"]["cursor"] == 4 * 8
    assert float(holds["run"]["algorithm"]["weighting"]) > 1.0  # the moving average of raw weights
    assert holds["config"] == (folder / "whole" / "config.yaml").read_text()


def test_a_finished_run_says_so_and_does_nothing(found: Any) -> None:
    assert [rank["again"] for rank in found[1]] == [{"outcome": "finished"}] * 2


def test_other_settings_are_refused(found: Any) -> None:
    for rank in found[1]:
        assert "train.lr: was 0.003, is now 0.0001" in rank["other settings"]


def test_a_checkpoint_of_another_model_is_refused(found: Any) -> None:
    for rank in found[1]:
        assert rank["replaced"].startswith("CheckpointError")
        assert "another architecture (tied: False there, True here)" in rank["replaced"]


def test_another_teacher_under_the_same_path_is_refused(found: Any) -> None:
    for rank in found[1]:
        assert "a run that began with other files" in rank["another teacher"]
        assert "has changed since: teacher.model. Put back what was there" in rank["another teacher"]


def test_nan_on_one_rank_stops_all_and_changes_no_weight(found: Any) -> None:
    first, second = (rank["nan"] for rank in found[1])
    assert "step 1, rank 1: the gradient of decoder.layers.1.mlp.linear_fc2.weight holds NaN" in second
    assert "another rank's gradient is not finite" in first
    assert first.endswith("unchanged=True")
    assert second.endswith("unchanged=True")
