"""Reference implementation of the whole objective, dense and in autograd: read this first.

It is the oracle of every parallel test, so it shares no formula with the fast path: probabilities come from
`log_softmax`, divergences are written out, the gradient is autograd's.
"""

from __future__ import annotations

import torch
from torch.nn.functional import log_softmax


def reference_objective(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    token_ids: torch.Tensor,
    owner: torch.Tensor,
    num_sequences: int,
    *,
    beta: float = 0.0,
    temperature: float = 1.0,
    entry_clip: float | None = None,
    entry_floor: float | None = 0.0,
    threshold: float = 0.8,
    ceiling: float = 2.5,
    weight_temperature: float = 1.0,
    normalize: bool = True,
    cap: float | None = 10.0,
    uniform: bool = False,
) -> dict[str, torch.Tensor]:
    """Loss of one optimizer step, and all its intermediate values.

    Args:
        student_logits, teacher_logits: [N, V], completion tokens only; the gradient flows to the student's.
        token_ids, owner: sampled token and its sequence, int64 [N].
        num_sequences: B.
        beta: 0 forward KL(T||S), 1 reverse KL, between them generalized JSD.
        temperature: divides both models' logits.
        entry_clip, entry_floor: bounds of a vocabulary entry; entry_clip None: no bounds.
        threshold, ceiling, weight_temperature: tau, c and T_w of the paper.
        normalize, cap: divide by the batch mean, then bound from above.
        uniform: plain distillation, every weight 1.

    Returns:
        loss [], weights, raw_weights [B], log_ratio, is_pivotal, token_divergence [N].
    Source: ReNIO, equations of phases I to III and the loss.
    """
    student_logp = log_softmax(student_logits / temperature, dim=-1)
    teacher_logp = log_softmax(teacher_logits / temperature, dim=-1)

    # Weights: nothing here is differentiated.
    with torch.no_grad():
        ratio = (student_logp - teacher_logp).gather(1, token_ids[:, None])[:, 0]
        clipped = ratio.clamp(max=ceiling)
        pivotal = clipped >= threshold
        raw = ratio.new_ones(num_sequences)
        for i in range(num_sequences):
            mine = pivotal & (owner == i)
            if mine.any():
                raw[i] = (clipped[mine].mean() / weight_temperature).exp()
        weights = raw / raw.mean() if normalize else raw
        if normalize and cap is not None:
            weights = weights.clamp(max=cap)
        if uniform:
            weights = torch.ones_like(raw)

    # Divergence of every vocabulary entry, bounded, summed over the vocabulary.
    student, teacher = student_logp.exp(), teacher_logp.exp()
    if beta == 0:
        entries = teacher * (teacher_logp - student_logp)
    elif beta == 1:
        entries = student * (student_logp - teacher_logp)
    else:
        mixture_logp = ((1 - beta) * student + beta * teacher).log()
        entries = beta * teacher * (teacher_logp - mixture_logp) + (1 - beta) * student * (student_logp - mixture_logp)
    if entry_clip is not None:
        entries = entries.clamp(min=entry_floor, max=entry_clip)
    divergence = entries.sum(-1)

    # Mean over each sequence's tokens, weighted mean over the sequences; the denominator is B, never a sum of weights.
    loss = divergence.new_zeros(())
    for i in range(num_sequences):
        mine = owner == i
        if mine.any():
            loss = loss + weights[i] * divergence[mine].mean() / num_sequences
    return {
        "loss": loss,
        "weights": weights,
        "raw_weights": raw,
        "log_ratio": ratio,
        "is_pivotal": pivotal,
        "token_divergence": divergence.detach(),
    }
