"""Where a split's data lies."""

from __future__ import annotations

from pathlib import Path

from renio_megatron.config import DataConfig
from renio_megatron.errors import ConfigError
from renio_megatron.files import user_path


def path_key(split: str) -> str:
    """The setting that names a split's file."""
    return "data.path" if split == "train" else "data.eval_path"


def given_path(config: DataConfig, split: str) -> str:
    """What the setting says; raises `ConfigError` where it says nothing."""
    path = config.path if split == "train" else config.eval_path
    if path is None and config.eval_split is not None:
        path = config.path  # another split of the same data set
    if path is None:
        use = "training" if split == "train" else "evaluation"
        raise ConfigError(f"data.source={config.source} needs {path_key(split)} for {use}.")
    return path


def path_of(config: DataConfig, split: str) -> Path:
    """The path of a split's file or directory."""
    return user_path(given_path(config, split))
