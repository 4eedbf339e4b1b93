"""Checkpoints in Megatron's distributed format: weights, optimizer, RNG state, and the run's own state.

A checkpoint is written under a hidden name and renamed when it is complete; only then does
`latest_checkpointed_iteration.txt` name it, so after a job that dies while saving the previous one stays current. The
content is independent of ranks, so it loads in any layout.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from torch.distributed.checkpoint import CheckpointException

from renio_megatron.config import CheckpointConfig
from renio_megatron.errors import CheckpointError, Scope
from renio_megatron.files import remove_directory
from renio_megatron.megatron.checkpoint.directory import (
    adopt,
    advice,
    damage,
    find_checkpoint,
    latest_step,
    new_partial,
    publish,
    remove_leftovers,
    step_directory,
)
from renio_megatron.megatron.checkpoint.held_signals import signals_held
from renio_megatron.megatron.checkpoint.saved_model import check_same_model, reason, refuse
from renio_megatron.megatron.checkpoint.sharded_state import (
    Averages,
    restore_averages,
    restore_state,
    sharded_averages,
    sharded_state,
)
from renio_megatron.megatron.model.lora import lora_form
from renio_megatron.megatron.runtime.mcore_compat import own_writer
from renio_megatron.megatron.student.learner import MegatronLearner
from renio_megatron.parallel.collectives import on_main_rank

_Value = TypeVar("_Value")

# Messages of torch's own writer on disk errors; it raises plain RuntimeErrors, as a lost peer does.
_DISK_WORDS = ("PytorchStreamWriter", "inline_container", "iostream")

# Settings of the optimizer that belong to the run, not to its state, although torch saves them with it.
_OPTIMIZER_SETTINGS = ("lr", "max_lr", "min_lr", "weight_decay", "betas", "eps")


class MegatronCheckpointer:
    """Saves and restores a learner and the run's own state. Every rank calls every method, in the same order."""

    def __init__(
        self,
        root: Path,
        learner: MegatronLearner,
        settings: CheckpointConfig | None = None,
        *,
        config: str = "",
        averages: Averages = (),
        base: str | None = None,
        report: Callable[[str], None] | None = None,
    ) -> None:
        """Checkpoints go to `root`.

        Each holds `config`, the run's settings as YAML, for a checkpoint that is found alone; and `base`, the
        fingerprint of the base weights of adapters, which it does not hold. `averages` are a teacher's, which are saved
        and restored with the learner. `report` is called with a line about what was restored.
        """
        self._averages, self._report = averages, report
        self._root = root
        self._base = base
        self._learner = learner
        self._settings = settings or CheckpointConfig()
        self._config = config
        # A persistent writer needs CUDA devices to count: megatron-core 0.16.1 hangs without them. Its fork of the
        # process at every save is a copy of the state at that moment, which training can no longer change. Newer
        # versions keep this argument; its default there may differ.
        self._queue = AsyncCallsQueue(persistent=False)
        self._pending: tuple[int, Path] | None = None
        self._has_saved = False

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Writes the checkpoint of `step`, or begins to; `state` is the same on every rank.

        An earlier save is finished first. Does nothing where the checkpoint of `step` is already the current one.

        Raises:
            CheckpointError: the disk or the directory cannot be written.
        """
        self.finish()
        partial = self._on_main(step, lambda: self._begin(step))
        if partial is None:
            return
        content = self._sharded_state(loading=False) | self._job_state() | {"run": state, "step": step}
        # At a process's first save Megatron starts a helper process, which must outlive a signal to the whole group.
        held = contextlib.nullcontext() if self._has_saved else signals_held()
        with self._disk_errors(step, partial), held:
            request = dist_checkpointing.save(
                content, str(partial), async_sharded_save=self._settings.async_save, **own_writer()
            )
            if request is not None:
                self._queue.schedule_async_request(request)
        self._has_saved = True
        self._pending = (step, partial)
        if request is None:
            self._publish()

    def poll(self) -> None:
        """Publishes an asynchronous checkpoint that is written on every rank; never waits.

        Raises:
            CheckpointError: it could not be written.
        """
        self._finalize(blocking=False)

    def finish(self) -> None:
        """Waits until the checkpoint that was begun, if one was, is published.

        Raises:
            CheckpointError: it could not be written.
        """
        self._finalize(blocking=True)

    def load(self) -> tuple[int, dict[str, Any]] | None:
        """Restores the current checkpoint, or for a run without one that of `checkpoint.load`; returns its step and
        state.

        None where there is neither. Partial checkpoints of a killed job are deleted.

        Raises:
            CheckpointError: a checkpoint of another model, or one that cannot be read.
        """
        directory = self._on_main(None, self._find)
        if directory is None:
            return None
        common = check_same_model(directory, self._learner.part, self._base)
        self._check_same_optimizer(directory, common.get("optimizer_form"))
        if self._averages and not common.get("has_teacher_average"):
            raise CheckpointError(
                f"the checkpoint {directory} holds no moving average of the weights, which teacher.kind=ema continues. "
                "Set teacher.kind as in the run that wrote it, or start a new run from its weights: write them with "
                "`renio export`, and give that directory as `model`.",
                scope=Scope.ALL_RANKS,
            )
        groups = self._learner.optimizer.param_groups
        settings = [{key: group[key] for key in _OPTIMIZER_SETTINGS if key in group} for group in groups]
        try:
            loaded = dist_checkpointing.load(self._sharded_state(loading=True) | self._job_state(), str(directory))
        except (Exception, CheckpointException) as error:  # Megatron, torch and the disk; torch's is not an Exception
            refuse(directory, error)
        restore_state(self._learner, loaded)
        if self._averages:
            restore_averages(self._learner.part, self._averages, loaded["teacher_average"])
        for group, values in zip(self._learner.optimizer.param_groups, settings, strict=True):
            group.update(values)
        torch.set_rng_state(loaded["rng"]["torch"])
        if self._report is not None:
            sizes = self._learner.part.layout.sizes
            self._report(resumed_line(loaded["step"], directory, common.get("sizes", sizes), sizes))
        return loaded["step"], loaded["run"]

    def _sharded_state(self, *, loading: bool) -> dict[str, Any]:
        state = sharded_state(self._learner, loading=loading)
        if self._averages:
            state["teacher_average"] = sharded_averages(state["model"], self._learner.part, self._averages)
        return state

    def _job_state(self) -> dict[str, Any]:
        """State of the job that is independent of ranks: RNG state, the model's name and the settings.

        Nothing in a step draws from torch's generator, so the first rank's state is enough.
        """
        part = self._learner.part
        state = {"torch": torch.get_rng_state()}
        return {
            "rng": ShardedObject("rng", state, (1,), (0,), replica_id=part.layout.rank),
            "architecture": dataclasses.asdict(part.architecture),
            "lora": lora_form(part.lora),
            "base": self._base,
            "optimizer_form": self._learner.optimizer_form(),
            "has_teacher_average": bool(self._averages),
            "sizes": part.layout.sizes,
            "config": self._config,
        }

    def _check_same_optimizer(self, directory: Path, saved: Any) -> None:
        """Raises `CheckpointError` where the optimizer's state is saved in another format than this run's."""
        wanted = self._learner.optimizer_form()
        differing = [f"{key}: {(saved or {}).get(key)} there, {wanted[key]} here" for key in wanted]
        if saved != wanted:
            raise CheckpointError(
                f"the checkpoint {directory} holds the optimizer in another form ({'; '.join(differing)}). Set the "
                "values that it was saved with, or start a new run from its weights: write them with `renio export`, "
                "and give that directory as `model`.",
                scope=Scope.ALL_RANKS,
            )

    def _find(self) -> Path | None:
        """The checkpoint to restore, with all files present; on the first rank. Checks that checkpoints can be
        written."""
        remove_leftovers(self._root)
        new_partial(self._root, 0).rmdir()
        step = latest_step(self._root)
        if step is not None:
            directory = step_directory(self._root, step)
            adopt(self._root, step)
        elif self._settings.load is not None:
            directory = find_checkpoint(self._settings.load)
        else:
            return None
        if problem := damage(directory):
            raise CheckpointError(f"the checkpoint {directory} cannot be read: {problem}. {advice(directory)}")
        return directory

    def _begin(self, step: int) -> Path | None:
        """The directory to write to; None where the checkpoint of `step` is the current one. On the first rank."""
        with contextlib.suppress(CheckpointError):  # the current one was deleted; this save repairs that
            if latest_step(self._root) == step:
                return None
        return new_partial(self._root, step)

    def _finalize(self, *, blocking: bool) -> None:
        if self._pending is None:
            return
        with self._disk_errors(*self._pending):
            done = self._queue.maybe_finalize_async_calls(blocking=blocking)
        if done:
            self._publish()

    def _publish(self) -> None:
        assert self._pending is not None
        step, partial = self._pending
        self._pending = None
        self._on_main(step, lambda: publish(partial, self._root, step, self._settings.keep_last))

    def _on_main(self, step: int | None, action: Callable[[], _Value]) -> _Value:
        """The result of `action`, run on the first rank; disk errors there raise a CheckpointError on every rank."""

        def act() -> _Value:
            try:
                return action()
            except CheckpointError:
                raise
            except OSError as error:
                raise CheckpointError(self._refused(step, error)) from error

        return on_main_rank(self._learner.part.layout, act)

    @contextlib.contextmanager
    def _disk_errors(self, step: int, partial: Path) -> Iterator[None]:
        """Turns errors of a checkpoint's writers into a `CheckpointError`, and deletes the files that they wrote."""
        try:
            yield
        except (OSError, RuntimeError, CheckpointException, CheckpointingException) as error:
            if isinstance(error, RuntimeError) and not any(word in str(error) for word in _DISK_WORDS):
                raise
            self._pending = None
            if self._learner.part.layout.is_main:
                with contextlib.suppress(OSError):
                    remove_directory(partial)
            if isinstance(error, CheckpointException):  # every rank's, the details are on the first one
                raise CheckpointError(self._refused(step, error), scope=Scope.ALL_RANKS) from error
            raise CheckpointError(self._refused(step, error)) from error

    def _refused(self, step: int | None, error: BaseException) -> str:
        what = "checkpoints" if step is None else f"the checkpoint of step {step}"
        return (
            f"{what} cannot be written to {self._root}: {reason(error)}. "
            "Free space there, or check the disk and its permissions; earlier checkpoints are untouched, and the same "
            "command resumes from the newest."
        )


def resumed_line(step: int, directory: Path, before: Mapping[str, int], now: Mapping[str, int]) -> str:
    """The line about a run that goes on.

    >>> resumed_line(40, Path("runs/a/checkpoints/iter_0000040"), {"TP": 2, "DP": 1}, {"TP": 1, "DP": 2})
    'goes on after step 40, from runs/a/checkpoints/iter_0000040; TP 2 to 1, DP 1 to 2'
    """
    changed = [f"{name} {before.get(name, 1)} to {size}" for name, size in now.items() if before.get(name, 1) != size]
    return "; ".join([f"goes on after step {step}, from {directory}", *([", ".join(changed)] if changed else [])])
