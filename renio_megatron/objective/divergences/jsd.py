"""Generalized Jensen-Shannon divergence: beta KL(T||M) + (1 - beta) KL(S||M), M = (1 - beta) S + beta T."""

from __future__ import annotations

import torch

from renio_megatron.objective.divergences.zero_probability import mask_zero_probability_


def terms(student_logp: torch.Tensor, teacher_logp: torch.Tensor, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Entry and slope, elementwise, nats, for 0 < beta < 1.

    Entry: beta p_T (log p_T - log m) + (1 - beta) p_S (log p_S - log m). Slope: (1 - beta) p_S (log p_S - log m); the
    dependence of m on the student cancels against the derivative of p_S.

    >>> entry, slope = terms(torch.tensor(0.5).log(), torch.tensor(0.5).log(), 0.3)    # equal models diverge nowhere
    >>> abs(entry.item()) < 1e-7, abs(slope.item()) < 1e-7
    (True, True)
    """
    student, teacher = student_logp.exp().mul_(1.0 - beta), teacher_logp.exp().mul_(beta)
    mixture_logp = (student + teacher).log_()
    slope = mask_zero_probability_((student_logp - mixture_logp).mul_(student), student)
    entry = mask_zero_probability_((teacher_logp - mixture_logp).mul_(teacher), teacher).add_(slope)
    return entry, slope
