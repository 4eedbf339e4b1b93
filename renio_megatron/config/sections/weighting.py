"""Settings of the weights of sequences and tokens: one class per strategy, picked by its name.

A new strategy needs a class here, a line in `WEIGHTINGS`, and a file in `objective/weightings`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from renio_megatron.config.foreign_names import NORMALIZATIONS
from renio_megatron.config.tagged import Tagged
from renio_megatron.config.validators import require_choice
from renio_megatron.errors import ConfigError

_HERE, _STRATEGIES = __name__, "renio_megatron.objective.weightings"
_COMBINED = "renio_megatron.config.sections.combined_weighting"
WEIGHTINGS: dict[str, str] = {
    "renio": f"{_HERE}:RenioWeighting",
    "uniform": f"{_HERE}:UniformWeighting",
    "length": f"{_HERE}:LengthWeighting",
    "student_entropy": f"{_HERE}:StudentEntropyWeighting",
    "permuted": f"{_COMBINED}:PermutedWeighting",
    "product": f"{_COMBINED}:ProductWeighting",
}
"""Name -> `module:class` of its settings."""

MAX_EXPONENT = 80.0
"""Largest logarithm of a raw weight: e^80 is 5.5e34, and the sum over a batch is still finite in fp32."""


@dataclass(frozen=True, kw_only=True, init=False)
class WeightingConfig(Tagged):
    """Settings of a weighting strategy: `WeightingConfig(name="length", cap=5.0)` makes those of `length`.

    Attributes:
        name: `renio`; `uniform`, every weight 1: plain distillation; `length`; `student_entropy`; `permuted`; or
            `product`, written as a list.
    """

    SECTION: ClassVar[str] = "weighting"
    TAG: ClassVar[str] = "name"
    VARIANTS: ClassVar[Mapping[str, str]] = WEIGHTINGS
    OF_LIST: ClassVar[tuple[str, ...]] = ("product", "factors")
    strategy: ClassVar[str] = ""
    """`module:class` of the strategy, made from these settings."""

    name: str = "renio"

    @property
    def needs(self) -> frozenset[str]:
        """Names in `objective.weightings.INPUTS` that the strategy reads; no other inputs are computed for it."""
        return frozenset()

    @property
    def parts(self) -> tuple[WeightingConfig, ...]:
        """The strategies whose weights are multiplied; a single strategy is its own only part."""
        return (self,)

    @property
    def everything(self) -> tuple[WeightingConfig, ...]:
        """The multiplied strategies and the strategies that they wrap."""
        return tuple(
            itertools.chain.from_iterable((one, *(one.inner.everything if one.inner else ())) for one in self.parts)
        )

    @property
    def inner(self) -> WeightingConfig | None:
        """The strategy that this one wraps; None where it wraps none."""
        return None

    @property
    def normalized(self) -> WeightingConfig:
        """The settings whose `divisor` and `bound` apply: its own, or those of the strategy that it wraps."""
        return self if self.inner is None else self.inner.normalized

    @property
    def weighs_tokens(self) -> bool:
        """Whether tokens have weights, not only sequences."""
        return False

    @property
    def divisor(self) -> str:
        """Normalization of raw weights, a value of `normalize`; `none` where they are not divided."""
        return "none" if self.inner is None else self.inner.divisor

    @property
    def bound(self) -> float | None:
        """The upper bound of a weight in effect; None for no bound."""
        return None if self.inner is None else self.inner.bound

    @property
    def group(self) -> int:
        """Neighbors of the global order that must stay together, because they share a mean."""
        return 1 if self.inner is None else self.inner.group

    def check_batch(self, num_sequences: int) -> None:
        """Raises `ConfigError` where a step of `num_sequences` sequences does not fit the normalization."""
        if self.inner is not None:
            self.inner.check_batch(num_sequences)


def renio_in(weighting: WeightingConfig) -> RenioWeighting | None:
    """ReNIO's settings where it is a part of a weighting, or wrapped by one of the parts; None elsewhere."""
    return next((one for one in weighting.everything if isinstance(one, RenioWeighting)), None)


@dataclass(frozen=True, kw_only=True)
class UniformWeighting(WeightingConfig):
    """Every weight is 1: plain on-policy distillation."""

    strategy: ClassVar[str] = f"{_STRATEGIES}.uniform:Uniform"

    name: str = "uniform"


@dataclass(frozen=True, kw_only=True)
class NormalizedWeighting(WeightingConfig):
    """Base of strategies whose raw weights are divided by a mean.

    Attributes:
        normalize: `batch` divides by the mean raw weight of all sequences of the optimizer step, or tokens where tokens
            are weighted; `none` keeps the raw weight; some strategies have further values.
        cap: upper bound of a sequence's weight after `batch`; None for no bound.

    Raises:
        ConfigError: a value out of its range.
    """

    NORMALIZATIONS: ClassVar[tuple[str, ...]] = ("batch", "none")
    CAPPED: ClassVar[tuple[str, ...]] = ("batch",)

    normalize: str = "batch"
    cap: float | None = 10.0

    @property
    def divisor(self) -> str:
        """Normalization of raw weights."""
        return self.normalize

    @property
    def bound(self) -> float | None:
        """The cap, where it is in effect."""
        return self.cap if self.normalize in self.CAPPED else None

    def check_batch(self, num_sequences: int) -> None:
        """A mean over the batch needs two sequences."""
        if self.normalize == "batch" and num_sequences < 2:
            raise ConfigError(
                f"weighting '{self.name}' needs at least 2 sequences per optimizer step to have a batch mean; got "
                f"{num_sequences}. Raise train.global_batch_size, or choose weighting.normalize=none."
            )

    def without_effect(self) -> dict[str, str]:
        """Settings that have no effect together with the others, with the reason."""
        if self.normalize in self.CAPPED:
            return {}
        return {"cap": f"weights are capped only after weighting.normalize={' or '.join(self.CAPPED)}"}

    def __post_init__(self) -> None:
        require_choice("weighting.normalize", self.normalize, self.NORMALIZATIONS)
        if self.cap is not None and not self.cap > 0.0:
            raise ConfigError(f"weighting.cap must be positive, or null for no bound; got {self.cap}.")


@dataclass(frozen=True, kw_only=True)
class RenioWeighting(NormalizedWeighting):
    """A sequence's weight follows from the log ratios of its pivotal tokens.

    Attributes:
        threshold: tau of the paper, nats: a token is pivotal where its clipped log ratio is at least this.
        ceiling: c of the paper, nats: log ratios are clipped from above at this value.
        temperature: raw weight = exp(mean pivotal log ratio / temperature).
        normalize: `batch` divides by the mean raw weight of all sequences of the optimizer step; `group` by the mean of
            `group_size` consecutive sequences of the global order (what the authors' release does for the sequences of
            one device); `ema` by a moving average of batch means; `none` keeps the raw weight.
        group_size: sequences that share a mean under `group`.
        ema_decay: share of the old average kept at each step under `ema`.
        cap: upper bound of a weight after `batch` or `group`; None for no bound.

    Raises:
        ConfigError: a value out of its range.
    """

    strategy: ClassVar[str] = f"{_STRATEGIES}.renio:Renio"
    NORMALIZATIONS: ClassVar[tuple[str, ...]] = ("batch", "group", "ema", "none")
    CAPPED: ClassVar[tuple[str, ...]] = ("batch", "group")

    name: str = "renio"
    threshold: float = 0.8
    ceiling: float = 2.5
    temperature: float = 1.0
    normalize: str = "batch"
    group_size: int | None = None
    ema_decay: float = 0.9
    cap: float | None = 10.0

    @property
    def needs(self) -> frozenset[str]:
        """The log ratios."""
        return frozenset(("student_logp", "teacher_logp"))

    @property
    def group(self) -> int:
        """Sequences of a normalization group, which must stay together."""
        return (self.group_size or 1) if self.normalize == "group" else 1

    def check_batch(self, num_sequences: int) -> None:
        """The batch must also consist of whole groups."""
        super().check_batch(num_sequences)
        if num_sequences % self.group:
            raise ConfigError(
                f"weighting.group_size={self.group_size} does not divide train.global_batch_size={num_sequences}. "
                "Choose a divisor of the batch."
            )

    def without_effect(self) -> dict[str, str]:
        """Settings that have no effect together with the others, with the reason."""
        found = super().without_effect()
        if self.normalize != "group":
            found["group_size"] = "weighting.normalize is not group"
        if self.normalize != "ema":
            found["ema_decay"] = "weighting.normalize is not ema"
        return found

    def __post_init__(self) -> None:
        if self.normalize in NORMALIZATIONS:
            raise ConfigError(
                f"weighting.normalize must be one of {', '.join(self.NORMALIZATIONS)}; got {self.normalize!r}: "
                f"{NORMALIZATIONS[self.normalize]}"
            )
        if self.threshold != self.threshold or self.ceiling != self.ceiling:
            raise ConfigError("weighting.threshold and weighting.ceiling must be numbers; got NaN.")
        if self.ceiling < self.threshold:
            raise ConfigError(
                f"weighting.ceiling ({self.ceiling}) is below weighting.threshold ({self.threshold}): no token could "
                "ever be pivotal. Raise the ceiling or lower the threshold."
            )
        if not 0.0 < self.temperature < float("inf"):
            raise ConfigError(f"weighting.temperature must be positive and finite; got {self.temperature}.")
        if MAX_EXPONENT < self.ceiling / self.temperature < float("inf"):
            raise ConfigError(
                f"weighting.ceiling / weighting.temperature is {self.ceiling / self.temperature:g}. The largest raw "
                f"weight is its exponential, which above {MAX_EXPONENT:g} fp32 cannot hold. Lower the ceiling, "
                "or raise the temperature."
            )
        super().__post_init__()
        if self.normalize == "group" and (self.group_size is None or self.group_size < 1):
            raise ConfigError(
                f"weighting.normalize=group needs weighting.group_size of at least 1; got {self.group_size}. "
                "The authors' release uses 8, 4 and 2 for its three model sizes."
            )
        if not 0.0 <= self.ema_decay < 1.0:
            raise ConfigError(f"weighting.ema_decay must lie in [0, 1); got {self.ema_decay}.")


@dataclass(frozen=True, kw_only=True)
class LengthWeighting(NormalizedWeighting):
    """Weights each sequence by its number of tokens: with the loss's mean over tokens, all tokens count equally."""

    strategy: ClassVar[str] = f"{_STRATEGIES}.length:Length"

    name: str = "length"


@dataclass(frozen=True, kw_only=True)
class StudentEntropyWeighting(NormalizedWeighting):
    """Weights each token, or sequence, by the entropy of the student's distribution, nats.

    Attributes:
        per: `token`; or `sequence`, the mean entropy of its tokens.
        normalize: `unit_mean` divides by the mean over a sequence's tokens, so that sequences count equally; `batch` by
            the mean of all tokens, or sequences, of the optimizer step; `none` keeps the entropy.
        cap: upper bound of a sequence's weight after `batch`; None for no bound. Token weights are not bounded.
    """

    strategy: ClassVar[str] = f"{_STRATEGIES}.student_entropy:StudentEntropy"
    NORMALIZATIONS: ClassVar[tuple[str, ...]] = ("unit_mean", "batch", "none")

    name: str = "student_entropy"
    per: str = "token"
    normalize: str = "unit_mean"

    @property
    def needs(self) -> frozenset[str]:
        """The student's entropies, and no other input."""
        return frozenset(("student_entropy",))

    @property
    def weighs_tokens(self) -> bool:
        """Whether `per` is `token`."""
        return self.per == "token"

    @property
    def bound(self) -> float | None:
        """The cap, for weights of sequences only."""
        return None if self.per == "token" else super().bound

    def check_batch(self, num_sequences: int) -> None:
        """A mean over tokens needs no second sequence."""
        if self.per == "sequence":
            super().check_batch(num_sequences)

    def without_effect(self) -> dict[str, str]:
        """Settings that have no effect together with the others, with the reason."""
        return {"cap": "tokens are not bounded"} if self.per == "token" else super().without_effect()

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("weighting.per", self.per, ("token", "sequence"))
        if self.per == "sequence" and self.normalize == "unit_mean":
            raise ConfigError(
                "weighting.per=sequence with weighting.normalize=unit_mean: that is the mean over a sequence's tokens. "
                "Set weighting.normalize=batch, or none."
            )
