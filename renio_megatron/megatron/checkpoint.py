"""Checkpoints in Megatron's distributed format: weights, optimiser, random numbers, and the run's own state.

A checkpoint is written under a hidden name and renamed when it is whole; only then does
`latest_checkpointed_iteration.txt` name it, so a job that dies while saving leaves the previous one in force.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch.distributed.checkpoint import CheckpointException

from renio_megatron.errors import CheckpointError
from renio_megatron.megatron.learner import MegatronLearner
from renio_megatron.megatron.model import ModelPart

logger = logging.getLogger(__name__)

# Megatron, torch and the disk each raise their own; torch's is no Exception.
_UNREADABLE = (Exception, CheckpointException)

TRACKER = "latest_checkpointed_iteration.txt"


def step_directory(root: Path, step: int) -> Path:
    """Where the checkpoint of a step is, as Megatron names it."""
    return root / f"iter_{step:07d}"


def latest_step(root: Path) -> int | None:
    """Step of the newest whole checkpoint; None where there is none.

    Raises:
        CheckpointError: the tracker names a checkpoint that is not there.
    """
    tracker = root / TRACKER
    if not tracker.is_file():
        return None
    text = tracker.read_text().strip()
    if not text.isdigit() or not step_directory(root, int(text)).is_dir():
        raise CheckpointError(
            f"{tracker} names the checkpoint {text[:40]!r}, which is not beside it. Write the number of an iter_ "
            "directory that is there into the file, or start again with --fresh."
        )
    return int(text)


class MegatronKeeper:
    """Saves and restores a learner and the run's own state."""

    def __init__(self, root: Path, learner: MegatronLearner, *, config: str = "") -> None:
        """Checkpoints go to `root`; each holds `config`, the run's settings as YAML, for whoever finds it alone."""
        self._root = root
        self._learner = learner
        self._config = config

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Writes the checkpoint of `step`; `state` is the same on every rank.

        Raises:
            CheckpointError: the disk or the directory refuses.
        """
        layout = self._learner.part.layout
        target = step_directory(self._root, step)
        extra = {"run": state, "config": self._config}
        partial = self._root / f".{target.name}.partial"
        try:
            if layout.is_main:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            dist.barrier()
            dist_checkpointing.save(self._sharded(loading=False) | extra, str(partial))
            if layout.is_main:
                if target.exists():
                    shutil.rmtree(target)
                partial.rename(target)
                tracker = self._root / f".{TRACKER}.tmp"
                tracker.write_text(f"{step}\n")
                tracker.replace(self._root / TRACKER)
        except OSError as error:
            raise CheckpointError(
                f"the checkpoint of step {step} cannot be written to {target}: {error.strerror or error}. "
                "Check the disk and its permissions; earlier checkpoints are untouched."
            ) from error
        dist.barrier()

    def load(self) -> tuple[int, dict[str, Any]] | None:
        """Restores the newest checkpoint; its step and state, or None where there is none.

        Raises:
            CheckpointError: a checkpoint of another model, or one that cannot be read.
        """
        step = latest_step(self._root)
        if step is None:
            return None
        directory = step_directory(self._root, step)
        check_same_model(directory, self._learner.part)
        try:
            loaded = dist_checkpointing.load(self._sharded(loading=True), str(directory))
        except _UNREADABLE as error:
            raise CheckpointError(
                f"the checkpoint {directory} cannot be read ({_reason(error)}). It may be truncated; write the number "
                f"of an older iter_ directory into {self._root / TRACKER}, or start again with --fresh."
            ) from error
        self._learner.part.module.load_state_dict(loaded["model"], strict=False)
        self._learner.optimizer.load_state_dict(loaded["optimizer"])
        torch.set_rng_state(loaded["rng"]["torch"])
        return step, loaded["run"]

    def _sharded(self, *, loading: bool) -> dict[str, Any]:
        """What the ranks write or expect: sharded weights, optimiser state and random numbers, and the model's name."""
        part = self._learner.part
        model = part.module.sharded_state_dict()
        rng = ShardedObject(
            "rng", {"torch": torch.get_rng_state()}, (part.layout.world_size,), (part.layout.rank,), replica_id=0
        )
        return {
            "model": model,
            "optimizer": self._learner.optimizer.sharded_state_dict(model, is_loading=loading),
            "rng": rng,
            "architecture": dataclasses.asdict(part.architecture),
        }


def load_model_weights(directory: Path, part: ModelPart) -> None:
    """Fills a model, in any layout, from a checkpoint's weights alone.

    Raises:
        CheckpointError: a checkpoint of another model, or one that cannot be read.
    """
    check_same_model(directory, part)
    try:
        loaded = dist_checkpointing.load({"model": part.module.sharded_state_dict()}, str(directory))
    except _UNREADABLE as error:
        raise CheckpointError(f"the checkpoint {directory} cannot be read ({_reason(error)}).") from error
    part.module.load_state_dict(loaded["model"], strict=False)


def check_same_model(directory: Path, part: ModelPart) -> None:
    """Raises `CheckpointError` where the checkpoint is of another architecture than `part`."""
    try:
        saved = dist_checkpointing.load_common_state_dict(str(directory)).get("architecture", {})
    except _UNREADABLE as error:
        raise CheckpointError(f"the checkpoint {directory} cannot be read ({_reason(error)}).") from error
    wanted = dataclasses.asdict(part.architecture)
    differing = [
        f"{key}: {saved.get(key)} there, {wanted[key]} here" for key in wanted if saved.get(key) != wanted[key]
    ]
    if differing:
        raise CheckpointError(
            f"the checkpoint {directory} is of another architecture ({'; '.join(differing)}). "
            "Point `model` back to the model that the run started from, or start again with --fresh."
        )


def _reason(error: BaseException) -> str:
    """One line about the first cause; torch's own message is every rank's whole traceback."""
    if isinstance(error, CheckpointException):
        rank, (cause, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {type(cause).__name__}: {cause}"
    return f"{type(error).__name__}: {error}"
