"""A recipe, checked against this machine and this world."""

from __future__ import annotations

from renio_megatron.config.schema import RunConfig, SftConfig
from renio_megatron.data.sources.files import check_file


def check_data(config: RunConfig | SftConfig) -> None:
    """Raises `ConfigError` or `DataError` where a file of records is not there, or not what it should be."""
    check_file(config.data, "train")
    if config.evaluate.every:
        check_file(config.data, "eval")
