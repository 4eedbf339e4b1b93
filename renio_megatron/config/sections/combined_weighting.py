"""Settings of weightings that are made of others: a permuted one, and a product."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from renio_megatron.config.sections.weighting import RenioWeighting, WeightingConfig
from renio_megatron.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PermutedWeighting(WeightingConfig):
    """Another strategy's finished weights, handed to other sequences of the same batch: a control, which has the same
    weights and looks at nothing. Tokens' weights are permuted inside each sequence.

    Attributes:
        of: the strategy.
    """

    strategy: ClassVar[str] = "renio_megatron.objective.weightings.permuted:Permuted"

    name: str = "permuted"
    of: WeightingConfig = field(default_factory=RenioWeighting)

    @property
    def needs(self) -> frozenset[str]:
        """What the strategy needs, and who is who."""
        return self.of.needs | {"sequence", "generator"} | ({"position"} if self.weighs_tokens else frozenset())

    @property
    def inner(self) -> WeightingConfig | None:
        """The strategy."""
        return self.of

    @property
    def weighs_tokens(self) -> bool:
        """As the strategy does."""
        return self.of.weighs_tokens

    def __post_init__(self) -> None:
        if not isinstance(self.of, WeightingConfig):
            raise ConfigError(f"weighting.of is a WeightingConfig; got {self.of!r}.")
        if isinstance(self.of, PermutedWeighting | ProductWeighting):
            raise ConfigError(f"weighting.of={self.of.name}: it is one strategy with weights of its own, as renio is.")


@dataclass(frozen=True, kw_only=True)
class ProductWeighting(WeightingConfig):
    """Several strategies, whose weights are multiplied: what a list of them in a recipe is.

    Attributes:
        factors: the strategies, each normalized alone; the product of the weights of sequences once more, to the mean 1
            of the batch, where several weigh sequences.

    Raises:
        ConfigError: none, or a product inside of it.
    """

    name: str = "product"
    factors: tuple[WeightingConfig, ...] = ()

    @property
    def parts(self) -> tuple[WeightingConfig, ...]:
        """The strategies."""
        return self.factors

    @property
    def weighs_tokens(self) -> bool:
        """Whether any of them does."""
        return any(factor.weighs_tokens for factor in self.factors)

    @property
    def bound(self) -> float | None:
        """The lowest of theirs."""
        return min((one.bound for one in self.factors if one.bound is not None), default=None)

    @property
    def group(self) -> int:
        """What is whole for all of them."""
        return math.lcm(*(factor.group for factor in self.factors))

    def check_batch(self, num_sequences: int) -> None:
        """What each of them needs."""
        for factor in self.factors:
            factor.check_batch(num_sequences)

    @property
    def needs(self) -> frozenset[str]:
        """What any of them needs."""
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
