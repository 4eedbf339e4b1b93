"""The named scalars of a run: their units, how ranks are reduced to one number, and where they are written.

A step's numbers travel as sums (`Tally`), so that micro-batches and ranks can be joined before anything is divided; the
collective itself belongs to a higher floor, which reduces `Tally.pack` and reads `Tally.unpack`.
"""

from __future__ import annotations

import contextlib
import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from renio_megatron.errors import CheckpointError, DataError, NumericsError
from renio_megatron.files import JsonLines, output_error, parse_row


@dataclass(frozen=True)
class Metric:
    """What a scalar means.

    Attributes:
        unit: unit, without brackets; `1` for a pure number or a share.
        reduction: over micro-batches and ranks, `mean` (sum of numerators over sum of denominators; a number that is
            equal on every rank is its own mean) or `max`.
        description: one line for people.
    """

    unit: str
    reduction: str
    description: str


METRICS: dict[str, Metric] = {
    "step": Metric("steps", "max", "optimiser steps done; 0 is the state before training"),
    "loss": Metric("nats/token", "mean", "weighted divergence: mean over sequences of weight x mean over tokens"),
    "grad_norm": Metric("1", "mean", "norm of the whole gradient, before clipping"),
    "lr": Metric("1", "mean", "learning rate of the step"),
    "renio/weight_mean": Metric("1", "mean", "normalised sample weight, mean over sequences"),
    "renio/weight_max": Metric("1", "max", "largest normalised sample weight of the step"),
    "renio/unit_weight_frac": Metric("1", "mean", "share of sequences without a pivotal token (raw weight exactly 1)"),
    "renio/raw_weight_mean": Metric("1", "mean", "sample weight before normalisation, mean over sequences"),
    "renio/pivotal_frac": Metric("1", "mean", "share of completion tokens that are pivotal"),
    "renio/ess_frac": Metric("1", "mean", "effective share of the batch: (sum w)^2 / (B sum w^2)"),
    "renio/cap_frac": Metric("1", "mean", "share of sequences whose weight was cut at the cap"),
    "renio/ceiling_frac": Metric("1", "mean", "share of sequences whose raw weight is exp(ceiling / temperature)"),
    "renio/pivot_gradient_frac": Metric(
        "1", "mean", "norm of the gradient at pivotal tokens under entry_clip, over that without it; first micro-batch"
    ),
    "renio/auc_wrong": Metric("1", "mean", "AUC of the raw weight against wrong completions; 0.5 is chance"),
    "loss/entry_clip_frac": Metric(
        "1", "mean", "share of completion tokens at which entry_clip cut a vocabulary entry"
    ),
    "loss/kl": Metric("nats/token", "mean", "unweighted divergence, mean over completion tokens"),
    "rollout/accuracy": Metric("1", "mean", "share of the step's completions that are correct"),
    "rollout/grader_error_frac": Metric("1", "mean", "share of the step's completions on which the grader failed"),
    "rollout/length": Metric("tokens", "mean", "length of a completion"),
    "rollout/truncated_frac": Metric("1", "mean", "share of completions that were cut before their end token"),
    "time/step_s": Metric("s", "max", "whole step, on the first rank"),
    "time/rollout_s": Metric("s", "max", "sampling of the completions, on the first rank"),
    "time/teacher_s": Metric("s", "max", "scoring by the teacher after all are drawn, on the first rank"),
    "time/train_s": Metric("s", "max", "forward, backward and optimiser, on the first rank"),
    "teacher/*/sequences_frac": Metric(
        "1", "mean", "of several teachers: share of the step's sequences that it scored"
    ),
    "teacher/*/kl": Metric("nats/token", "mean", "of several teachers: divergence at its sequences, mean over tokens"),
    "teacher/*/raw_weight_mean": Metric("1", "mean", "of several teachers: raw weight, mean over its sequences"),
    "teacher/*/accuracy": Metric("1", "mean", "of several teachers: share of its sequences that are correct"),
    "teacher/payload_sent_mb": Metric("MiB", "max", "teacher's hidden states that ranks sent each other in a step"),
    "memory/teacher_payload_mb": Metric("MiB", "max", "device memory that the teacher's hidden states took at a time"),
    "moe/aux_loss": Metric(
        "1", "mean", "load-balancing loss without its coefficient, mean over sequences and layers; 1 is an even load"
    ),
    "moe/load_max_over_mean": Metric(
        "1", "max", "tokens of a layer's busiest expert over the mean of its experts, in the worst layer"
    ),
    "moe/idle_frac": Metric("1", "mean", "share of experts, over all layers, that no token of the step went to"),
    "moe/router_entropy": Metric("nats", "mean", "entropy of a router's probabilities, mean over tokens and layers"),
    "train/skipped_frac": Metric("1", "mean", "1 where the step was left out because its gradient was not finite"),
    "tokens_per_s": Metric("tokens/s", "mean", "completion tokens of all ranks over the time of the step"),
    "eval/accuracy_greedy": Metric("1", "mean", "accuracy on held-out problems, most likely tokens"),
    "eval/accuracy_sampled": Metric("1", "mean", "accuracy on held-out problems, sampled completions"),
}

# Those with a part of the name left open stay out of tallies, whose ranks must all know the same names.
MEANS = tuple(name for name, metric in METRICS.items() if metric.reduction == "mean" and "*" not in name)
MAXIMA = tuple(name for name, metric in METRICS.items() if metric.reduction == "max" and "*" not in name)
_ORDER = {name: number for number, name in enumerate(METRICS)}


def _family(name: str) -> str:
    """The key of `METRICS` for a name: itself, or the one that leaves its middle open."""
    first, middle, last = (*name.split("/"), "", "")[:3]
    return name if not (middle and last) else f"{first}/*/{last}"


def _metric(name: str) -> Metric:
    if name not in METRICS:
        nearest = difflib.get_close_matches(name, METRICS, n=1, cutoff=0.0)[0]
        raise KeyError(f"unknown metric {name!r}; the nearest one is {nearest!r}. New ones go into metrics.METRICS.")
    return METRICS[name]


Observer: TypeAlias = Callable[[int, dict[str, float]], None]
"""(step, metrics): a sink's `write`, a progress line's `update`."""


class Tally:
    """A step's numbers as sums and maxima, complete enough to be joined with those of other ranks.

    >>> tally = Tally()
    >>> tally.add("rollout/accuracy", 3, 4)
    >>> tally.add("rollout/accuracy", 0, 2)
    >>> tally.result()
    {'rollout/accuracy': 0.5}
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}
        self._maxima: dict[str, float] = {}

    def add(self, name: str, numerator: float, denominator: float = 1.0) -> None:
        """Adds a contribution to a mean; a number that every rank knows is added with denominator 1.

        Raises:
            KeyError: no such metric; the nearest one is named.
            ValueError: the metric is a maximum.
        """
        self._require(name, "mean", "add_max")
        old = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = (old[0] + float(numerator), old[1] + float(denominator))

    def add_max(self, name: str, value: float) -> None:
        """Keeps `value` if it is the largest so far; NaN is kept for good.

        Raises:
            KeyError: no such metric; the nearest one is named.
            ValueError: the metric is a mean.
        """
        self._require(name, "max", "add")
        old = self._maxima.get(name, -math.inf)
        value = float(value)
        self._maxima[name] = old if math.isnan(old) or old > value else value

    @staticmethod
    def _require(name: str, reduction: str, other_method: str) -> None:
        if (is_now := _metric(name).reduction) != reduction:
            raise ValueError(f"metric {name!r} is reduced by {is_now}: use Tally.{other_method}.")

    def sums(self) -> dict[str, tuple[float, float]]:
        """Numerator and denominator of every mean added so far."""
        return dict(self._sums)

    def maxima(self) -> dict[str, float]:
        """Every maximum added so far."""
        return dict(self._maxima)

    def merge(self, other: Tally) -> None:
        """Adds what another micro-batch or rank counted."""
        for name, (numerator, denominator) in other.sums().items():
            self.add(name, numerator, denominator)
        for name, value in other.maxima().items():
            self.add_max(name, value)

    def pack(self) -> tuple[list[float], list[float]]:
        """Two lists, each of one length on every rank: to be reduced in fp64 by sum and by maximum.

        The first holds numerator and denominator of each of `MEANS` (0, 0 where nothing was added), the second each of
        `MAXIMA` (minus infinity where nothing was added).
        """
        sums = [part for name in MEANS for part in self._sums.get(name, (0.0, 0.0))]
        return sums, [self._maxima.get(name, -math.inf) for name in MAXIMA]

    @classmethod
    def unpack(cls, sums: Sequence[float], maxima: Sequence[float]) -> Tally:
        """The tally of two lists in the order of `pack`.

        >>> tally = Tally()
        >>> tally.add("loss", 1.5, 2)
        >>> Tally.unpack(*tally.pack()).sums()
        {'loss': (1.5, 2.0)}
        """
        tally = cls()
        for name, numerator, denominator in zip(MEANS, sums[::2], sums[1::2], strict=True):
            if denominator != 0.0:
                tally.add(name, numerator, denominator)
        for name, value in zip(MAXIMA, maxima, strict=True):
            if value != -math.inf:
                tally.add_max(name, value)
        return tally

    def result(self) -> dict[str, float]:
        """Each metric's value, in the order of `METRICS`; a mean over nothing (denominator 0) is left out."""
        means = {name: parts[0] / parts[1] for name, parts in self._sums.items() if parts[1] != 0.0}
        values = {**means, **self._maxima}
        return {name: values[name] for name in METRICS if name in values}


class Sink(Protocol):
    """Somewhere to write a step's values to. Rank 0 has them, the other ranks have none."""

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        """Writes the values of one step; None means "not known" and is left out."""

    def close(self) -> None:
        """Writes what is pending and gives the file back. A second call does nothing."""


Sinks: TypeAlias = tuple[Sink, ...]


class JsonlSink(JsonLines):
    """`metrics.jsonl`: one JSON object a line, keys in the order of `METRICS`; only whole lines are ever written.

    An existing file is continued; see `JsonLines` for its arguments and errors.
    """

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        """Appends the row of `step`.

        Raises:
            NumericsError: a value is NaN or infinite.
        """
        self.append([{"step": int(step), **_row(step, values)}])


class TensorBoardSink:
    """The same scalars for TensorBoard.

    Args:
        directory: where the event files go; it is made.
        purge_step: first step that a resumed run writes again; TensorBoard hides older events from there on.

    Raises:
        CheckpointError: the directory cannot be written.
    """

    def __init__(self, directory: str | Path, *, purge_step: int | None = None) -> None:
        # Seconds of import time that a run without TensorBoard need not pay.
        from torch.utils.tensorboard import SummaryWriter

        self.directory = Path(directory)
        try:
            self._writer = SummaryWriter(str(self.directory), purge_step=purge_step)
        except OSError as error:
            raise output_error(self.directory, error) from error

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        """Writes the values of `step` and waits until they are in the file.

        Raises:
            NumericsError: a value is NaN or infinite.
        """
        row = _row(step, values)
        try:
            for name, value in row.items():
                self._writer.add_scalar(name, value, int(step))
            self._writer.flush()
        except OSError as error:
            raise output_error(self.directory, error) from error

    def close(self) -> None:
        """Closes the event file."""
        try:
            self._writer.close()
        except OSError as error:
            raise output_error(self.directory, error) from error


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a file that `JsonlSink` wrote, in its order; a half-written last line is left out.

    Raises:
        CheckpointError: the file cannot be read.
        DataError: a line other than a half-written last one is not a JSON object with a step.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"cannot read the metrics in {path}: {error.strerror or error}. Give the output directory of a run."
        ) from error
    whole, _, rest = content.rpartition(b"\n")
    rows = [parse_row(line, path, number) for number, line in enumerate(whole.splitlines(), start=1) if line.strip()]
    with contextlib.suppress(DataError):
        rows.append(parse_row(rest, path, len(rows) + 1))
    return rows


def _row(step: int, values: Mapping[str, float | None]) -> dict[str, float]:
    """The known values as floats in the order of `METRICS`, without the step."""
    for name in values:
        if _family(name) not in METRICS:
            _metric(name)
    known = sorted(values, key=lambda name: _ORDER[_family(name)])
    row = {name: float(value) for name in known if name != "step" and (value := values[name]) is not None}
    bad = [f"{name} = {value}" for name, value in row.items() if not math.isfinite(value)]
    if bad:
        raise NumericsError(
            f"step {step}: {', '.join(bad)}. The run has diverged: resume from an earlier checkpoint with a lower "
            "train.lr or a smaller train.clip_grad."
        )
    return row
