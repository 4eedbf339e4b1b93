"""Strategies that only tests have, each with its settings: what those of the package do not do yet."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from renio_megatron.config import WeightingConfig
from renio_megatron.config.sections.weighting import NormalizedWeighting
from renio_megatron.objective.weightings.strategy import RawWeights, Strategy, WeightingInputs


@dataclass(frozen=True, kw_only=True)
class SeenWeighting(WeightingConfig):
    """Every weight is 1; what the strategy was shown is kept. It may read what it does not declare."""

    strategy: ClassVar[str] = f"{__name__}:Seen"

    name: str = "seen"
    wants: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    is_additive: bool = True

    @property
    def needs(self) -> frozenset[str]:
        return frozenset(self.wants)


class Seen(Strategy):
    shown: ClassVar[list[WeightingInputs]] = []
    """At the first call since it was cleared."""

    def __init__(self, settings: SeenWeighting) -> None:
        super().__init__(settings)
        self.is_additive = settings.is_additive

    def weights(self, inputs: WeightingInputs, sums: Mapping[str, torch.Tensor]) -> RawWeights:
        self.shown.append(inputs)
        for name in self.settings.reads:
            column = name.removeprefix("column ")
            inputs.column(column) if column != name else getattr(inputs, name)
        return RawWeights()


def shown(wants: Iterable[str], run: Callable[[WeightingConfig], object]) -> WeightingInputs:
    """What a strategy saw that declares these, as `run(weighting)` made them."""
    Seen.shown.clear()
    run(SeenWeighting(wants=tuple(wants)))
    return Seen.shown[0]


@dataclass(frozen=True, kw_only=True)
class GateWeighting(NormalizedWeighting):
    """Tokens at which the teacher's entropy is above a bound weigh the student's; others do not count."""

    strategy: ClassVar[str] = f"{__name__}:Gate"
    NORMALIZATIONS: ClassVar[tuple[str, ...]] = ("unit_mean", "batch", "none")

    name: str = "gate"
    normalize: str = "unit_mean"
    above: float = 0.8

    @property
    def needs(self) -> frozenset[str]:
        return frozenset(("student_entropy", "teacher_entropy"))

    @property
    def weighs_tokens(self) -> bool:
        return True


class Gate(Strategy):
    def weights(self, inputs: WeightingInputs, sums: Mapping[str, torch.Tensor]) -> RawWeights:
        return RawWeights(tokens=inputs.student_entropy, kept=inputs.teacher_entropy > self.settings.above)


@dataclass(frozen=True, kw_only=True)
class ShareWeighting(WeightingConfig):
    """Weights of tokens that follow from a sum over their sequence: H_t over the mean of them."""

    strategy: ClassVar[str] = f"{__name__}:Share"

    name: str = "share"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset(("student_entropy",))

    @property
    def weighs_tokens(self) -> bool:
        return True


class Share(Strategy):
    def sums(self, inputs: WeightingInputs) -> dict[str, torch.Tensor]:
        return {"entropy": inputs.sum_of(inputs.student_entropy)}

    def weights(self, inputs: WeightingInputs, sums: Mapping[str, torch.Tensor]) -> RawWeights:
        means = sums["entropy"] / inputs.lengths.clamp(min=1)
        return RawWeights(tokens=inputs.student_entropy / means[inputs.owner])


@dataclass(frozen=True, kw_only=True)
class PrefixWeighting(WeightingConfig):
    """IW-OPD (arXiv 2606.22600): a token weighs more the less of the response's |log p_T - log p_S| lies before it."""

    strategy: ClassVar[str] = f"{__name__}:Prefix"

    name: str = "prefix"
    gamma: float = 0.5

    @property
    def needs(self) -> frozenset[str]:
        return frozenset(("student_logp", "teacher_logp", "position"))

    @property
    def weighs_tokens(self) -> bool:
        return True


class Prefix(Strategy):
    is_additive = False

    def weights(self, inputs: WeightingInputs, sums: Mapping[str, torch.Tensor]) -> RawWeights:
        sizes = (inputs.teacher_logp - inputs.student_logp).abs()
        found = torch.empty_like(sizes)
        for number in range(inputs.num_sequences):
            mine = torch.nonzero(inputs.owner == number)[:, 0]
            mine = mine[torch.argsort(inputs.position[mine])]
            before = sizes[mine].cumsum(0) - sizes[mine]
            found[mine] = 1 + self.settings.gamma * (1 - before / sizes[mine].sum().clamp(min=1e-8))
        return RawWeights(tokens=found)


@dataclass(frozen=True, kw_only=True)
class HardestWeighting(NormalizedWeighting):
    """A token weighs its divergence."""

    strategy: ClassVar[str] = f"{__name__}:Hardest"
    NORMALIZATIONS: ClassVar[tuple[str, ...]] = ("unit_mean",)
    needs: ClassVar[frozenset[str]] = frozenset(("divergence",))
    weighs_tokens: ClassVar[bool] = True

    name: str = "hardest"
    normalize: str = "unit_mean"


class Hardest(Strategy):
    def weights(self, inputs: WeightingInputs, sums: Mapping[str, torch.Tensor]) -> RawWeights:
        return RawWeights(tokens=inputs.divergence)


@dataclass(frozen=True, kw_only=True)
class CountedWeighting(NormalizedWeighting):
    """Weights that are whole numbers or masks, and carry a gradient where the inputs do: of sequences or of tokens."""

    strategy: ClassVar[str] = f"{__name__}:Counted"
    NORMALIZATIONS: ClassVar[tuple[str, ...]] = ("batch", "unit_mean", "ema", "none")

    name: str = "counted"
    of: str = "verdict"
    ema_decay: float = 0.5

    @property
    def needs(self) -> frozenset[str]:
        return frozenset((self.of,))

    @property
    def weighs_tokens(self) -> bool:
        return self.of == "position"


class Counted(Strategy):
    def weights(self, inputs: WeightingInputs, sums: Mapping[str, torch.Tensor]) -> RawWeights:
        if self.settings.of == "position":
            return RawWeights(tokens=inputs.position + 1)
        return RawWeights(sequences=inputs.verdict == 1)


@dataclass(frozen=True, kw_only=True)
class PlaceWeighting(WeightingConfig):
    """A token weighs its place in its completion, and the strategy wants whole sequences for it."""

    strategy: ClassVar[str] = f"{__name__}:Place"
    needs: ClassVar[frozenset[str]] = frozenset(("position",))
    weighs_tokens: ClassVar[bool] = True

    name: str = "place"


class Place(Strategy):
    is_additive = False

    def weights(self, inputs: WeightingInputs, sums: Mapping[str, torch.Tensor]) -> RawWeights:
        return RawWeights(tokens=(inputs.position + 0.5) / inputs.lengths[inputs.owner])
