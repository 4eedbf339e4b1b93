"""Entropy of a model's distribution over vocabulary shards, from logits and their log-normalizers."""

from __future__ import annotations

import torch

from renio_megatron.parallel.vocab import VocabShard, sum_in_rank_order

BLOCK_BYTES = 16 * 2**20
"""Bytes of the log-probabilities that exist at a time; temporaries make the total about four times as much."""


@torch.no_grad()
def entropy(
    logits: torch.Tensor,
    maximum: torch.Tensor,
    log_sum: torch.Tensor,
    shard: VocabShard,
    *,
    temperature: float = 1.0,
) -> torch.Tensor:
    """-sum_v p_v log p_v of each row, nats, dtype of `maximum` [N]. One collective on the tensor group.

    Args:
        logits: this rank's columns [N, L].
        maximum, log_sum: of logits / temperature over the whole vocabulary [N], see `parallel.vocab.LogNormalizers`.
        shard: which columns these are.
        temperature: divides the logits.
    Gradient: none flows.

    >>> logits = torch.zeros(1, 4)
    >>> round(entropy(logits, torch.zeros(1), torch.tensor([4.0]).log(), VocabShard(0, 4, 4)).item(), 4)    # ln 4
    1.3863
    """
    num_rows = max(1, BLOCK_BYTES // max(1, shard.num_valid * maximum.element_size()))
    parts = []
    for rows in zip(*(one.split(num_rows) for one in (logits, maximum, log_sum)), strict=True):
        scaled = rows[0][:, : shard.num_valid].to(maximum.dtype) / temperature
        logp = scaled.sub_(rows[1][:, None]).sub_(rows[2][:, None])
        # A token of probability 0 has the logarithm -inf, or one whose product with 0 is 0; it contributes nothing.
        parts.append(-(logp.exp() * logp.clamp(min=torch.finfo(logp.dtype).min)).sum(1))
    return sum_in_rank_order(torch.cat(parts), shard.group)
