"""Unused rows of a student's embedding and LM head beyond V, which training must not change.

They have no gradient, but their parameters have one, and an optimizer's weight decay shrinks them: in the parameter,
and in the optimizer's fp32 copy of a bf16 parameter.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from renio_megatron.megatron.model.build import ModelPart
from renio_megatron.models.param_map import VOCABULARY


class SpareRows:
    """This rank's rows [V, the model's own vocabulary), a copy in host memory."""

    def __init__(self, part: ModelPart, optimizer: Any) -> None:
        """Copies the current rows; no rows where the model has none beyond V, or only its adapters are trained.

        Args:
            part: a student, wrapped for training.
            optimizer: Megatron's optimizer of its parameters.
        """
        self._part = part
        self._optimizers = getattr(optimizer, "chained_optimizers", [optimizer])
        self._kept: list[torch.Tensor] = []
        self.keep()

    def keep(self) -> None:
        """Copies the current rows as those to keep."""
        self._kept = [values.to("cpu", copy=True) for values in self._values()]

    def restore(self) -> None:
        """Restores the kept rows."""
        for values, kept in zip(self._values(), self._kept, strict=True):
            values.copy_(kept)

    def _values(self) -> Iterator[torch.Tensor]:
        """Views of the rows, in parameters and in the optimizer's copies of them on this rank."""
        shard, last = self._part.shard, self._part.architecture.vocab_size
        first, stop = shard.num_valid, min(last - shard.start, shard.width)
        if first >= stop:
            return
        for name, parameter in self._part.trained_parameters():
            if name in VOCABULARY:
                yield parameter.detach()[first:stop]
                copy = getattr(parameter, "main_param", None)
                if copy is not None:
                    width = parameter.shape[1]
                    begin, size = self._range(parameter, copy)
                    yield copy.detach().view(-1)[
                        max(0, first * width - begin) : max(0, min(stop * width - begin, size))
                    ]

    def _range(self, parameter: torch.nn.Parameter, copy: torch.Tensor) -> tuple[int, int]:
        """The first element of a parameter of which this rank's copy holds one, and how many it holds."""
        if getattr(parameter, "main_param_sharded", False):
            for one in self._optimizers:
                if parameter in getattr(one, "model_param_gbuf_map", ()):
                    return one._get_model_param_range_map(parameter)["param"].start, copy.numel()
        return 0, copy.numel()
