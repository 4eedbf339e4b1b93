"""Log-probabilities of given tokens over vocabulary shards, and their gradient: cross-entropy, and scoring."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from renio_megatron.config import HeadConfig
from renio_megatron.losses import kernels
from renio_megatron.losses.chunk_size import chunk_size_for
from renio_megatron.losses.chunked_logits import Logits, bytes_per_token, logits_dtype_of, slices
from renio_megatron.losses.distillation import FinishedGradient
from renio_megatron.losses.entropy import entropy
from renio_megatron.parallel.vocab import LmHead, VocabShard, gather_in_rank_order, merge_sums


@dataclass(frozen=True)
class TokenScores:
    """A model's log-probabilities of given tokens, and entropies.

    Attributes:
        logp: log-probability of each, nats fp32 (fp64 for fp64 logits) [N].
        entropy: entropy of the distribution at each token, nats [N]; None where it was not requested.
    """

    logp: torch.Tensor
    entropy: torch.Tensor | None = None


def linear_token_logp(
    hidden: torch.Tensor,
    head: LmHead,
    token_ids: torch.Tensor,
    config: HeadConfig,
    temperature: float = 1.0,
) -> torch.Tensor:
    """`token_logp` of hidden states [N, H] under an LM head, chunk by chunk; one collective per chunk.

    Gradient: none flows.
    """
    return linear_token_scores(hidden, head, token_ids, config, temperature).logp


@torch.no_grad()
def linear_token_scores(
    hidden: torch.Tensor,
    head: LmHead,
    token_ids: torch.Tensor,
    config: HeadConfig,
    temperature: float = 1.0,
    *,
    with_entropy: bool = False,
) -> TokenScores:
    """`TokenScores` of hidden states [N, H] under an LM head; entropies take one more collective per chunk.

    Gradient: none flows.
    """
    dtype = logits_dtype_of(config, hidden.dtype)
    token_bytes = bytes_per_token(head.shard.width, hidden.dtype, dtype, num_models=1)
    size = chunk_size_for(len(hidden), token_bytes, config.chunk_size)
    logits = Logits(hidden, head.weight, size, dtype)
    logp, entropies = [], []
    for rows in slices(len(hidden), size):
        chunk = logits.project(rows)
        maximum, log_sum, target = _normalizers(chunk, token_ids[rows], head.shard, temperature)
        logp.append((target - maximum) - log_sum)
        if with_entropy:
            entropies.append(entropy(chunk, maximum, log_sum, head.shard, temperature=temperature))
    return TokenScores(torch.cat(logp), torch.cat(entropies) if with_entropy else None)


@torch.no_grad()
def token_logp(
    logits: torch.Tensor, token_ids: torch.Tensor, shard: VocabShard, *, temperature: float = 1.0
) -> torch.Tensor:
    """Log-probability of each token, nats, fp32 (fp64 for fp64 logits) [N]. One collective on the tensor group.

    Args:
        logits: this rank's columns [N, L].
        token_ids: global ids, int64 [N].
        shard: which columns these are.
        temperature: divides the logits.
    Gradient: none flows; `cross_entropy` is the differentiable form.
    """
    maximum, log_sum, target = _normalizers(logits, token_ids, shard, temperature)
    return (target - maximum) - log_sum


def cross_entropy(
    logits: torch.Tensor, token_ids: torch.Tensor, shard: VocabShard, *, overwrite_logits: bool = False
) -> torch.Tensor:
    """Sum over the tokens of -log p(token), nats, scalar. One collective forward, none backward.

    Args:
        logits: this rank's columns [N, L]; the gradient p - onehot flows to them, 0 in padding columns.
        token_ids: global ids, int64 [N].
        shard: which columns these are.
        overwrite_logits: let the gradient be written where `logits` was.

    >>> logits = torch.zeros(1, 2, requires_grad=True)
    >>> loss = cross_entropy(logits, torch.tensor([1]), VocabShard(0, 2, 2)); round(loss.item(), 4)    # ln 2
    0.6931
    >>> loss.backward(); logits.grad.tolist()
    [[0.5, -0.5]]
    """
    with torch.no_grad():
        maximum, log_sum, target = _normalizers(logits, token_ids, shard, 1.0)
        value = -((target - maximum) - log_sum).sum()
    if not (torch.is_grad_enabled() and logits.requires_grad):
        return value
    with torch.no_grad():
        valid = logits[:, : shard.num_valid].to(maximum.dtype)
        probability = valid.sub(maximum[:, None]).sub_(log_sum[:, None]).exp_()
        columns = shard.local_columns(token_ids)
        if shard.num_valid:  # not by the rows of this shard's tokens: finding them would synchronize with a GPU
            place = columns.clamp(min=0)[:, None]
            probability.scatter_(1, place, probability.gather(1, place) - (columns >= 0)[:, None].to(probability))
        gradient = logits.detach() if overwrite_logits else torch.empty_like(logits)
        gradient[:, : shard.num_valid] = probability.to(gradient.dtype)
        gradient[:, shard.num_valid :] = 0
    return FinishedGradient.apply(logits, value, gradient)


def _normalizers(
    logits: torch.Tensor, token_ids: torch.Tensor, shard: VocabShard, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Global maximum, log of the sum of exponentials and the token's own scaled logit, [N] each."""
    local = kernels.token_statistics(
        logits, shard.local_columns(token_ids), num_valid=shard.num_valid, temperature=temperature
    )
    maxima, sums, targets = gather_in_rank_order(local, shard.group).unbind(-1)
    maximum, total, _ = merge_sums(maxima, sums)
    return maximum, total.log(), targets.amax(0)
