"""Every sequence weighs 1: plain on-policy distillation."""

from __future__ import annotations

import torch


def no_evidence(
    log_ratio_N: torch.Tensor, owner_N: torch.Tensor, num_sequences: int, *, threshold: float, ceiling: float
) -> torch.Tensor:
    """An empty table, [B, 0]: nothing about the tokens matters."""
    return log_ratio_N.new_zeros(num_sequences, 0)


def raw_weight(evidence_B0: torch.Tensor, *, temperature: float) -> torch.Tensor:
    """Ones, [B].

    >>> raw_weight(torch.zeros(2, 0), temperature=1.0).tolist()
    [1.0, 1.0]
    """
    return evidence_B0.new_ones(evidence_B0.shape[0])
