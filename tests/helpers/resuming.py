"""Real runs of tiny models inside a rank: stopped at a step, gone on with, and what they end with."""

from __future__ import annotations

import contextlib
import gc
import json
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemReader, TensorStorageMetadata, load

from renio_megatron.config import CheckpointConfig, EvaluateConfig, TrainConfig, WeightingConfig
from renio_megatron.config.schema import DistillationConfig, Recipe
from renio_megatron.errors import CheckpointError, ConfigError, NumericsError, RunStopped
from renio_megatron.megatron.checkpoint.directory import latest_step, steps
from tests.helpers.training_cases import layout_of, recipe

TIMES = ("time/step_s", "time/rollout_s", "time/teacher_s", "time/train_s", "tokens_per_s")


class Stopped(Exception):
    """The job ended here."""


def run_config(folder: Path, name: str, **changes: Any) -> DistillationConfig:
    """Five steps on two tensor-parallel ranks, a checkpoint and an evaluation every two; `changes` replace sections."""
    sections = {
        "parallel": layout_of(2),
        # A stateful weighting: its moving average must come back, too.
        "weighting": WeightingConfig(threshold=0.3, ceiling=1.5, normalize="ema"),
        "train": train_config(),
        "checkpoint": CheckpointConfig(save_interval=2),
        "evaluate": EvaluateConfig(every=2, samples=4),
        "output_dir": str(folder / name),
    }
    return recipe(folder, **{**sections, **changes})


def train_config(**changes: Any) -> TrainConfig:
    """The steps of `run_config`."""
    values = {
        "train_iters": 5,
        "global_batch_size": 8,
        "micro_batch_size": 4,
        "lr": 3e-3,
        "lr_decay_style": "linear",
        "seed": 7,
    }
    return TrainConfig(**{**values, **changes})


def run(
    config: DistillationConfig, *, stop_before: int | None = None, before_step: Callable[[Any, int], None] | None = None
) -> dict[str, Any]:
    """A run of the real job in this process: its outcome, its step, and the parameters that it ends with.

    Args:
        config: the settings.
        stop_before: the step before which the job dies.
        before_step: (trainer, step) -> anything; called before each step.
    """
    import renio_megatron.runner.run as job
    from renio_megatron.training.trainer import Trainer

    kept: dict[str, Any] = {}
    build, train_step = job.build_trainer, Trainer._train_step

    def build_and_keep(*args: Any, **kwargs: Any) -> Trainer:
        kept["trainer"] = build(*args, **kwargs)
        return kept["trainer"]

    def stop_there(self: Trainer) -> dict[str, float]:
        if self.step + 1 == stop_before:
            raise Stopped
        if before_step is not None:
            before_step(self, self.step + 1)
        return train_step(self)

    job.build_trainer, Trainer._train_step = build_and_keep, stop_there  # type: ignore[method-assign]
    try:
        outcome = job.run_recipe(Recipe(config, frozenset(), "train"), fresh=False, title="test")
    except Stopped:
        outcome = "stopped"
    except RunStopped as stopped:
        outcome = str(stopped)
    finally:
        job.build_trainer, Trainer._train_step = build, train_step  # type: ignore[method-assign]
    if "trainer" not in kept:
        return {"outcome": outcome}
    part = kept["trainer"].algorithm.learner.part
    parameters = {name: parameter.detach().clone() for name, parameter in part.named_parameters()}
    return {"outcome": outcome, "parameters": parameters, "step": kept["trainer"].step}


def error_of(function: Callable[[], Any]) -> str:
    """The error that it raises, in words."""
    try:
        function()
    except (CheckpointError, ConfigError, NumericsError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@contextlib.contextmanager
def small_files(limit: int) -> Iterator[None]:
    """Files of this process, and of those it starts, cannot grow beyond `limit` bytes: what a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def full_at_step_4(config: DistillationConfig, *, rank: int, limit: int) -> dict[str, Any]:
    """A run, one rank of which may not write files above `limit` bytes at its second checkpoint; then without limit."""
    from renio_megatron.megatron.checkpoint.checkpointer import MegatronCheckpointer

    save = MegatronCheckpointer.save

    def save_without_room(self: MegatronCheckpointer, step: int, state: dict[str, Any]) -> None:
        with small_files(limit) if dist.get_rank() == rank and step == 4 else contextlib.nullcontext():
            save(self, step, state)

    MegatronCheckpointer.save = save_without_room  # type: ignore[method-assign]
    try:
        message = error_of(lambda: run(config))
    finally:
        MegatronCheckpointer.save = save  # type: ignore[method-assign]
    dist.barrier()
    root = Path(config.output_dir) / "checkpoints"
    left = (latest_step(root), steps(root), sorted(path.name for path in root.glob(".iter*")))
    dist.barrier()
    # A failed save leaves objects behind whose collection can crash the interpreter (seen with torch 2.13 and
    # megatron-core 0.19.2 on Python 3.12). A run ends there; only this test goes on in the same process.
    gc.freeze()
    return {"message": message, "left": left, "again": run(config)}


def rows(folder: Path, name: str) -> list[dict[str, float]]:
    """The metrics of a run without its times."""
    found = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in found]


def tensors(checkpoint: Path, vocab_size: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole, by torch's own reader; without the vocabulary's padding rows."""
    reader = FileSystemReader(checkpoint)
    metadata = reader.read_metadata().state_dict_metadata
    whole = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    load(whole, storage_reader=reader, no_dist=True)
    return {
        name: tensor[:vocab_size] if "word_embeddings" in name or "output_layer" in name else tensor
        for name, tensor in whole.items()
    }


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of named tensors are the same, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())
