"""Algorithms: one training step each, written over the protocols of `training/interfaces.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from renio_megatron.types import Prompt


class Algorithm(Protocol):
    """One training step and its state, as the trainer calls them."""

    def tune(self, num_tokens: int, report: Callable[[str], None] | None = None) -> None:
        """Tunes the kernels of the steps to come, for micro-batches of at most `num_tokens` completion tokens."""
        ...

    def step(self, prompts: Sequence[Prompt], step: int) -> dict[str, float]:
        """One optimizer step on this rank's prompts; metrics, equal on every rank."""
        ...

    def state(self) -> dict[str, Any]:
        """The state that a checkpoint must hold for the next step to be the same."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Restores the result of `state`."""
        ...

    def close(self) -> None:
        """Releases ranks that wait for the next step, after the last one."""
        ...
