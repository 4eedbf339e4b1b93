"""Weighting by length: it cancels the loss's mean over tokens, so that every token of the batch counts equally."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from renio_megatron.objective.weightings.strategy import RawWeights, Strategy, WeightingInputs


class Length(Strategy):
    """Raw weight n_i, the number of completion tokens; divided by the batch mean it is n_i / mean n."""

    def weights(self, inputs: WeightingInputs, sums: Mapping[str, torch.Tensor]) -> RawWeights:
        """The lengths [B]."""
        return RawWeights(sequences=inputs.lengths)
