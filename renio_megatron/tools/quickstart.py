"""The quickstart: two runs on the modular chain, then a table and a plot."""

from __future__ import annotations

import os
from pathlib import Path

from renio_megatron.config.schema import Recipe
from renio_megatron.errors import CheckpointError, Scope
from renio_megatron.models.shipped import QUICKSTART_RECIPE
from renio_megatron.runner.describe import describe_run, print_rank_0, print_weights
from renio_megatron.runner.device_env import set_hardware_variables_of
from renio_megatron.runner.recipe import checked_recipe

QUICKSTART_VARIANTS: dict[str, tuple[str, ...]] = {
    "opd": ("weighting=uniform", "also_report=[renio]"),
    "renio": (),
}
"""The quickstart's runs: name, and its overrides of the recipe."""


_TITLES = {"opd": "OPD", "renio": "ReNIO"}


def quickstart(output_dir: Path, *, fresh: bool) -> None:
    """Runs plain OPD and ReNIO on the modular chain, then writes a table and a plot of both."""
    from renio_megatron.runner.run import run_recipe
    from renio_megatron.training.metrics.progress import Progress

    directories = {name: output_dir / name for name in QUICKSTART_VARIANTS}
    recipes = {
        name: checked_recipe("train", QUICKSTART_RECIPE, [*changes, f"output_dir={directories[name]}"])
        for name, changes in QUICKSTART_VARIANTS.items()
    }
    _make(output_dir)
    set_hardware_variables_of(recipes["renio"].config)
    for name, recipe in recipes.items():
        print_rank_0(f"{_TITLES[name]}: {describe_run(recipe.config)}")
        print_weights(recipe.config)
        outcome = run_recipe(recipe, fresh=fresh, title=_TITLES[name], progress=Progress, report=print_rank_0)
        if outcome == "finished":
            print_rank_0(f"{directories[name]} is finished already; --fresh runs it again.")
    if int(os.environ.get("RANK", "0")) == 0:
        _report(directories, recipes["renio"], output_dir)


def _make(directory: Path) -> None:
    """Creates the directory that both runs go to."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"the output directory {str(directory)!r} cannot be made: {error.strerror or error}. Choose another.",
            scope=Scope.ALL_RANKS,
        ) from error


def _report(directories: dict[str, Path], recipe: Recipe, output_dir: Path) -> None:
    """Prints the table and writes the plot of the quickstart."""
    from rich.console import Console

    from renio_megatron.tools.report.curves import plot_curves
    from renio_megatron.tools.report.table import comparison_table, summarize
    from renio_megatron.training.metrics.sinks import read_metrics

    config = recipe.config
    rows = {_TITLES[name]: read_metrics(path / "metrics.jsonl") for name, path in directories.items()}
    plot_curves(rows, output_dir / "curves.png")
    Console().print(comparison_table([summarize(metrics, name) for name, metrics in rows.items()]))
    print_rank_0(
        f"start: {config.model}; teacher: {config.teacher.model}; seeds: data {config.data.seed}, "  # type: ignore
        f"sampling {config.train.seed}; recipe: {QUICKSTART_RECIPE}\n"
        f"curves in {output_dir}/curves.png; metrics, TensorBoard events and checkpoints in {output_dir}/opd and "
        f"{output_dir}/renio"
    )
