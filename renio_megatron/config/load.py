"""A recipe, read from YAML and checked as a whole before any rank starts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from renio_megatron.config.expand_views import expand_views
from renio_megatron.config.inheritance import files_of
from renio_megatron.config.mistakes import mistakes_among
from renio_megatron.config.parser import COMMAND_LINE, read_recipe
from renio_megatron.config.rules.combinations import check_combinations
from renio_megatron.config.rules.experts import check_expert_ranks, check_experts
from renio_megatron.config.rules.ignored import check_settings, ignored_settings, refuse_ignored
from renio_megatron.config.rules.layout import (
    check_adapters_cut,
    check_cut,
    check_layout,
    check_recomputation,
    check_teacher_layout,
)
from renio_megatron.config.schema import COMMANDS, DistillationConfig, JobConfig, Recipe, schema_of
from renio_megatron.config.teachers import teacher_parallel
from renio_megatron.config.validators import require_choice
from renio_megatron.errors import ConfigError
from renio_megatron.models.architecture import ModelShape
from renio_megatron.models.shipped import model_directory


def load_recipe(kind: str, path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a YAML file and the `key=value` settings of a command line, checked.

    Args:
        kind: the command, `train` or `sft`, which sets the algorithm of a recipe that names none.
        path: the YAML file.
        overrides: for example `["train.lr=1e-5", "weighting=uniform"]`; see `parser.read_recipe`.

    Raises:
        ConfigError: the file, a key, a value or a combination of values cannot be used.
    """
    require_choice("the kind of a recipe", kind, COMMANDS)
    algorithm = _algorithm_of(kind, path, overrides)
    try:
        recipe = _read(kind, algorithm, path, overrides)
    except ConfigError as error:
        if algorithm == "distillation" and _reads_as_sft(path, overrides):
            raise ConfigError(f"{error} (The recipe reads as one of `renio sft`: it names no teacher.)") from error
        if algorithm == "sft" and _names_a_teacher(path):
            raise ConfigError(
                f"{path} names a teacher, so it is a recipe of `renio train`; `renio sft` learns from given "
                "completions. Start it with `renio train`, or leave out what concerns a teacher."
            ) from error
        raise
    check_combinations(recipe.config)
    return recipe


def _algorithm_of(kind: str, path: str | Path, overrides: Sequence[str]) -> str:
    """The algorithm that a recipe names (the command line takes precedence), or the command's own where it names none.

    Raises:
        ConfigError: there is no such algorithm, or it belongs to another command.
    """
    given = [text.partition("=")[2].strip() for text in overrides if text.partition("=")[0].strip() == "algorithm"]
    named = given[-1] if given else _top_of(path).get("algorithm")
    algorithm = str(named) if named not in (None, "null") else COMMANDS[kind]
    schema_of(algorithm)
    if kind == "sft" and algorithm != "sft":
        raise ConfigError(f"algorithm={algorithm} is for `renio train`; `renio sft` fine-tunes. Start it with that.")
    return algorithm


def _read(kind: str, algorithm: str, path: str | Path, overrides: Sequence[str]) -> Recipe:
    """The recipe without those of its files' keys that the command line, or another file, left without effect.

    Keys without effect are an error if the command line set them, or if they have none where they are written either.
    """
    dropped: dict[str, str] = {}
    while True:
        read = read_recipe(schema_of(algorithm), path, overrides, without=dropped, expand=expand_views)
        check_settings(read.config)
        ignored = {**read.misplaced, **ignored_settings(read.config, read.explicit)}
        if not ignored:
            return Recipe(read.config, read.explicit, kind, dropped, read.written)
        sources = {key: read.sources[key] for key in ignored}
        mistakes = read.given | mistakes_among(schema_of(algorithm), path, overrides, ignored, sources)
        refused = {key: because for key, because in ignored.items() if key in mistakes}
        bases = {key: source for key, source in sources.items() if source not in (COMMAND_LINE, str(Path(path)))}
        refuse_ignored(refused, bases, read.written)
        dropped |= ignored


def _names_a_teacher(path: str | Path) -> bool:
    return _top_of(path).get("teacher") is not None


def _top_of(path: str | Path) -> dict[Any, Any]:
    """Contents of a recipe's files by top-level key; empty where one cannot be read, which `read_recipe` reports."""
    try:
        return {key: value for _, content in files_of(Path(path)) for key, value in content.items()}
    except ConfigError:
        return {}


def kind_of(path: str | Path, overrides: Sequence[str] = ()) -> str:
    """The command of a recipe: `sft` where it is valid as one and names no teacher, else `train`."""
    return "sft" if _reads_as_sft(path, overrides) else "train"


def _reads_as_sft(path: str | Path, overrides: Sequence[str]) -> bool:
    try:
        _read("sft", "sft", path, overrides)
    except ConfigError:
        return False
    return True


def check_world(config: JobConfig, world_size: int) -> None:
    """Raises `ConfigError` where a run cannot be shared among `world_size` ranks, or its batch cannot be divided."""
    if isinstance(config, DistillationConfig):
        check_teacher_layout(config.parallel, config.teacher, world_size)
    world_size -= config.num_teacher_ranks
    check_layout(config.parallel, config.train, world_size)
    check_expert_ranks(config.parallel, config.train, world_size)
    if isinstance(config, DistillationConfig):
        config.weighting.check_batch(config.train.global_batch_size)


def check_models(config: JobConfig) -> None:
    """Raises `ConfigError` where a model cannot be run, or cut as `parallel` asks; reads only the config.json files."""
    models = {"model": ModelShape.from_directory(model_directory(config.model, "model"), "model")}
    check_cut("model", models["model"], config.parallel, trained=True)
    check_recomputation(models["model"].num_layers, config.parallel, config.train)
    if config.lora.r is not None:
        check_adapters_cut(models["model"], config.parallel)
    layouts = {"model": config.parallel}
    for one in config.teachers:
        setting = one.setting("model")
        layouts[setting] = teacher_parallel(config.parallel, one.settings)
        if one.settings.model is not None:
            section = "teacher.parallel" if one.has_own_layout else "parallel"
            models[setting] = ModelShape.from_directory(model_directory(one.settings.model, setting), setting)
            check_cut(setting, models[setting], layouts[setting], trained=False, section=section)
        elif not one.shares_student:
            models[setting] = models["model"]
    check_experts(config, models, layouts)
