"""Strategies that turn a sequence's tokens into its raw weight, one file each.

A strategy has two halves. `evidence` is additive over the tokens of a sequence, so pieces of one sequence on several
ranks may be summed; `raw_weight` finishes the sums into a weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from renio_megatron.objective.weightings import renio, uniform


@dataclass(frozen=True)
class Weighting:
    """One strategy.

    Attributes:
        evidence: (log_ratio_N, owner_N, num_sequences, *, threshold, ceiling) -> additive [B, K].
        raw_weight: (evidence [B, K], *, temperature) -> [B].
        is_normalized: whether the configured normalisation and cap apply.
    """

    evidence: Callable[..., torch.Tensor]
    raw_weight: Callable[..., torch.Tensor]
    is_normalized: bool = True


WEIGHTINGS: dict[str, Weighting] = {
    "renio": Weighting(renio.pivotal_evidence, renio.raw_weight),
    "uniform": Weighting(uniform.no_evidence, uniform.raw_weight, is_normalized=False),
}
