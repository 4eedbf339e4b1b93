"""Stop, go on, and end bit for bit where an uninterrupted run ends; and what a checkpoint refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from renio_megatron.config import Recipe, RunConfig, to_yaml
from renio_megatron.errors import CheckpointError, ConfigError, NumericsError
from renio_megatron.settings import CheckpointConfig, TrainConfig, WeightingConfig
from tests.multiprocess import run_ranks
from tests.training_cases import layout_of, recipe, save_models

TIMES = ("time/step_s", "time/rollout_s", "time/teacher_s", "time/train_s", "tokens_per_s")


class Stopped(Exception):
    """The job ended here."""


def _config(folder: Path, name: str, **changes: Any) -> RunConfig:
    return recipe(
        folder,
        parallel=layout_of(2),
        # A stateful weighting: its moving average must come back, too.
        weighting=WeightingConfig(threshold=0.3, ceiling=1.5, normalise="ema"),
        train=TrainConfig(
            train_iters=5, global_batch_size=8, micro_batch_size=4, lr=3e-3, lr_decay_style="linear", seed=7
        ),
        checkpoint=CheckpointConfig(save_interval=2),
        output_dir=str(folder / name),
        **changes,
    )


def _run(config: RunConfig, *, stop_before: int | None = None) -> dict[str, Any]:
    """A run of the real job in this process; the parameters that it ends with."""
    import renio_megatron.run as run
    from renio_megatron.trainer import Trainer

    kept: dict[str, Any] = {}
    build, train_step = run.build_trainer, Trainer._train_step

    def build_and_keep(*args: Any, **kwargs: Any) -> Trainer:
        kept["trainer"] = build(*args, **kwargs)
        return kept["trainer"]

    def stop_there(self: Trainer) -> dict[str, float]:
        if self.step + 1 == stop_before:
            raise Stopped
        return train_step(self)

    run.build_trainer, Trainer._train_step = build_and_keep, stop_there  # type: ignore[method-assign]
    try:
        outcome = run.run_recipe(Recipe(config, frozenset(), "train"), fresh=False, title="test")
    except Stopped:
        outcome = "stopped"
    finally:
        run.build_trainer, Trainer._train_step = build, train_step  # type: ignore[method-assign]
    if "trainer" not in kept:
        return {"outcome": outcome}
    module = kept["trainer"].algorithm.learner.part.module
    parameters = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    return {"outcome": outcome, "parameters": parameters, "step": kept["trainer"].step}


def _error(function: Any) -> str:
    try:
        function()
    except (CheckpointError, ConfigError, NumericsError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def _nan_in_one_rank(folder: Path) -> str:
    """Rank 1's first norm weight becomes NaN before the first step."""
    from renio_megatron.build import build_trainer, read_inputs
    from renio_megatron.megatron.start import start

    config = _config(folder, "nan")
    layout = start(config.parallel, seed=1)
    trainer = build_trainer(config, read_inputs(config), layout, folder / "nan")
    learner = trainer.algorithm.learner
    finalize = learner.part.config.finalize_model_grads_func

    def poison(model: Any, *args: Any, **kwargs: Any) -> None:
        finalize(model, *args, **kwargs)
        if layout.rank == 1:
            learner.part.module.decoder.layers[1].mlp.linear_fc2.weight.main_grad[0, 0] = float("nan")

    learner.part.config.finalize_model_grads_func = poison
    before = {name: parameter.detach().clone() for name, parameter in learner.part.module.named_parameters()}
    message = _error(trainer.run)
    after = dict(learner.part.module.named_parameters())
    unchanged = all(torch.equal(before[name], after[name]) for name in before)
    return f"{message} unchanged={unchanged}"


def _all(folder: Path) -> dict[str, Any]:
    """Everything that wants two ranks, in one launch."""
    found: dict[str, Any] = {"whole": _run(_config(folder, "whole"))}
    found["stopped"] = _run(_config(folder, "parts"), stop_before=4)
    found["resumed"] = _run(_config(folder, "parts"))
    found["again"] = _run(_config(folder, "parts"))
    other = replace(_config(folder, "parts"), train=replace(_config(folder, "parts").train, lr=1e-4))
    found["other settings"] = _error(lambda: _run(other))
    # Stopped before its first checkpoint: it starts over and writes no row twice.
    found["stopped early"] = _run(_config(folder, "early"), stop_before=2)
    found["restarted"] = _run(_config(folder, "early"))
    found["nan"] = _nan_in_one_rank(folder)
    import torch.distributed as dist

    if dist.get_rank() == 0:  # the same run directory, but its model was replaced by another one
        run = folder / "replaced"
        shutil.copytree(folder / "whole", run)
        (run / "finished.json").unlink()
        (run / "config.yaml").write_text(to_yaml(_config(folder, "replaced", model=str(folder / "tied"))))
        run = folder / "truncated"
        shutil.copytree(folder / "whole", run)
        (run / "finished.json").unlink()
        (run / "config.yaml").write_text(to_yaml(_config(folder, "truncated")))
        for shard in (run / "checkpoints" / "iter_0000005").glob("*.distcp"):
            shard.write_bytes(shard.read_bytes()[:100])
    dist.barrier()
    from megatron.core import dist_checkpointing

    common = dist_checkpointing.load_common_state_dict(str(folder / "whole" / "checkpoints" / "iter_0000004"))
    found["checkpoint holds"] = {key: common[key] for key in ("run", "config")}
    found["replaced"] = _error(lambda: _run(_config(folder, "replaced", model=str(folder / "tied"))))
    found["truncated"] = _error(lambda: _run(_config(folder, "truncated")))
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("resume")
    save_models(folder)
    return folder, run_ranks(_all, 2, folder, timeout=280)


def _rows(folder: Path, name: str) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


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
    rows = _rows(found[0], name)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows == _rows(found[0], "whole")


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


def test_a_truncated_checkpoint_is_named(found: Any) -> None:
    for rank in found[1]:
        assert rank["truncated"].startswith("CheckpointError")
        assert "iter_0000005 cannot be read" in rank["truncated"]


def test_nan_on_one_rank_stops_all_and_changes_no_weight(found: Any) -> None:
    first, second = (rank["nan"] for rank in found[1])
    assert "step 1, rank 1: the gradient of decoder.layers.1.mlp.linear_fc2.weight holds NaN" in second
    assert "another rank's gradient is not finite" in first
    assert first.endswith("unchanged=True")
    assert second.endswith("unchanged=True")
