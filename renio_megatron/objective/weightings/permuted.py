"""Permuted weights of another strategy, as a control.

Sequence weights are permuted within the batch, token weights within each sequence.

The multiset of weights, and so its spread, is kept; their relation to the data is not. An effect that remains does not
come from which sequences or tokens the strategy selects.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from renio_megatron.objective.weightings.strategy import RawWeights, Strategy, WeightingInputs


class Permuted(Strategy):
    """One permutation of the batch's sequences per step, and one of the tokens of each sequence."""

    rearranges = True

    def __init__(self, settings: Any, of: Strategy) -> None:
        """Permutes the weights of `of`."""
        super().__init__(settings)
        self._of = of
        self.is_additive = of.is_additive and not settings.weighs_tokens  # tokens are permuted in whole sequences

    def sums(self, inputs: WeightingInputs) -> dict[str, torch.Tensor]:
        """The sums of the permuted strategy."""
        return self._of.sums(inputs)

    def weights(self, inputs: WeightingInputs, sums: Mapping[str, torch.Tensor]) -> RawWeights:
        """The raw weights of the permuted strategy, not yet permuted."""
        return self._of.weights(inputs, sums)

    def sequences(self, weights_B: torch.Tensor, ids_B: torch.Tensor, inputs: WeightingInputs) -> torch.Tensor:
        """The whole batch's normalized weights, permuted by the order of the sequences' numbers.

        Args:
            weights_B, ids_B: weights and numbers of all sequences of the step, in any order.
            inputs: provides the random generator.
        """
        order = torch.argsort(ids_B)
        shuffled = torch.randperm(len(order), generator=inputs.generator()).to(order.device)
        permuted = torch.empty_like(weights_B)
        permuted[order] = weights_B[order[shuffled]]
        return permuted

    def tokens(self, weights_N: torch.Tensor, inputs: WeightingInputs) -> torch.Tensor:
        """Token weights, permuted inside each of these whole sequences."""
        permuted = torch.empty_like(weights_N)
        for row, number in enumerate(inputs.sequence.tolist()):
            mine = torch.nonzero(inputs.owner == row)[:, 0]
            mine = mine[torch.argsort(inputs.position[mine])]
            shuffled = torch.randperm(len(mine), generator=inputs.generator(number)).to(mine.device)
            permuted[mine] = weights_N[mine[shuffled]]
        return permuted
