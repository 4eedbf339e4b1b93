"""Where problems come from. A new source is a function that returns a `Source`, and a line of `SOURCES`.

No torch here: a file is looked at before a rank starts.
"""

from __future__ import annotations

from collections.abc import Callable

from renio_megatron.config import DataConfig
from renio_megatron.config.validators import require_choice
from renio_megatron.data.sources.files import datasets_source, jsonl_source
from renio_megatron.data.sources.generated import modchain_source, reasoning_gym_source
from renio_megatron.data.sources.source import EVAL_SEED_OFFSET, SPLITS, Source
from renio_megatron.errors import ConfigError

SOURCES: dict[str, Callable[[DataConfig, str], Source]] = {
    "modchain": modchain_source,
    "jsonl": jsonl_source,
    "datasets": datasets_source,
    "reasoning_gym": reasoning_gym_source,
}
_SETTINGS = {"jsonl": ("path", "eval_path"), "datasets": ("path", "eval_path"), "reasoning_gym": ("task", "size")}


def build_source(config: DataConfig, split: str) -> Source:
    """The source that `data.source` names, opened and checked.

    Args:
        config: what and where.
        split: `train` (endless order, shuffled by the seed) or `eval` (other problems, in their own order).
    Raises:
        ConfigError: settings that do not fit the source. DataError: data that cannot be used.
    """
    require_choice("data.source", config.source, SOURCES)
    require_choice("split", split, SPLITS)
    if not 0 <= config.seed < EVAL_SEED_OFFSET:
        raise ConfigError(f"data.seed must lie in [0, 2**31); got {config.seed}.")
    for name in ("path", "eval_path", "task", "size"):
        if getattr(config, name) is not None and name not in _SETTINGS.get(config.source, ()):
            raise ConfigError(f"data.{name} has no meaning for data.source={config.source}; leave it out.")
    return SOURCES[config.source](config, split)
