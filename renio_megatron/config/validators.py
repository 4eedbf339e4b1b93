"""Checks shared by several settings."""

from __future__ import annotations

from collections.abc import Iterable

from renio_megatron.errors import ConfigError

MAX_SEQUENCES = 2**20


def require_positive(section: str, **values: float | None) -> None:
    """Raises `ConfigError` for the first value that is not above 0 and finite; None passes.

    Args:
        section: the keys' section; empty at the top level.
        values: value of each key.
    """
    for name, value in values.items():
        if value is not None and not 0 < value < float("inf"):
            key = f"{section}.{name}" if section else name
            raise ConfigError(f"{key} must be above 0{' and finite' if value > 0 else ''}; got {value}.")


def require_countable(section: str, **values: int) -> None:
    """Raises `ConfigError` for a number of sequences too large for memory: their prompts are built together."""
    for name, value in values.items():
        if value > MAX_SEQUENCES:
            raise ConfigError(
                f"{section}.{name} must be at most {MAX_SEQUENCES}, whose prompts are in memory together; got {value}."
            )


def require_choice(key: str, value: str, choices: Iterable[str]) -> None:
    """Raises `ConfigError` where `value` is not one of `choices`."""
    choices = tuple(choices)
    if value not in choices:
        raise ConfigError(f"{key} must be one of {', '.join(choices)}; got {value!r}.")


def require_device(device: str | None) -> None:
    """Raises `ConfigError` for a device that is neither `cpu` nor null."""
    if device is not None:
        require_choice("device (null: GPUs where there are any)", device, ("cpu",))
