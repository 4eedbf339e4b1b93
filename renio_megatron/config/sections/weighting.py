"""Settings of the sample weights."""

from __future__ import annotations

from dataclasses import dataclass

from renio_megatron.errors import ConfigError

NORMALIZATIONS = ("batch", "group", "ema", "none")
MOST_EXPONENT = 80.0
"""Largest logarithm of a raw weight: e^80 is 5.5e34, and a batch's sum of such is still a number in fp32."""


@dataclass(frozen=True, kw_only=True)
class WeightingConfig:
    """How a sequence's weight follows from the log ratios of its tokens.

    Attributes:
        name: `renio`, or `uniform` (every weight 1: plain distillation). Log ratios and raw weights are computed for
            both, as diagnostics.
        threshold: tau of the paper, nats: a token is pivotal where its clipped log ratio is at least this.
        ceiling: c of the paper, nats: log ratios are clipped from above at this value.
        temperature: raw weight = exp(mean pivotal log ratio / temperature).
        normalize: `batch` divides by the mean raw weight of all sequences of the optimiser step; `group` by the mean of
            `group_size` consecutive sequences of the global order (what the authors' release does for the sequences of
            one device); `ema` by a moving average of batch means; `none` keeps the raw weight.
        group_size: sequences that share a mean under `group`.
        ema_decay: share of the old average kept at each step under `ema`.
        cap: upper bound of a weight after `batch` or `group`; None for no bound.

    Raises:
        ConfigError: a value out of its range.
    """

    name: str = "renio"
    threshold: float = 0.8
    ceiling: float = 2.5
    temperature: float = 1.0
    normalize: str = "batch"
    group_size: int | None = None
    ema_decay: float = 0.9
    cap: float | None = 10.0

    @property
    def is_normalized(self) -> bool:
        """Whether raw weights are divided by a mean, and capped; else every weight is 1 as it is."""
        return self.name != "uniform"

    def __post_init__(self) -> None:
        if self.threshold != self.threshold or self.ceiling != self.ceiling:
            raise ConfigError("weighting.threshold and weighting.ceiling must be numbers; got NaN.")
        if self.ceiling < self.threshold:
            raise ConfigError(
                f"weighting.ceiling ({self.ceiling}) is below weighting.threshold ({self.threshold}): no token could "
                "ever be pivotal. Raise the ceiling or lower the threshold."
            )
        if not 0.0 < self.temperature < float("inf"):
            raise ConfigError(f"weighting.temperature must be positive and finite; got {self.temperature}.")
        if MOST_EXPONENT < self.ceiling / self.temperature < float("inf"):
            raise ConfigError(
                f"weighting.ceiling / weighting.temperature is {self.ceiling / self.temperature:g}. The largest raw "
                f"weight is its exponential, which above {MOST_EXPONENT:g} fp32 cannot hold. Lower the ceiling, "
                "or raise the temperature."
            )
        if self.normalize not in NORMALIZATIONS:
            raise ConfigError(
                f"weighting.normalize must be one of {', '.join(NORMALIZATIONS)}; got {self.normalize!r}."
            )
        if self.normalize == "group" and (self.group_size is None or self.group_size < 1):
            raise ConfigError(
                f"weighting.normalize=group needs weighting.group_size of at least 1; got {self.group_size}. "
                "The authors' release uses 8, 4 and 2 for its three model sizes."
            )
        if not 0.0 <= self.ema_decay < 1.0:
            raise ConfigError(f"weighting.ema_decay must lie in [0, 1); got {self.ema_decay}.")
        if self.cap is not None and not self.cap > 0.0:
            raise ConfigError(f"weighting.cap must be positive, or null for no bound; got {self.cap}.")
