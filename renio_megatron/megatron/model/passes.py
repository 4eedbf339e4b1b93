"""What the layers of a trained part have to know of a micro-batch, also where they are recomputed."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Hashable
from typing import Generic, TypeVar

import torch

Item = TypeVar("Item")


class Passes(Generic[Item]):
    """What is known of the micro-batch that a layer reads.

    A recomputed layer reads it a second time in its backward pass, when the pipeline may have begun other
    micro-batches. In each layer those passes come in the order of the first ones.
    """

    def __init__(self) -> None:
        self._current: Item | None = None
        self._waiting: dict[Hashable, deque[Item]] = defaultdict(deque)

    def clear(self) -> None:
        """Forgets everything: there is no micro-batch until `begin`."""
        self._current = None
        self._waiting.clear()

    def begin(self, item: Item) -> None:
        """Sets what is known of the micro-batch that the next forward pass reads."""
        self._current = item

    def read(self, layer: Hashable) -> tuple[Item | None, bool]:
        """What is known of the micro-batch of a layer's pass, which each layer reads once a pass.

        Returns:
            (that, or None without a micro-batch; whether the pass is one that will be recomputed).
        """
        if self._current is None:
            return None, False
        if not torch.is_grad_enabled():
            self._waiting[layer].append(self._current)
            return self._current, True
        waiting = self._waiting[layer]
        return (waiting.popleft() if waiting else self._current), False
