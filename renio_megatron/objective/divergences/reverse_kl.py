"""Reverse KL(S||T) = sum_v p_S (log p_S - log p_T)."""

from __future__ import annotations

import torch

from renio_megatron.objective.divergences.zero_probability import mask_zero_probability_

mean_under = "student"


def terms(
    student_logp: torch.Tensor, teacher_logp: torch.Tensor, beta: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Entry p_S (log p_S - log p_T) and slope entry + p_S, elementwise, nats; `beta` is not used.

    >>> entry, slope = terms(torch.tensor(0.5).log(), torch.tensor(0.25).log())
    >>> round(entry.item(), 4), round(slope.item(), 4)    # 0.5 ln 2, and 0.5 more
    (0.3466, 0.8466)
    """
    student = student_logp.exp()
    entry = mask_zero_probability_((student_logp - teacher_logp).mul_(student), student)
    return entry, student.add_(entry)


def total_slope(total: torch.Tensor) -> torch.Tensor:
    """G = KL + 1 for every token, in the shape of `total`."""
    return total + 1.0
