"""Reductions from tokens to sequences to the batch. Denominators are arguments, never computed here."""

from __future__ import annotations

import torch


def tokens_per_sequence(owner_N: torch.Tensor, num_sequences: int) -> torch.Tensor:
    """Number of tokens of each sequence, int64 [B]; 0 for a sequence without tokens here.

    >>> tokens_per_sequence(torch.tensor([0, 2, 2]), 3).tolist()
    [1, 0, 2]
    """
    # Not bincount, which waits for a GPU.
    return owner_N.new_zeros(num_sequences).index_add_(0, owner_N, torch.ones_like(owner_N))


def token_scale(
    weights_B: torch.Tensor,
    lengths_B: torch.Tensor,
    owner_N: torch.Tensor,
    token_weights_N: torch.Tensor | None = None,
    *,
    denominator: torch.Tensor | float,
) -> torch.Tensor:
    """Factor of each token's divergence in the loss: weight / (tokens of its sequence x denominator), times the token's
    own weight where there are token weights.

    Args:
        weights_B: sample weights [B].
        lengths_B: counted tokens of each whole sequence [B]; 0 only for sequences without tokens in `owner_N`.
        owner_N: sequence of each token, int64 [N].
        token_weights_N: weights of the tokens [N]; None: 1.
        denominator: sequences of the optimizer step over all ranks.

    Returns:
        [N], dtype of `weights_B`.

    >>> token_scale(torch.tensor([2.0, 1.0]), torch.tensor([4, 1]), torch.tensor([0, 1]), denominator=2.0).tolist()
    [0.25, 0.5]
    """
    per_token = weights_B / lengths_B.clamp(min=1).to(weights_B.dtype) / denominator
    scale_N = per_token[owner_N]
    return scale_N if token_weights_N is None else scale_N * token_weights_N.to(scale_N)
