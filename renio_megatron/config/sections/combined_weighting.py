"""Settings of weightings that are composed of others: a permuted one, and a product."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from renio_megatron.config.sections.weighting import RenioWeighting, WeightingConfig
from renio_megatron.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PermutedWeighting(WeightingConfig):
    """Another strategy's final weights, permuted among the sequences of the batch: a control with the same weights that
    ignores the data. Token weights are permuted inside each sequence.

    Attributes:
        of: the strategy whose weights are permuted.
    """

    strategy: ClassVar[str] = "renio_megatron.objective.weightings.permuted:Permuted"

    name: str = "permuted"
    of: WeightingConfig = field(default_factory=RenioWeighting)

    @property
    def needs(self) -> frozenset[str]:
        """The inner strategy's inputs, and the sequence numbers."""
        return self.of.needs | {"sequence", "generator"} | ({"position"} if self.weighs_tokens else frozenset())

    @property
    def inner(self) -> WeightingConfig | None:
        """The strategy whose weights are permuted."""
        return self.of

    @property
    def weighs_tokens(self) -> bool:
        """Whether the inner strategy weights tokens."""
        return self.of.weighs_tokens

    def __post_init__(self) -> None:
        if not isinstance(self.of, WeightingConfig):
            raise ConfigError(f"weighting.of is a WeightingConfig; got {self.of!r}.")
        if isinstance(self.of, PermutedWeighting | ProductWeighting):
            raise ConfigError(f"weighting.of={self.of.name}: it is one strategy with weights of its own, as renio is.")


@dataclass(frozen=True, kw_only=True)
class ProductWeighting(WeightingConfig):
    """Several strategies whose weights are multiplied, written as a list in a recipe.

    Attributes:
        factors: the strategies, each normalized alone; where several weight sequences, the product of the sequence
            weights is normalized again, to a batch mean of 1.

    Raises:
        ConfigError: no strategy, or a product inside of it.
    """

    name: str = "product"
    factors: tuple[WeightingConfig, ...] = ()

    @property
    def parts(self) -> tuple[WeightingConfig, ...]:
        """The strategies whose weights are multiplied."""
        return self.factors

    @property
    def weighs_tokens(self) -> bool:
        """Whether any of the strategies weights tokens."""
        return any(factor.weighs_tokens for factor in self.factors)

    @property
    def bound(self) -> float | None:
        """The lowest bound of the strategies."""
        return min((one.bound for one in self.factors if one.bound is not None), default=None)

    @property
    def group(self) -> int:
        """Neighbors of the global order that must stay together for all of the strategies."""
        return math.lcm(*(factor.group for factor in self.factors))

    def check_batch(self, num_sequences: int) -> None:
        """Checks each of the strategies."""
        for factor in self.factors:
            factor.check_batch(num_sequences)

    @property
    def needs(self) -> frozenset[str]:
        """Inputs that any of the strategies needs."""
        return frozenset().union(*(factor.needs for factor in self.factors))

    def __post_init__(self) -> None:
        if not isinstance(self.factors, Sequence) or not all(isinstance(one, WeightingConfig) for one in self.factors):
            raise ConfigError(f"weighting.factors are several WeightingConfigs; got {self.factors!r}.")
        object.__setattr__(self, "factors", tuple(self.factors))
        if not self.factors or any(isinstance(factor, ProductWeighting) for factor in self.factors):
            raise ConfigError(
                "weighting: a list has at least one strategy, and no list among them. Write it as "
                "[{name: renio}, {name: length}]."
            )
