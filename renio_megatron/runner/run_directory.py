"""The directory of a run: its settings, metrics and checkpoints, and whether it is finished. Only rank 0 writes."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from renio_megatron.config.resume import changes, differences, is_longer, length_advice, moved, of_before, to_yaml
from renio_megatron.config.schema import Recipe
from renio_megatron.errors import CheckpointError, ConfigError
from renio_megatron.files import Lock, user_path, write_atomically
from renio_megatron.megatron.checkpoint.directory import find_checkpoint, latest_step, step_of

logger = logging.getLogger(__name__)

DESCRIPTION = "model (its tokenizer and config)"
"""Key in `origins.json` of the digest of the student's files without weights."""
DATE = "date in the prompts"
"""Key in `origins.json` of the date that a chat template inserts."""


class RunDirectory:
    """Paths and small files of one run; every file is written atomically.

    Attributes:
        path: the directory.
        config: `config.yaml`, every setting of the run.
        metrics: `metrics.jsonl`, one record per line, each with its `step`.
        rollouts: `rollouts.jsonl`, under `rollout.log` one completion per line.
        checkpoints, tensorboard: directories, created by their writers.
        origins: `origins.json`, digests of the files that the run began with, by the setting that names them.
        finished: `finished.json`, present once the run is complete.
        lock: `.lock`, held by the job that writes here, from `open` until its process ends.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = user_path(path)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.rollouts = self.path / "rollouts.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.tensorboard = self.path / "tensorboard"
        self.origins = self.path / "origins.json"
        self.finished = self.path / "finished.json"
        self.lock = self.path / ".lock"
        self._lock: Lock | None = None

    def state(self, recipe: Recipe, fresh: bool, origins: Mapping[str, str] | None = None) -> str:
        """The state of the run: `new`, `unfinished` (to be resumed) or `finished`; writes nothing.

        Args:
            recipe: the current recipe; an existing directory must hold the same settings, except those of
                `config.resume.CHANGEABLE`.
            fresh: move an existing run aside, to `<name>.previous-1` (-2, ...), and start a new one.
            origins: digests from `origins.origins`, which must be unchanged where a run resumes from its checkpoint;
                None: not checked.

        Raises:
            ConfigError: the directory belongs to a run with other settings or input files, or nothing is left to do
                after the checkpoint that the run would start from.
            CheckpointError: the directory cannot be made, read or written, another job writes to it, or there is no
                such checkpoint.
        """
        with self._explained():
            self._check_place()
            if self.lock.is_file() and os.access(self.lock, os.W_OK):
                self._hold()
            if fresh or not self.config.is_file():
                self._check_start(recipe, fresh)
                return "new"
            self._check_same(recipe)
            if not os.access(self.path, os.W_OK | os.X_OK):
                raise PermissionError("it is not writable")
            if self.is_finished():
                if not is_longer(self.config.read_text(encoding="utf-8"), recipe.config):
                    return "finished"
                if latest_step(self.checkpoints) is None:
                    raise CheckpointError(
                        f"output_dir {str(self.path)!r} holds a finished run without checkpoints, which cannot go on. "
                        "Put them back; or start again with --fresh."
                    )
            if latest_step(self.checkpoints) is None:
                self._check_start(recipe, fresh)
            elif origins is not None:
                self._check_origins(recipe, origins)
            return "unfinished"

    def open(self, recipe: Recipe, fresh: bool, origins: Mapping[str, str] | None = None) -> str:
        """Returns `state`, and writes `config.yaml`: of a new run with its directory, of an unfinished one updated.

        Parents are created for a relative path only: a missing parent of an absolute one is more likely a typo or a
        disk that is not mounted. Arguments and errors as in `state`.
        """
        state = self.state(recipe, fresh, origins)
        with self._explained():
            if state == "new":
                if self.config.is_file():
                    self._move_aside()
                self.path.mkdir(parents=not self.path.is_absolute(), exist_ok=True)
                self._hold()
                _write(self.config, to_yaml(recipe.config))
            elif state == "unfinished":
                self._hold()
                self._note_changes(recipe)
                self.finished.unlink(missing_ok=True)  # of a run that is lengthened
            if origins is not None and state != "finished" and latest_step(self.checkpoints) is None:
                _write(self.origins, json.dumps(origins, indent=2) + "\n")
        return state

    def digest(self, setting: str) -> str | None:
        """The digest of what a setting named when the run began; None where it is not known."""
        try:
            found = json.loads(self.origins.read_text(encoding="utf-8")).get(setting)
        except (OSError, ValueError, AttributeError):
            return None
        return found if isinstance(found, str) else None

    def date(self) -> str | None:
        """The ISO date in the prompts of the run; None where they contain none, or there is no run."""
        try:
            date = json.loads(self.origins.read_text(encoding="utf-8")).get(DATE)
            return None if date is None else datetime.fromisoformat(date).isoformat()
        except (OSError, ValueError, TypeError, AttributeError):  # `state` reports what is wrong with the file
            return None

    def is_finished(self) -> bool:
        """Whether `mark_finished` was called for this run."""
        return self.finished.is_file()

    def mark_finished(self, summary: Mapping[str, Any]) -> None:
        """Writes `finished.json` with the summary."""
        _write(self.finished, json.dumps(summary, indent=2) + "\n")

    def close(self) -> None:
        """Releases the lock, so that other jobs may write here."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _hold(self) -> None:
        """Takes the lock, so that only this process writes here; raises `CheckpointError` where another holds it."""
        if self._lock is None:
            self._lock = Lock(self.lock)
        if (holder := self._lock.holder) is not None:
            self.close()
            raise CheckpointError(
                f"another job writes to output_dir {str(self.path)!r}: {holder}. Wait until it has ended, or end it; "
                "or choose another output_dir."
            )

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns errors of the file system into a `CheckpointError` about this directory."""
        try:
            yield
        except CheckpointError:
            raise
        except OSError as error:
            raise CheckpointError(
                f"output_dir {str(self.path)!r} cannot be used: {error.strerror or error}. "
                "Give a directory that you may write to."
            ) from error

    def _check_place(self) -> None:
        """Raises `CheckpointError` where the directory exists and is not a run's, or cannot be created."""
        parent = self.path.parent
        if self.path.is_dir():
            strangers = sorted(entry.name for entry in self.path.iterdir() if not entry.name.startswith("."))
            if strangers and not self.config.is_file():
                raise CheckpointError(
                    f"output_dir {str(self.path)!r} is not empty and is no run directory: "
                    f"it holds {strangers[0]!r} and no config.yaml. "
                    "Choose another output_dir, or move its contents away."
                )
        elif self.path.is_symlink() and not self.path.exists():
            raise CheckpointError(
                f"output_dir {str(self.path)!r} is a link to {str(self.path.readlink())!r}, which is not there. Make "
                "that directory, or remove the link."
            )
        elif self.path.exists():
            raise CheckpointError(f"output_dir {str(self.path)!r} is a file. Choose another output_dir, or remove it.")
        elif self.path.is_absolute() and not parent.is_dir():
            raise CheckpointError(
                f"output_dir {str(self.path)!r}: the directory {str(parent)!r} does not exist. "
                "Make it, or correct output_dir."
            )

    def _check_same(self, recipe: Recipe) -> None:
        """Raises `ConfigError` where the directory's settings differ from the recipe's."""
        try:
            text = self.config.read_text(encoding="utf-8")
            changed = differences(text, recipe.config)
        except (ConfigError, UnicodeDecodeError) as error:
            raise CheckpointError(
                f"{self.config} cannot be read: {error} "
                "Restore it, choose another output_dir, or start again with --fresh."
            ) from error
        if changed:
            length = any(one.key in ("train.train_iters", "train.lr_decay_iters") for one in changed)
            more = f" {length_advice(text, recipe.config)}" if length else ""
            listing = "".join(f"\n  {one}" for one in changed)
            raise ConfigError(
                f"output_dir {str(self.path)!r} holds a run with other settings:{listing}\n"
                f"Use the old settings to continue it, choose another output_dir, or move it aside with --fresh.{more}"
            )

    def _check_origins(self, recipe: Recipe, origins: Mapping[str, str]) -> None:
        """Raises `ConfigError` where an input file has changed since the run began; one that was moved has not."""
        elsewhere = [
            one
            for one in moved(self.config.read_text(encoding="utf-8"), recipe.config)
            if one.key != "pretrained_checkpoint"  # the checkpoint has its weights, or the fingerprint of a frozen base
        ]
        try:
            begun = json.loads(self.origins.read_text(encoding="utf-8"))
            changed = [setting for setting, digest in origins.items() if begun.get(setting, digest) != digest]
            unknown = [one for one in elsewhere if not any(_is_of(one.key, setting) for setting in begun)]
        except FileNotFoundError:  # a run of an earlier version
            changed, unknown = [], elsewhere
        except (OSError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{self.origins} cannot be read: {error}. Restore it; or remove it, if the files that the run began "
                "with are surely unchanged."
            ) from error
        remedy = (
            "Put back what was there to continue it; start again with --fresh; or continue from its newest checkpoint "
            f"with checkpoint.load={self.path} and another output_dir."
        )
        if changed:
            raise ConfigError(
                f"output_dir {str(self.path)!r} holds a run that began with other files: what these settings name has "
                f"changed since: {', '.join(changed)}. {remedy}"
            )
        if unknown:
            raise ConfigError(
                f"output_dir {str(self.path)!r} holds a run with other settings, and does not know whether these name "
                f"the same: {'; '.join(map(str, unknown))}. {remedy}"
            )

    def _check_start(self, recipe: Recipe, fresh: bool) -> None:
        """Raises where the checkpoint that a run without its own starts from is missing, or past the last step."""
        load, train_iters = recipe.config.checkpoint.load, recipe.config.train.train_iters
        if load is None:
            return
        directory = find_checkpoint(load)
        if fresh and directory.is_relative_to(self.path.resolve()):
            raise ConfigError(
                f"checkpoint.load={load!r} is in output_dir, which --fresh moves aside. Choose another output_dir."
            )
        step = step_of(directory)
        if step is not None and step >= train_iters:
            raise ConfigError(
                f"checkpoint.load={load!r} is a checkpoint of step {step}, and train.train_iters={train_iters} counts "
                f"from step 0: nothing is left to do. Raise train.train_iters above {step}."
            )

    def _note_changes(self, recipe: Recipe) -> None:
        """Rewrites `config.yaml` where the run resumes with changed `CHANGEABLE` settings, and names them."""
        new = to_yaml(recipe.config)
        old = self.config.read_text(encoding="utf-8")
        before = of_before(old, recipe.config)
        changed = [str(one) for one in (*changes(old, recipe.config), *moved(old, recipe.config))]
        if changed:
            logger.warning("%s resumes with other settings: %s", self.path, "; ".join(changed))
        if before:
            logger.warning(
                "%s was begun by an earlier version: %s. %s is rewritten.", self.path, before, self.config.name
            )
        if changed or before:
            _write(self.config, new)

    def _move_aside(self) -> None:
        """Renames the directory to the first free `<name>.previous-K`."""
        number = 1
        directory = self.path.resolve()
        while (target := directory.with_name(f"{directory.name}.previous-{number}")).exists():
            number += 1
        directory.rename(target)
        self.close()
        logger.warning("the earlier run was moved to %s", target)


def _is_of(key: str, setting: str) -> bool:
    """Whether a digest's name is that of a setting, which more words may follow."""
    return setting.partition(" ")[0] == key


def _write(path: Path, text: str) -> None:
    """Replaces a file in one step.

    Raises:
        CheckpointError: the disk or the directory refuses.
    """
    try:
        write_atomically(path, text)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be written: {error.strerror or error}. Check the disk and its permissions."
        ) from error
