"""Checks of a recipe against this machine and this world."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from renio_megatron.config.load import check_models, check_world, load_recipe
from renio_megatron.config.schema import DistillationConfig, JobConfig, Recipe
from renio_megatron.data.sources import check_files
from renio_megatron.errors import ConfigError, on_every_rank
from renio_megatron.runner.recipe_benchmarks import benchmarks_of


def check_data(config: JobConfig) -> None:
    """Raises `ConfigError` or `DataError` where a file of records is missing or invalid."""
    check_files(config.data, "train")
    if config.evaluates_held_out:
        check_files(config.data, "eval")
    benchmarks_of(config)


def check_run(config: JobConfig, num_ranks: int) -> None:
    """Raises `ConfigError` or `DataError` where a run cannot be shared among so many ranks, or where its models or its
    data cannot be used."""
    check_world(config, num_ranks)
    check_models(config)
    check_data(config)


def check_canaries(config: JobConfig) -> None:
    """Raises `ConfigError` where a recipe's first step is not looked at."""
    if not isinstance(config, DistillationConfig):
        raise ConfigError(
            "--check looks at a first step's teacher and sampler, and a recipe of `renio sft` has neither."
        )
    if config.canaries == "off":
        raise ConfigError("--check looks at the first step, and canaries=off leaves that out. Add canaries=warn.")


def checked_recipe(kind: str, path: str | Path, overrides: Sequence[str]) -> Recipe:
    """Loads a recipe and checks it against this world; errors have the scope `ALL_RANKS`."""
    with on_every_rank():
        recipe = load_recipe(kind, path, overrides)
        check_run(recipe.config, int(os.environ.get("WORLD_SIZE", "1")))
    return recipe
