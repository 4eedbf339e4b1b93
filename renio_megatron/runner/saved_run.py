"""A checkpoint of a run and what is needed to use its model: for `renio export` and `renio evaluate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from renio_megatron.config import LoraConfig
from renio_megatron.errors import CheckpointError, ConfigError
from renio_megatron.megatron.checkpoint.directory import find_pretrained, latest_step, step_directory, steps
from renio_megatron.models.shipped import model_directory
from renio_megatron.runner.digests import description_parts, digest_of
from renio_megatron.runner.run_directory import DESCRIPTION, RunDirectory


@dataclass(frozen=True)
class SavedRun:
    """A checkpoint of a run.

    Attributes:
        checkpoint: the checkpoint's directory.
        step: its step.
        model: the Hugging Face directory that the run started from.
        pretrained: the run's `pretrained_checkpoint`; None where there is none.
        weights: the base weights of its adapters: `model`, or a checkpoint that Megatron wrote.
        lora: its adapters.
        bf16: dtype of training.
    """

    checkpoint: Path
    step: int
    model: Path
    pretrained: str | None
    weights: Path
    lora: LoraConfig
    bf16: bool


def is_run(directory: Path) -> bool:
    """Whether a directory is a run's output_dir."""
    return RunDirectory(directory).config.is_file()


def read_run(directory: Path, step: int | None = None, *, moved_to: str | None = None) -> SavedRun:
    """A run's checkpoint.

    Args:
        directory: output_dir of the run.
        step: which checkpoint; None: the newest.
        moved_to: where the run's model is now; None: where the run's settings say.

    Raises:
        ConfigError: no run, or its model is not there any more, or another one is.
        CheckpointError: no such checkpoint, or a damaged config.yaml.
    """
    run = RunDirectory(directory)
    if not run.config.is_file():
        raise ConfigError(f"{str(directory)!r} is no run directory: it holds no config.yaml. Give a run's output_dir.")
    checkpoint = _checkpoint(run.checkpoints, step)
    config = _settings(run.config)
    lora = _adapters_of(config)
    model = _model(run, config.model, moved_to)
    given = config.get("pretrained_checkpoint")
    weights = model if lora.r is None or given is None else find_pretrained(given, "pretrained_checkpoint")
    number = int(checkpoint.name.removeprefix("iter_"))
    return SavedRun(checkpoint, number, model, given, weights, lora, bool(config.train.bf16))


def _model(run: RunDirectory, name: str, moved_to: str | None) -> Path:
    """The directory of a run's model."""
    if moved_to is None:
        try:
            return model_directory(name, "model")
        except ConfigError as error:
            raise ConfigError(f"{error} If it was moved, `renio export --model` names its new place.") from error
    model = model_directory(moved_to, "--model")
    begun = run.digest(DESCRIPTION)
    if begun is not None and begun != digest_of(description_parts(model)):
        raise ConfigError(
            f"--model {moved_to!r} is not the model that the run began with ({name!r}): its config or its tokenizer "
            "is another one. Give a copy of that model."
        )
    return model


def _settings(path: Path) -> Any:
    """Contents of `config.yaml` of a run.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        config = OmegaConf.load(path)
        if isinstance(config, DictConfig) and "model" in config and "train" in config:
            return config
        problem = "it holds no `model` and `train`"
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
        problem = " ".join(str(error).split())
    raise CheckpointError(f"{path} cannot be read: {problem}. Restore it from a copy; the checkpoints are untouched.")


def _adapters_of(config: Any) -> LoraConfig:
    """The section `lora` of a run's settings; runs older than the section have no adapters."""
    section: Any = OmegaConf.to_container(config.lora) if "lora" in config else {}
    return LoraConfig(**section)


def _checkpoint(root: Path, step: int | None) -> Path:
    step = latest_step(root) if step is None else step
    if step is None:
        raise CheckpointError(f"{root} holds no checkpoint yet. Let the run reach its first checkpoint.save_interval.")
    directory = step_directory(root, step)
    if not directory.is_dir():
        raise CheckpointError(f"there is no checkpoint of step {step} in {root}; there are {steps(root)}.")
    return directory
