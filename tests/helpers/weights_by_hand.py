"""Weights of other strategies than ReNIO, in plain torch from whole logits; nothing of the code under test is used."""

from __future__ import annotations

from typing import Any

import torch


def weights_by_hand(
    weighting: Any, raw_B: torch.Tensor, logp_NV: torch.Tensor, teacher_logp_NV: torch.Tensor, lengths: list[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights of sequences [B] and of tokens [N], and how many tokens of each sequence count [B].

    Args:
        weighting: settings; of `permuted` the weights are those before they are permuted.
        raw_B: ReNIO's, before any mean.
        logp_NV, teacher_logp_NV: log-probabilities over the whole vocabulary, sequence after sequence.
        lengths: tokens of each sequence.
    """
    sequences, tokens, weighers = torch.ones(len(lengths)), torch.ones(len(logp_NV)), 0
    kept = torch.ones(len(logp_NV))
    for part in weighting.parts:
        part = part.of if part.name == "permuted" else part
        if part.name == "renio":
            sequences, weighers = sequences * (raw_B / raw_B.mean()).clamp(max=10.0), weighers + 1
        elif part.name == "length":
            shares = torch.tensor([n * len(lengths) / sum(lengths) for n in lengths])
            sequences, weighers = sequences * shares.clamp(max=10.0), weighers + 1
        elif part.name == "gate":
            kept = kept * (_entropy(teacher_logp_NV) > part.above)
            tokens = tokens * _unit_mean(_entropy(logp_NV), kept, lengths) * kept
        elif part.name == "hardest":
            divergence = (teacher_logp_NV.exp() * (teacher_logp_NV - logp_NV)).sum(-1)
            tokens = tokens * _unit_mean(divergence, kept, lengths)
        else:
            assert part.name == "student_entropy" and part.per == "token"
            entropy = _entropy(logp_NV)
            is_whole = part.normalize == "batch"
            tokens = tokens * (entropy / entropy.mean() if is_whole else _unit_mean(entropy, kept, lengths))
    counts = torch.stack([one.sum() for one in kept.split(lengths)])
    return (sequences / sequences.mean() if weighers > 1 else sequences), tokens, counts


def without_order(weights_B: torch.Tensor, weights_N: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """The same for weights that were permuted: sequences sorted, tokens sorted in each sequence."""
    return torch.cat([weights_B.sort().values, *(one.sort().values for one in weights_N.split(lengths))])


def _entropy(logp_NV: torch.Tensor) -> torch.Tensor:
    return -(logp_NV.exp() * logp_NV).sum(-1)


def _unit_mean(values_N: torch.Tensor, kept_N: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Values over the mean of those that count, of each sequence."""
    pairs = zip(values_N.split(lengths), kept_N.split(lengths), strict=True)
    return torch.cat([one / ((one * kept).sum() / kept.sum()) if kept.any() else one * 0 for one, kept in pairs])
