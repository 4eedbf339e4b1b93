"""Divergences as per-vocabulary-entry terms, one file each.

A divergence of a token is the sum over the vocabulary of an elementwise `entry` in (log p_S, log p_T), so the same
functions serve a full vocabulary and a shard of it; only totals need other ranks. Its gradient with respect to the
student's scaled logits z is, with `slope` = d entry / d log p_S and G = the slopes' sum over the vocabulary,

    d D / d z_j = slope_j - p_S(j) G

because d log p_S(v) / d z_j = [v = j] - p_S(j). Clamping the entries replaces the slope of a clamped entry by 0 and
changes nothing else: a clamped entry still carries -p_S(j) G through the normalizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, TypeAlias

from renio_megatron.errors import ConfigError

if TYPE_CHECKING:
    import torch

Terms: TypeAlias = "Callable[[torch.Tensor, torch.Tensor, float], tuple[torch.Tensor, torch.Tensor]]"


@dataclass(frozen=True)
class Divergence:
    """One divergence.

    Attributes:
        terms: (student_logp, teacher_logp, beta) -> (entry, slope), elementwise, any shape; entries of probability 0
            contribute 0.
        mean_under: `teacher` or `student` where the unclamped total is the mean of the absolute-signed log ratio under
            that model alone, so that it follows from one pass over the logits; None where it does not.
        total_slope: G as a function of the unclamped total, for the same case.
    """

    terms: Terms
    mean_under: str | None = None
    total_slope: Callable[[torch.Tensor], torch.Tensor] | None = None


@dataclass(frozen=True)
class DivergenceInfo:
    """Properties of a divergence that are known before torch is imported.

    Attributes:
        takes_beta: whether it has the parameter beta, strictly between 0 and 1.
        module: module with `terms` and, if any, `mean_under` and `total_slope`; None: the file of its name here.
    """

    takes_beta: bool = False
    module: str | None = None


DIVERGENCE_INFO: dict[str, DivergenceInfo] = {
    "forward_kl": DivergenceInfo(),
    "reverse_kl": DivergenceInfo(),
    "jsd": DivergenceInfo(takes_beta=True),
}
"""Name of a divergence -> its properties, one entry per file."""


class _Divergences(Mapping[str, Divergence]):
    """Name -> divergence, whose file is imported on first access."""

    def __init__(self) -> None:
        self._made: dict[str, Divergence] = {}

    def __getitem__(self, name: str) -> Divergence:
        if name not in self._made:
            module = import_module(DIVERGENCE_INFO[name].module or f"{__name__}.{name}")
            more = {key: getattr(module, key, None) for key in ("mean_under", "total_slope")}
            self._made[name] = Divergence(module.terms, **more)
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(DIVERGENCE_INFO)

    def __len__(self) -> int:
        return len(DIVERGENCE_INFO)


DIVERGENCES: Mapping[str, Divergence] = _Divergences()


def divergence_of(beta: float, name: str | None = None) -> Divergence:
    """The divergence `name`; None: the one that `beta` selects, 0 forward KL, 1 reverse KL, else generalized JSD.

    Raises:
        ConfigError: no such name.
    """
    if name is None:
        name = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(float(beta), "jsd")
    if name not in DIVERGENCES:
        raise ConfigError(f"loss.divergence must be one of {', '.join(DIVERGENCES)}, or null; got {name!r}.")
    return DIVERGENCES[name]
