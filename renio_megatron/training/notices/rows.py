"""The last steps of a run, as checks see them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from renio_megatron.config import LossConfig, WeightingConfig

Row = tuple[int, Mapping[str, float]]
"""(step, metrics)."""


@dataclass(frozen=True)
class Watched:
    """Settings of a run that its notices read.

    Attributes:
        weighting, loss: of distillation; fine-tuning has no weights.
        num_sequences: sequences of an optimizer step.
        is_prefix: whether completions are cut on purpose.
    """

    weighting: WeightingConfig = field(default_factory=lambda: WeightingConfig(name="uniform"))
    loss: LossConfig = field(default_factory=LossConfig)
    num_sequences: int = 1
    is_prefix: bool = False


@dataclass(frozen=True)
class Notice:
    """Something that a run says once.

    Attributes:
        what: what was seen, for the documentation.
        when: from which threshold on.
        check: the last steps, of which the newest has just ended -> what to say: what was seen, why it matters, which
            setting changes it; None: nothing.
    """

    what: str
    when: str
    check: Callable[[Sequence[Row], Watched], str | None]


STEADY_STEPS = 5
"""Consecutive steps that must all meet a condition that is exact in each step. One small batch without a pivotal token
is chance; five in a row are due to a setting, or to a student that already agrees with its teacher."""

WINDOW_STEPS = 20
"""Steps whose mean is used where single steps are noisy."""

LONG = 50
"""Steps that are long: for what a few steps show by chance."""


def last(rows: Sequence[Row], count: int, name: str) -> list[Row]:
    """The last `count` rows; none where there are fewer, or one of them lacks the metric."""
    chosen = list(rows)[-count:]
    return chosen if len(chosen) == count and all(name in row for _, row in chosen) else []


def always(rows: Sequence[Row], count: int, name: str, value: float) -> list[Row]:
    """The last `count` rows, where the metric has this value in all of them; none elsewhere."""
    chosen = last(rows, count, name)
    return chosen if all(row[name] == value for _, row in chosen) else []


def mean(rows: Sequence[Row], name: str) -> float:
    """Mean of a metric."""
    return math.fsum(row[name] for _, row in rows) / len(rows)


def steps(rows: Sequence[Row]) -> str:
    """The rows' steps in words."""
    return f"steps {rows[0][0]} to {rows[-1][0]}"


def divergence(rows: Sequence[Row]) -> str:
    """The last step's divergence in brackets, where it is known: it separates agreement from too high a threshold."""
    kl = rows[-1][1].get("loss/kl")
    return "" if kl is None else f" (divergence in step {rows[-1][0]}: {kl:.3g} nats/token)"
