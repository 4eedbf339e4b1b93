"""Vocabulary shards, and every collective over them.

A rank of the tensor-parallel group holds some columns of the logits. Everything the loss needs from the others is a
handful of numbers a token; the logits themselves never travel (`gather_columns`, for the sampler's one position, is the
exception and says so). Results are merged in rank order from an all-gather, so they have the same bits on every rank.

None of these functions is differentiated: gradients are written by hand from the merged numbers, and a collective that
autograd cannot see is how sharded losses with exact values and wrong gradients come about.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from renio_megatron.errors import LayoutError

NUM_STATISTICS = 7
"""Columns of a rank's statistics, [N, 7]: student maximum and sum of exponentials, teacher maximum and sum, student and
teacher logit of the sampled token (-inf where another rank has it), and the cross term of an unclamped KL."""


@dataclass(frozen=True)
class VocabShard:
    """The columns [start, stop) of the vocabulary that this rank's logits hold.

    Attributes:
        start, stop: global columns; logits are [N, stop - start]. Shards may differ in width, also be empty.
        vocab_size: V. Columns >= V are padding: probability 0, gradient 0.
        group: ranks that together hold the vocabulary; None: it is all here.

    Raises:
        LayoutError: an impossible range, or columns missing where there is no group to hold them.
    """

    start: int
    stop: int
    vocab_size: int
    group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop or self.vocab_size < 1:
            raise LayoutError(
                f"a vocabulary shard needs 0 <= start <= stop and vocab_size >= 1; got start={self.start}, "
                f"stop={self.stop}, vocab_size={self.vocab_size}."
            )
        if self.group is None and (self.start != 0 or self.stop < self.vocab_size):
            raise LayoutError(
                f"the shard [{self.start}, {self.stop}) does not hold all {self.vocab_size} columns, and there is no "
                "group whose other ranks could. Pass group=, or logits of the whole vocabulary."
            )

    @property
    def width(self) -> int:
        """Local columns L, padding included."""
        return self.stop - self.start

    @property
    def num_valid(self) -> int:
        """Local columns that are not padding; they come first."""
        return max(0, min(self.stop, self.vocab_size) - self.start)

    def local_columns(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Local column of each global token id, int64; -1 where another rank has it."""
        here = (token_ids >= self.start) & (token_ids < self.start + self.num_valid)
        return torch.where(here, token_ids - self.start, -1)


@dataclass(frozen=True)
class Normalisers:
    """Log-normalisers of both models and what follows from one pass over the logits, for the whole vocabulary.

    The maximum and the logarithm of the sum stay apart: (z - maximum) - log_sum keeps the digits that
    z - (maximum + log_sum) would round away.

    Attributes:
        student_max, student_log_sum, teacher_max, teacher_log_sum: of logits / temperature, [N].
        student_logp, teacher_logp: log-probability of the sampled token, nats [N].
        cross: unclamped KL where the divergence has a one-pass form, else 0, nats [N].
    """

    student_max: torch.Tensor
    student_log_sum: torch.Tensor
    teacher_max: torch.Tensor
    teacher_log_sum: torch.Tensor
    student_logp: torch.Tensor
    teacher_logp: torch.Tensor
    cross: torch.Tensor


def gather_in_rank_order(local: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Every rank's `local`, stacked on a new first axis in rank order; one collective. Conjugate: none, no gradient."""
    if group is None or group.size() == 1:
        return local[None]
    gathered = local.new_empty(group.size(), *local.shape)
    dist.all_gather(list(gathered.unbind(0)), local.contiguous(), group=group)
    return gathered


def sum_in_rank_order(local: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Sum over the ranks, with the same bits on each; one collective. Conjugate: none, no gradient."""
    gathered = gather_in_rank_order(local, group)
    total = gathered[0].clone()
    for part in gathered[1:]:
        total += part
    return total


def gather_columns(local_logits: torch.Tensor, shard: VocabShard) -> torch.Tensor:
    """The whole vocabulary's logits from equally wide shards, padding cut off: [..., L] -> [..., V].

    For the sampler's single position; the loss never calls it. One collective.
    """
    gathered = gather_in_rank_order(local_logits, shard.group)
    return gathered.movedim(0, -2).flatten(-2)[..., : shard.vocab_size]


def merge_statistics(statistics_RN7: torch.Tensor, cross_sign: float) -> Normalisers:
    """Statistics of all shards, merged into those of the whole vocabulary.

    Args:
        statistics_RN7: every rank's [N, 7] in rank order (`NUM_STATISTICS`).
        cross_sign: 0 where there is no cross term; 1 where it is the teacher's mean of (teacher - student) logits, -1
            where it is the student's mean of (student - teacher) logits.

    Returns:
        `Normalisers`, [N] each.
    """
    maximum_s, sum_s, maximum_t, sum_t, target_s, target_t, cross = statistics_RN7.unbind(-1)
    student_max, student_sum, lift_s = merge_sums(maximum_s, sum_s)
    teacher_max, teacher_sum, lift_t = merge_sums(maximum_t, sum_t)
    student_log_sum, teacher_log_sum = student_sum.log(), teacher_sum.log()
    total = torch.zeros_like(student_max)
    if cross_sign:
        # Each rank's cross term is relative to its own maxima; move both to the global ones, then normalise.
        offset = (maximum_t - teacher_max) - (maximum_s - student_max)
        lift, weight_sum, norm = (lift_t, sum_t, teacher_sum) if cross_sign > 0 else (lift_s, sum_s, student_sum)
        parts = torch.where(lift > 0, lift * (cross + cross_sign * offset * weight_sum), 0.0)
        total = parts.sum(0) / norm + cross_sign * (student_log_sum - teacher_log_sum)
    return Normalisers(
        student_max=student_max,
        student_log_sum=student_log_sum,
        teacher_max=teacher_max,
        teacher_log_sum=teacher_log_sum,
        student_logp=(target_s.amax(0) - student_max) - student_log_sum,
        teacher_logp=(target_t.amax(0) - teacher_max) - teacher_log_sum,
        cross=total,
    )


def merge_sums(maximum_RN: torch.Tensor, sum_RN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Every rank's maximum and sum of exponentials [R, N], merged in rank order.

    Returns:
        The global maximum [N], the sum of exponentials relative to it [N], each rank's exp(maximum - global) [R, N].
    """
    maximum = maximum_RN.amax(0)
    lift = torch.where(maximum_RN == -torch.inf, 0.0, (maximum_RN - maximum).exp())
    return maximum, (lift * sum_RN).sum(0), lift
