"""THE PAPER: log ratio, pivotal tokens, sample weight (ReNIO, arXiv 2606.23104, phases I to III).

For a token y_t that the student wrote, l_t = log p_S(y_t) - log p_T(y_t) is large where the student is surer than the
teacher. Clipping it from above at c bounds the influence of one token; the tokens with l_t >= tau are pivotal; a
sequence's weight is exp of their mean. So trajectories that go wrong get more weight, without looking at any answer.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from renio_megatron.objective.weightings.strategy import RawWeights, Strategy, WeightingInputs


class Renio(Strategy):
    """exp(mean of the pivotal tokens' clipped log ratios / temperature); 1 where no token is pivotal."""

    def sums(self, inputs: WeightingInputs) -> dict[str, torch.Tensor]:
        """`pivotal_sums` of the log ratios."""
        log_ratio_N = inputs.student_logp - inputs.teacher_logp
        bounds = {"threshold": self.settings.threshold, "ceiling": self.settings.ceiling}
        return pivotal_sums(log_ratio_N, inputs.owner, inputs.num_sequences, **bounds)

    def weights(self, inputs: WeightingInputs, sums: Mapping[str, torch.Tensor]) -> RawWeights:
        """The weight of each sequence [B]."""
        return RawWeights(sequences=sequence_weight(sums, temperature=self.settings.temperature))


def is_pivotal(log_ratio_N: torch.Tensor, *, threshold: float, ceiling: float) -> torch.Tensor:
    """Whether each token is pivotal: min(l_t, ceiling) >= threshold. Phase II.

    Args:
        log_ratio_N: l_t = log p_S(y_t) - log p_T(y_t), nats [N].
        threshold, ceiling: tau and c of the paper, nats; the ceiling bounds the ratio from above only.

    Returns:
        bool [N].

    >>> is_pivotal(torch.tensor([-9.0, 0.5, 0.8, 7.0]), threshold=0.8, ceiling=2.5).tolist()
    [False, False, True, True]
    """
    return log_ratio_N.clamp(max=ceiling) >= threshold


def pivotal_sums(
    log_ratio_N: torch.Tensor, owner_N: torch.Tensor, num_sequences: int, *, threshold: float, ceiling: float
) -> dict[str, torch.Tensor]:
    """Sum and count of the pivotal tokens' clipped log ratios, per sequence.

    Both are additive: pieces of one sequence on several ranks may be summed before the division.

    Args:
        log_ratio_N: l_t, nats, fp32 or fp64 [N].
        owner_N: sequence of each token, int64 [N] in [0, num_sequences).
        num_sequences: B.
        threshold, ceiling: tau and c of the paper, nats.

    Returns:
        `log_ratio`, the sum, and `pivotal_tokens`, the count, [B] in the dtype of `log_ratio_N`; without a pivotal
        token both are 0, which becomes weight 1.
    Gradient: none flows. Source: ReNIO, phases I and II.

    >>> sums = pivotal_sums(torch.tensor([1.0, 9.0, 0.1]), torch.tensor([0, 0, 1]), 2, threshold=0.8, ceiling=2.5)
    >>> sums["log_ratio"].tolist(), sums["pivotal_tokens"].tolist()
    ([3.5, 0.0], [2.0, 0.0])
    """
    pivotal = is_pivotal(log_ratio_N, threshold=threshold, ceiling=ceiling).to(log_ratio_N.dtype)
    clipped = torch.where(pivotal > 0, log_ratio_N.clamp(max=ceiling), 0.0)
    none = log_ratio_N.new_zeros(num_sequences)
    return {"log_ratio": none.index_add(0, owner_N, clipped), "pivotal_tokens": none.index_add(0, owner_N, pivotal)}


def sequence_weight(sums: Mapping[str, torch.Tensor], *, temperature: float) -> torch.Tensor:
    """Sample weight before normalization: exp(mean pivotal log ratio / temperature). Phase III.

    Args:
        sums: sums of `pivotal_sums` over complete sequences, [B] each.
        temperature: weight temperature; 1 in the paper.

    Returns:
        [B]: 1 where no token is pivotal, else in [exp(tau / temperature), exp(c / temperature)].

    >>> sums = {"log_ratio": torch.tensor([2.0, 0.0]), "pivotal_tokens": torch.tensor([2.0, 0.0])}
    >>> sequence_weight(sums, temperature=1.0).tolist()    # e, and 1
    [2.7182817459106445, 1.0]
    """
    return (sums["log_ratio"] / sums["pivotal_tokens"].clamp(min=1.0) / temperature).exp()
