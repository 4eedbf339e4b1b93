"""What a rank does for `train`, `sft` and `quickstart`: runs, with progress, and what is said at the end."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from renio_megatron.config.load import check_models, check_world, load_recipe
from renio_megatron.config.schema import Recipe, RunConfig, SftConfig
from renio_megatron.config.teachers import has_own_layout, num_scorers, teacher_words
from renio_megatron.errors import CheckpointError, RenioError
from renio_megatron.models.shipped import QUICKSTART_RECIPE
from renio_megatron.parallel.hardware import compute_capability, hardware_variables, set_variables
from renio_megatron.runner.recipe import check_data

logger = logging.getLogger(__name__)

QUICKSTART_VARIANTS: dict[str, tuple[str, ...]] = {"opd": ("weighting=uniform",), "renio": ()}
"""The quickstart's runs: name, and what it changes in the recipe."""

_TITLES = {"opd": "OPD", "renio": "ReNIO"}


def checked_recipe(kind: str, path: str | Path, overrides: Sequence[str]) -> Recipe:
    """The recipe, checked against this world; its errors are marked as every rank's."""
    try:
        recipe = load_recipe(kind, path, overrides)
        check_world(recipe.config, int(os.environ.get("WORLD_SIZE", "1")))
        check_models(recipe.config)
        check_data(recipe.config)
    except RenioError as error:
        error.shared = True  # type: ignore[attr-defined]
        raise
    return recipe


def run(kind: str, path: str, overrides: Sequence[str], *, fresh: bool) -> None:
    """`renio train` and `renio sft` on this rank."""
    from renio_megatron.run import run_recipe
    from renio_megatron.training.metrics.progress import Progress

    recipe = checked_recipe(kind, path, overrides)
    config = recipe.config
    set_hardware_variables_of(config)
    for line in recipe.dropped_lines():
        _say(line)
    _say(f"{path}: {_describe(config)}")
    _say_weights(config)
    outcome = run_recipe(recipe, fresh=fresh, title=Path(path).stem, progress=Progress, say=_say)
    if outcome == "finished":
        _say(finished_message(config))
    else:
        _say(f"done: {config.output_dir} holds config.yaml, metrics.jsonl, tensorboard/ and checkpoints/")


def finished_message(config: RunConfig | SftConfig) -> str:
    """What is said where there is nothing left to do."""
    return (
        f"{config.output_dir} is finished: all {config.train.train_iters} steps are done. "
        "Export it with `renio export`, or run it again with --fresh."
    )


def quickstart(output_dir: Path, *, fresh: bool) -> None:
    """Plain OPD and ReNIO on the modular chain, then a table and a picture of both."""
    from renio_megatron.run import run_recipe
    from renio_megatron.training.metrics.progress import Progress

    directories = {name: output_dir / name for name in QUICKSTART_VARIANTS}
    recipes = {
        name: checked_recipe("train", QUICKSTART_RECIPE, [*changes, f"output_dir={directories[name]}"])
        for name, changes in QUICKSTART_VARIANTS.items()
    }
    _make(output_dir)
    set_hardware_variables_of(recipes["renio"].config)
    for name, recipe in recipes.items():
        _say(f"{_TITLES[name]}: {_describe(recipe.config)}")
        _say_weights(recipe.config)
        outcome = run_recipe(recipe, fresh=fresh, title=_TITLES[name], progress=Progress, say=_say)
        if outcome == "finished":
            _say(f"{directories[name]} is finished already; --fresh runs it again.")
    if int(os.environ.get("RANK", "0")) == 0:
        _report(directories, recipes["renio"], output_dir)


def _make(directory: Path) -> None:
    """Makes the directory that both runs go to."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = CheckpointError(
            f"the output directory {str(directory)!r} cannot be made: {error.strerror or error}. Choose another."
        )
        problem.shared = True  # type: ignore[attr-defined]
        raise problem from error


def _report(directories: dict[str, Path], recipe: Recipe, output_dir: Path) -> None:
    """The table and the picture of the quickstart."""
    from rich.console import Console

    from renio_megatron.report.curves import plot_curves
    from renio_megatron.report.table import comparison_table, summarise
    from renio_megatron.training.metrics.sinks import read_metrics

    config = recipe.config
    rows = {_TITLES[name]: read_metrics(path / "metrics.jsonl") for name, path in directories.items()}
    plot_curves(rows, output_dir / "curves.png")
    Console().print(comparison_table([summarise(metrics, name) for name, metrics in rows.items()]))
    _say(
        f"start: {config.model}; teacher: {config.teacher.model}; seeds: data {config.data.seed}, "  # type: ignore
        f"sampling {config.train.seed}; recipe: {QUICKSTART_RECIPE}\n"
        f"curves in {output_dir}/curves.png; metrics, TensorBoard events and checkpoints in {output_dir}/opd and "
        f"{output_dir}/renio"
    )


def set_hardware_variables_of(config: RunConfig | SftConfig) -> None:
    """Before CUDA is touched: CUDA's and NCCL's variables that the user has not set; a contradiction is a warning."""
    variables = hardware_variables(
        compute_capability(),
        tensor_size=config.parallel.tensor_model_parallel_size,
        context_size=config.parallel.context_parallel_size,
        is_deterministic=config.train.deterministic_mode,
    )
    for warning in set_variables(variables, os.environ):
        if int(os.environ.get("RANK", "0")) == 0:
            logger.warning(warning)


def _describe(config: Any) -> str:
    """One line about a run: what learns from what, on how many ranks."""
    parallel, train = config.parallel, config.train
    sizes = {
        f"TP {parallel.tensor_model_parallel_size}": True,
        "SP": parallel.sequence_parallel,
        f"PP {parallel.pipeline_model_parallel_size}": True,
        f"VPP {parallel.virtual_pipeline_model_parallel_size}": parallel.virtual_pipeline_model_parallel_size,
        f"CP {parallel.context_parallel_size}": parallel.context_parallel_size > 1,
        f"DP {_trainers(config) // parallel.model_ranks}": True,
        f"EP {parallel.expert_model_parallel_size}": parallel.expert_model_parallel_size > 1,
    }
    layout = " x ".join(name for name, is_shown in sizes.items() if is_shown)
    what = f"{config.model} on its solutions"
    if isinstance(config, RunConfig):
        what = f"{config.model} learns from {_teachers(config)}, weighting {config.weighting.name}"
        if has_own_layout(parallel, config.teacher):
            layout = f"{layout}; teacher {teacher_words(parallel, config.teacher, _trainers(config))}"
    return f"{what}; {train.train_iters} steps of {train.global_batch_size} sequences; {layout}"


def _teachers(config: RunConfig) -> str:
    """Who teaches, in words."""

    def words(teacher: Any) -> str:
        return teacher.model or f"itself ({teacher.kind}), shown more"

    routes = config.teacher.routes
    if not routes:
        return words(config.teacher)
    return f"{', '.join(f'{name}: {words(one)}' for name, one in routes.items())} (by {config.data.teacher_key})"


def _trainers(config: Any) -> int:
    """Ranks of the student."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    return world - num_scorers(config.parallel, config.teacher) if isinstance(config, RunConfig) else world


def _say_weights(config: RunConfig | SftConfig) -> None:
    """Prints which weights are in force, and over how many sequences their mean is taken; none in fine-tuning."""
    from renio_megatron.training.setting_warnings import weights_line

    if isinstance(config, RunConfig):
        data_ranks = _trainers(config) // config.parallel.model_ranks
        _say(weights_line(config.weighting, config.train.global_batch_size, data_ranks))


def _say(text: str) -> None:
    """Prints on the first rank."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(text, flush=True)
