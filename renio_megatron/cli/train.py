"""`renio train` and `renio sft` on one rank: the run with its progress bar, and the final message."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from renio_megatron.runner.describe import describe_run, finished_message, print_rank_0, print_weights
from renio_megatron.runner.device_env import set_hardware_variables_of
from renio_megatron.runner.recipe import checked_recipe


def run(kind: str, path: str, overrides: Sequence[str], *, fresh: bool) -> None:
    """Runs `renio train` or `renio sft` on this rank."""
    from renio_megatron.runner.run import run_recipe
    from renio_megatron.training.metrics.progress import Progress

    recipe = checked_recipe(kind, path, overrides)
    config = recipe.config
    set_hardware_variables_of(config)
    for line in recipe.dropped_lines():
        print_rank_0(line)
    print_rank_0(f"{path}: {describe_run(config)}")
    print_weights(config)
    outcome = run_recipe(recipe, fresh=fresh, title=Path(path).stem, progress=Progress, report=print_rank_0)
    if outcome == "finished":
        print_rank_0(finished_message(config))
    else:
        print_rank_0(f"done: {config.output_dir} holds config.yaml, metrics.jsonl, tensorboard/ and checkpoints/")
