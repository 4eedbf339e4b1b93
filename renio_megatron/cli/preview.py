"""`renio preview`: the first prompts that the models of a recipe will read, its settings, or its first step."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from renio_megatron.cli import launch
from renio_megatron.config.load import kind_of, load_recipe
from renio_megatron.config.resolved import resolved_yaml
from renio_megatron.runner.recipe import check_canaries, check_data, check_run


def show(path: str, overrides: Sequence[str], count: int, *, as_json: bool, is_resolved: bool = False) -> None:
    """Prints the first `count` prompts of a recipe of `renio train` or `renio sft`, or its settings.

    Args:
        path, overrides: as for `renio train` and `renio sft`.
        count: number of prompts.
        as_json: print JSON.
        is_resolved: print the settings alone, as one recipe without bases and views; models and data are not read.
    """
    recipe = load_recipe(kind_of(path, overrides), path, overrides)
    if is_resolved:
        print(resolved_yaml(recipe), end="")
        return
    check_data(recipe.config)
    from renio_megatron.runner.preview import preview

    found = preview(recipe.config, count)
    found = replace(found, notices=[*recipe.dropped_lines(), *found.notices])
    print(json.dumps(found.as_json(), indent=2) if as_json else "\n".join(found.lines()))


def check(path: str, overrides: Sequence[str], nproc: int | None) -> int:
    """Looks at a recipe's first step, as a rank of torchrun or srun, or on ranks that are started; returns 0, or the
    exit code of the rank that failed.

    Args:
        path, overrides: as for `renio train`.
        nproc: ranks to start; None: one copy of each model.
    """
    rank_arguments = ["check", path, *overrides]
    if launch.is_rank():
        launch.refuse_nproc(nproc)
        from renio_megatron.cli.worker import run_rank

        run_rank(rank_arguments)
    config = load_recipe(kind_of(path, overrides), path, overrides).config
    check_canaries(config)
    num_ranks = nproc or config.fewest_ranks
    check_run(config, num_ranks)
    return launch.start_ranks(rank_arguments, num_ranks)
