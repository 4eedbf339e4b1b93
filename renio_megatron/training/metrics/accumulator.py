"""Accumulation of a step's metrics as sums and maxima, reduced over micro-batches and ranks before the division.

A number may be a tensor on a device: it is read once, at the end of the step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import torch
import torch.distributed as dist

from renio_megatron.parallel.layout import ParallelLayout
from renio_megatron.parallel.reductions import sum_over_ranks
from renio_megatron.training.metrics.registry import MAXIMA, MEANS, METRICS, metric_of

_Number: TypeAlias = "float | torch.Tensor"


def _fp64(value: _Number) -> _Number:
    """A Python float, or a scalar tensor in fp64 without gradient."""
    return value.detach().double() if isinstance(value, torch.Tensor) else float(value)


def _on_host(values: Sequence[_Number]) -> list[float]:
    """The numbers, tensors read by one copy."""
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    read = iter(torch.stack(tensors).tolist()) if tensors else iter(())
    return [next(read) if isinstance(value, torch.Tensor) else value for value in values]


class MetricAccumulator:
    """A step's metrics as sums and maxima, which can be merged with those of other ranks.

    >>> accumulator = MetricAccumulator()
    >>> accumulator.add("rollout/accuracy", 3, 4)
    >>> accumulator.add("rollout/accuracy", 0, 2)
    >>> accumulator.result()
    {'rollout/accuracy': 0.5}
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[_Number, _Number]] = {}
        self._maxima: dict[str, _Number] = {}

    def add(self, name: str, numerator: _Number, denominator: _Number = 1.0) -> None:
        """Adds a contribution to a mean; a number that every rank knows is added with denominator 1.

        Tensors are added up where they are, in fp64, without a synchronization with their device.

        Raises:
            KeyError: no such metric; the nearest one is named.
            ValueError: the metric is a maximum.
        """
        self._require(name, ("mean", "root_mean"), "add_max")
        old = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = (old[0] + _fp64(numerator), old[1] + _fp64(denominator))

    def add_max(self, name: str, value: _Number) -> None:
        """Keeps `value` if it is the largest so far; NaN is kept for good.

        Raises:
            KeyError: no such metric; the nearest one is named.
            ValueError: the metric is a mean.
        """
        self._require(name, ("max",), "add")
        old, value = self._maxima.get(name, -math.inf), _fp64(value)
        if isinstance(old, torch.Tensor) or isinstance(value, torch.Tensor):
            device = old.device if isinstance(old, torch.Tensor) else value.device  # type: ignore[union-attr]
            old, value = (torch.as_tensor(one, dtype=torch.float64, device=device) for one in (old, value))
            self._maxima[name] = torch.maximum(old, value)  # which keeps NaN
        else:
            self._maxima[name] = old if math.isnan(old) or old > value else value

    @staticmethod
    def _require(name: str, reductions: tuple[str, ...], other_method: str) -> None:
        if (is_now := metric_of(name).reduction) not in reductions:
            raise ValueError(f"metric {name!r} is reduced by {is_now}: use MetricAccumulator.{other_method}.")

    def sums(self) -> dict[str, tuple[float, float]]:
        """Numerator and denominator of every mean added so far; waits for tensors."""
        flat = iter(_on_host([part for parts in self._sums.values() for part in parts]))
        return {name: (next(flat), next(flat)) for name in self._sums}

    def maxima(self) -> dict[str, float]:
        """Every maximum added so far; waits for tensors."""
        return dict(zip(self._maxima, _on_host(list(self._maxima.values())), strict=True))

    def merge(self, other: MetricAccumulator) -> None:
        """Adds the numbers of another micro-batch or rank."""
        for name, (numerator, denominator) in other._sums.items():
            self.add(name, numerator, denominator)
        for name, value in other._maxima.items():
            self.add_max(name, value)

    def pack(self) -> tuple[list[float], list[float]]:
        """Two lists, each of one length on every rank: to be reduced in fp64 by sum and by maximum.

        The first holds numerator and denominator of each of `MEANS` (0, 0 where nothing was added), the second each of
        `MAXIMA` (minus infinity where nothing was added).
        """
        means, largest = self.sums(), self.maxima()
        sums = [part for name in MEANS for part in means.get(name, (0.0, 0.0))]
        return sums, [largest.get(name, -math.inf) for name in MAXIMA]

    @classmethod
    def unpack(cls, sums: Sequence[float], maxima: Sequence[float]) -> MetricAccumulator:
        """The accumulator of two lists in the order of `pack`.

        >>> accumulator = MetricAccumulator()
        >>> accumulator.add("loss", 1.5, 2)
        >>> MetricAccumulator.unpack(*accumulator.pack()).sums()
        {'loss': (1.5, 2.0)}
        """
        accumulator = cls()
        for name, numerator, denominator in zip(MEANS, sums[::2], sums[1::2], strict=True):
            if denominator != 0.0:
                accumulator.add(name, numerator, denominator)
        for name, value in zip(MAXIMA, maxima, strict=True):
            if value != -math.inf:
                accumulator.add_max(name, value)
        return accumulator

    def result(self) -> dict[str, float]:
        """Each metric's value, in the order of `METRICS`; a mean over nothing (denominator 0) is left out."""
        values = self.maxima()
        for name, (numerator, denominator) in self.sums().items():
            if denominator != 0.0:
                mean = numerator / denominator
                values[name] = mean**0.5 if metric_of(name).reduction == "root_mean" else mean
        return {name: values[name] for name in METRICS if name in values}


def reduce_metrics(accumulator: MetricAccumulator, layout: ParallelLayout) -> dict[str, float]:
    """The finished metrics of all ranks' accumulators, equal on every rank.

    Tensor ranks hold the same numbers, so the first one reports for them; stages that computed nothing hold none.
    """
    if layout.world_size == 1:
        return accumulator.result()
    sums, maxima = (torch.tensor(part, dtype=torch.float64, device=layout.device) for part in accumulator.pack())
    sums = sum_over_ranks(sums, layout)
    dist.all_reduce(maxima, op=dist.ReduceOp.MAX)
    return MetricAccumulator.unpack(sums.tolist(), maxima.tolist()).result()
