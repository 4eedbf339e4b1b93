"""Sources of problems. A new source is a function that returns a `Source`, and an entry in `config.sections.data`.

No torch here: files are checked before a rank starts.
"""

from __future__ import annotations

from renio_megatron.config import DataConfig
from renio_megatron.config.lazy import imported
from renio_megatron.config.validators import require_choice
from renio_megatron.data.sources.source import EVAL_SEED_OFFSET, SPLITS, Source
from renio_megatron.errors import ConfigError


def build_source(config: DataConfig, split: str) -> Source:
    """Opens and checks the source that `data.source` names.

    Args:
        config: the section `data`.
        split: `train` (endless order, shuffled by the seed) or `eval` (other problems, in their own order).
    Raises:
        ConfigError: settings that do not fit the source. DataError: data that cannot be used.
    """
    info = config.source_info
    require_choice("split", split, SPLITS)
    if not 0 <= config.seed < EVAL_SEED_OFFSET:
        raise ConfigError(f"data.seed must lie in [0, 2**31); got {config.seed}.")
    for name in ("path", "eval_path", "subset", "split", "eval_split", "task", "size"):
        if getattr(config, name) is not None and name not in info.settings:
            raise ConfigError(f"data.{name} has no meaning for data.source={config.source}; leave it out.")
    return imported(info.opener)(config, split)


def check_files(config: DataConfig, split: str) -> None:
    """Raises `DataError` or `ConfigError` where a split's files are missing, or not in a format that the source reads.

    Of a large file only the first records are read: the ranks read the others.
    """
    if (check := config.source_info.check) is not None:
        imported(check)(config, split)
