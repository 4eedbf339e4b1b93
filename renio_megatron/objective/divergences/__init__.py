"""Divergences as per-vocabulary-entry terms, one file each.

A divergence of a token is the sum over the vocabulary of an elementwise `entry` in (log p_S, log p_T), so the same
functions serve a full vocabulary and a shard of it; only totals need other ranks. Its gradient with respect to the
student's scaled logits z is, with `slope` = d entry / d log p_S and G = the slopes' sum over the vocabulary,

    d D / d z_j = slope_j - p_S(j) G

because d log p_S(v) / d z_j = [v = j] - p_S(j). Clamping the entries replaces the slope of a clamped entry by 0 and
changes nothing else: a clamped entry still carries -p_S(j) G through the normaliser.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from renio_megatron.errors import ConfigError
from renio_megatron.objective.divergences import forward_kl, jsd, reverse_kl

Terms = Callable[[torch.Tensor, torch.Tensor, float], tuple[torch.Tensor, torch.Tensor]]


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


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": Divergence(forward_kl.terms, "teacher", forward_kl.total_slope),
    "reverse_kl": Divergence(reverse_kl.terms, "student", reverse_kl.total_slope),
    "jsd": Divergence(jsd.terms),
}


def divergence_of(beta: float, name: str | None = None) -> Divergence:
    """The divergence `name`; None: the one that `beta` selects, 0 forward KL, 1 reverse KL, else generalised JSD.

    Raises:
        ConfigError: no such name.
    """
    if name is None:
        name = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(float(beta), "jsd")
    if name not in DIVERGENCES:
        raise ConfigError(f"loss.divergence must be one of {', '.join(DIVERGENCES)}, or null; got {name!r}.")
    return DIVERGENCES[name]
