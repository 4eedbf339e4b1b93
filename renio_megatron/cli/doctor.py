"""`renio doctor` on one rank: joins the world, and prints one line per check on the first rank."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from renio_megatron.config import ParallelConfig
from renio_megatron.config.load import load_recipe
from renio_megatron.config.parser import read_recipe
from renio_megatron.config.validators import require_device
from renio_megatron.errors import on_every_rank
from renio_megatron.parallel.nvml import compute_capability
from renio_megatron.runner.device_env import hardware_variables, set_variables, use_device


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Settings that are checked.

    Attributes:
        device: as in a recipe.
        parallel: the layout.
        bf16: whether the check of the loss uses bf16 logits.
    """

    device: str | None = None
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    bf16: bool = False

    def __post_init__(self) -> None:
        require_device(self.device)


def read_settings(recipe: str | None, overrides: Sequence[str]) -> DoctorConfig:
    """Reads settings from a recipe of `renio train` and overrides, or from overrides alone.

    Raises:
        ConfigError: as for `renio train`; without a recipe, a key other than `device`, `parallel.*` and `bf16`.
    """
    if recipe is None:
        return read_recipe(DoctorConfig, None, overrides).config
    config = load_recipe("train", recipe, overrides).config
    return DoctorConfig(device=config.device, parallel=config.parallel, bf16=config.train.bf16)


def doctor(recipe: str | None, overrides: Sequence[str]) -> int:
    """Runs all checks; returns the exit code, 0 where all pass, else 1, the same on every rank.

    Raises:
        ConfigError, LayoutError: invalid settings, or settings that do not fit this world.
    """
    with on_every_rank():
        settings = read_settings(recipe, overrides)
    parallel = settings.parallel
    use_device(settings.device)
    variables = hardware_variables(
        compute_capability(),
        tensor_size=parallel.tensor_model_parallel_size,
        context_size=parallel.context_parallel_size,
    )
    warnings = set_variables(variables, os.environ)

    import torch

    from renio_megatron.megatron.runtime.initialize import start, stop
    from renio_megatron.runner.environment import describe_world
    from renio_megatron.tools.doctor import examine

    layout = start(parallel, seed=1)
    line, _ = describe_world(layout)
    if layout.is_main:
        print(line, flush=True)
    verdicts = []
    for verdict in examine(layout, dtype=torch.bfloat16 if settings.bf16 else torch.float32, warnings=warnings):
        verdicts.append(verdict)
        if layout.is_main:
            print(verdict, flush=True)
    bad = sum(not verdict.is_good for verdict in verdicts)
    if layout.is_main:
        print("all good" if not bad else f"{bad} of {len(verdicts)} not good; see the lines that say FAIL", flush=True)
    stop()
    return int(bad > 0)
