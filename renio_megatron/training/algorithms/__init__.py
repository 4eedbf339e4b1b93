"""One training step each, over roles: a few lines that read as the method does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from renio_megatron.types import Prompt


class Algorithm(Protocol):
    """What the trainer repeats."""

    def tune(self, num_tokens: int, report: Callable[[str], None] | None = None) -> None:
        """Tunes the kernels of the steps to come, for micro-batches of at most `num_tokens` completion tokens."""
        ...

    def step(self, prompts: Sequence[Prompt], step: int) -> dict[str, float]:
        """One optimizer step on this rank's prompts; metrics, equal on every rank."""
        ...

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold for the next step to be the same."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Takes back what `state` gave."""
        ...

    def close(self) -> None:
        """Lets go whoever waits for the next step; there is none."""
        ...
