"""The load-balancing loss of a layer with experts, per sequence; torch only."""

from __future__ import annotations

import torch


def sum_by_sequence(values_TE: torch.Tensor, sequence_T: torch.Tensor, num_sequences: int) -> torch.Tensor:
    """Sums of the tokens' values over each sequence, [B, E]; padding is excluded.

    Args:
        values_TE: a number for each token and expert, [T, E].
        sequence_T: sequence of each token in [0, B), -1 for padding, int64 [T].
        num_sequences: B.
    Gradient: flows to `values_TE`.

    >>> sum_by_sequence(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), torch.tensor([1, -1, 1]), 2).tolist()
    [[0.0, 0.0], [6.0, 8.0]]
    """
    is_read = sequence_T >= 0
    sums = values_TE.new_zeros(num_sequences, values_TE.shape[1])
    return sums.index_add(0, sequence_T[is_read], values_TE[is_read])


def load_balancing_loss(probability_BE: torch.Tensor, count_BE: torch.Tensor, top_k: int) -> torch.Tensor:
    """Loss of each sequence: E sum_e f_e P_e, where f_e is the share of its choices that fell on expert e, and P_e its
    mean router probability of e; fp32 [B].

    1 where either is uniform, E / top_k where all tokens choose the same experts with certainty. Additive in
    `probability_BE`: with the counts of whole sequences, the losses of their pieces add up.

    Args:
        probability_BE: sums over the sequence's tokens, or over a piece of them, of the softmax over all experts.
        count_BE: number of the whole sequence's tokens that chose each expert.
        top_k: experts that a token is routed to.
    Gradient: flows to `probability_BE`; choices have none.
    Source: DeepSeek-V3 (arXiv 2412.19437), equations 17 to 20, the sequence-wise balance loss without its factor; for
    one sequence it is the Switch Transformer's loss (arXiv 2101.03961), equation 4.

    >>> load_balancing_loss(torch.tensor([[3.0, 1.0]]), torch.tensor([[3.0, 1.0]]), top_k=1).tolist()  # 2 (9 + 1) / 16
    [1.25]
    """
    choices_B = count_BE.sum(-1)
    length_B = choices_B / top_k
    num_experts = count_BE.shape[1]
    return num_experts * (count_BE * probability_BE).sum(-1) / (choices_B * length_B).clamp(min=1)
