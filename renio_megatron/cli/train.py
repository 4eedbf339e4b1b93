"""`renio train` and `renio sft` on one rank: a run with its progress bar and its final message, or its first step."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from renio_megatron.config.schema import Recipe
from renio_megatron.files import user_path
from renio_megatron.runner.describe import describe_run, finished_message, print_rank_0, print_weights
from renio_megatron.runner.device_env import set_hardware_variables_of
from renio_megatron.runner.recipe import checked_recipe


def run(kind: str, path: str, overrides: Sequence[str], *, fresh: bool) -> None:
    """Runs `renio train` or `renio sft` on this rank."""
    from renio_megatron.runner.run import run_recipe
    from renio_megatron.training.metrics.progress import Progress

    recipe = _begun(kind, path, overrides)
    config = recipe.config
    outcome = run_recipe(recipe, fresh=fresh, title=Path(path).stem, progress=Progress, report=print_rank_0)
    if outcome == "finished":
        print_rank_0(finished_message(config))
    elif int(os.environ.get("RANK", "0")) == 0:
        from renio_megatron.tools.report.end_of_run import report_end

        report_end(user_path(config.output_dir), config.output_dir, Path(path).stem, print_rank_0)


def check(path: str, overrides: Sequence[str]) -> None:
    """Looks at the first step of a recipe of `renio train` on this rank, and trains nothing."""
    from renio_megatron.runner.run import look_at_first_step

    look_at_first_step(_begun("train", path, overrides), report=print_rank_0)


def _begun(kind: str, path: str, overrides: Sequence[str]) -> Recipe:
    """The recipe, checked and described, with its variables of the environment set."""
    recipe = checked_recipe(kind, path, overrides)
    set_hardware_variables_of(recipe.config)
    for line in recipe.dropped_lines():
        print_rank_0(line)
    print_rank_0(f"{path}: {describe_run(recipe.config)}")
    print_weights(recipe.config)
    return recipe
