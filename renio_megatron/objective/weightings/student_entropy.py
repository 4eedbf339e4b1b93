"""Where the student is unsure weighs more: the entropy of its distribution at each token, nats."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from renio_megatron.objective.weightings.strategy import RawWeights, Strategy, WeightingInputs


class StudentEntropy(Strategy):
    """Raw weight H_t of a token, or the mean of them of a sequence."""

    def sums(self, inputs: WeightingInputs) -> dict[str, torch.Tensor]:
        """Of sequences, the sum of the entropies."""
        return {"entropy": inputs.sum_of(inputs.student_entropy)} if self.settings.per == "sequence" else {}

    def weights(self, inputs: WeightingInputs, sums: Mapping[str, torch.Tensor]) -> RawWeights:
        """The entropies [N], or their means [B]."""
        if self.settings.per == "token":
            return RawWeights(tokens=inputs.student_entropy)
        return RawWeights(sequences=sums["entropy"] / inputs.lengths.clamp(min=1))
