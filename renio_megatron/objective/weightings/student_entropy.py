"""Weighting by the entropy of the student's distribution at each token, nats."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from renio_megatron.objective.weightings.strategy import RawWeights, Strategy, WeightingInputs


class StudentEntropy(Strategy):
    """Raw weight H_t of a token, or the mean of H_t over a sequence."""

    def sums(self, inputs: WeightingInputs) -> dict[str, torch.Tensor]:
        """The sum of the entropies per sequence, where sequences are weighted."""
        return {"entropy": inputs.sum_of(inputs.student_entropy)} if self.settings.per == "sequence" else {}

    def weights(self, inputs: WeightingInputs, sums: Mapping[str, torch.Tensor]) -> RawWeights:
        """The entropies [N], or their means [B]."""
        if self.settings.per == "token":
            return RawWeights(tokens=inputs.student_entropy)
        return RawWeights(sequences=sums["entropy"] / inputs.lengths.clamp(min=1))
