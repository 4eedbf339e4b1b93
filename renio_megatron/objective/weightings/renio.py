"""THE PAPER: log ratio, pivotal tokens, sample weight (ReNIO, arXiv 2606.23104, phases I to III).

For a token y_t that the student wrote, l_t = log p_S(y_t) - log p_T(y_t) is large where the student is surer than the
teacher. Clipped from above at c it bounds what one token can say; the tokens with l_t >= tau are pivotal; a sequence
weighs exp of their mean. So trajectories that go wrong weigh more, and no answer is looked at.
"""

from __future__ import annotations

import torch


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


def pivotal_evidence(
    log_ratio_N: torch.Tensor, owner_N: torch.Tensor, num_sequences: int, *, threshold: float, ceiling: float
) -> torch.Tensor:
    """Sum and count of the pivotal tokens' clipped log ratios, per sequence.

    Both are additive: pieces of one sequence on several ranks may be summed before they are divided.

    Args:
        log_ratio_N: l_t, nats, fp32 or fp64 [N].
        owner_N: sequence of each token, int64 [N] in [0, num_sequences).
        num_sequences: B.
        threshold, ceiling: tau and c of the paper, nats.

    Returns:
        [B, 2]: (sum, count) in the dtype of `log_ratio_N`; count 0 means "no pivotal token" and becomes weight 1.
    Gradient: none flows. Source: ReNIO, phases I and II.

    >>> pivotal_evidence(torch.tensor([1.0, 9.0, 0.1]), torch.tensor([0, 0, 1]), 2, threshold=0.8, ceiling=2.5).tolist()
    [[3.5, 2.0], [0.0, 0.0]]
    """
    pivotal = is_pivotal(log_ratio_N, threshold=threshold, ceiling=ceiling).to(log_ratio_N.dtype)
    clipped = torch.where(pivotal > 0, log_ratio_N.clamp(max=ceiling), 0.0)
    evidence = log_ratio_N.new_zeros(num_sequences, 2)
    return evidence.index_add_(0, owner_N, torch.stack((clipped, pivotal), dim=1))


def raw_weight(evidence_B2: torch.Tensor, *, temperature: float) -> torch.Tensor:
    """Sample weight before normalisation: exp(mean pivotal log ratio / temperature). Phase III.

    Args:
        evidence_B2: (sum, count) of `pivotal_evidence`, complete sequences, [B, 2].
        temperature: weight temperature; 1 in the paper.

    Returns:
        [B]: 1 where no token is pivotal, else in [exp(tau / temperature), exp(c / temperature)].

    >>> raw_weight(torch.tensor([[2.0, 2.0], [0.0, 0.0]]), temperature=1.0).tolist()    # e, and 1
    [2.7182817459106445, 1.0]
    """
    total, count = evidence_B2.unbind(1)
    return (total / count.clamp(min=1.0) / temperature).exp()
