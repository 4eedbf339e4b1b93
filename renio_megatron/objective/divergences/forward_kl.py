"""Forward KL(T||S) = sum_v p_T (log p_T - log p_S)."""

from __future__ import annotations

import torch

from renio_megatron.objective.divergences.zero_probability import mask_zero_probability_

mean_under = "teacher"


def terms(
    student_logp: torch.Tensor, teacher_logp: torch.Tensor, beta: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Entry p_T (log p_T - log p_S) and slope -p_T, elementwise, nats; `beta` is not used.

    >>> entry, slope = terms(torch.tensor(0.25).log(), torch.tensor(0.5).log())
    >>> round(entry.item(), 4), slope.item()    # 0.5 ln 2
    (0.3466, -0.5)
    """
    teacher = teacher_logp.exp()
    entry = mask_zero_probability_((teacher_logp - student_logp).mul_(teacher), teacher)
    return entry, teacher.neg_()


def total_slope(total: torch.Tensor) -> torch.Tensor:
    """G = -sum_v p_T = -1 for every token, in the shape of `total`."""
    return torch.full_like(total, -1.0)
