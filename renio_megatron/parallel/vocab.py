"""Vocabulary shards, and every collective over them.

A rank of the tensor-parallel group holds some columns of the logits. All the loss needs from the other ranks is a few
numbers per token; the logits themselves are never sent (except by `gather_columns`, for the sampler's one position).
Results are merged in rank order from an all-gather, so they are bitwise equal on every rank.

None of these functions is differentiated: gradients are written by hand from the merged numbers. A collective that
autograd cannot see typically gives a sharded loss with exact values and wrong gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from renio_megatron.errors import LayoutError

NUM_STATISTICS = 7
"""Columns of a rank's statistics, [N, 7]: student maximum and sum of exponentials, teacher maximum and sum, student and
teacher logit of the sampled token (-inf where another rank holds it), and the cross term of an unclamped KL."""


@dataclass(frozen=True)
class VocabShard:
    """The columns [start, stop) of the vocabulary in this rank's logits.

    Attributes:
        start, stop: global columns; logits are [N, stop - start]. Shards may differ in width, and may be empty.
        vocab_size: V. Columns >= V are padding: probability 0, gradient 0.
        group: ranks that together hold the vocabulary; None: it is all here.

    Raises:
        LayoutError: an invalid range, or missing columns where there is no group to hold them.
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
        is_alone = self.group is None or self.group.size() == 1
        if is_alone and (self.start != 0 or self.stop < self.vocab_size):
            raise LayoutError(
                f"the shard [{self.start}, {self.stop}) does not hold all {self.vocab_size} columns, and there is no "
                "group with other ranks that could. Pass group=, or logits of the whole vocabulary."
            )

    @classmethod
    def for_vocab(
        cls, vocab_size: int, group: dist.ProcessGroup | None = None, *, width: int | None = None
    ) -> VocabShard:
        """This rank's shard where all ranks of a group hold the same number of columns, in rank order.

        Args:
            vocab_size: V, without padding.
            group: ranks that together hold the vocabulary, Megatron's tensor-parallel group; None: it is all here.
            width: columns of each rank, padding included: the last dimension of its logits. None: as few as hold V.

        >>> VocabShard.for_vocab(30, width=32)
        VocabShard(start=0, stop=32, vocab_size=30, group=None)
        """
        size, rank = (1, 0) if group is None else (group.size(), group.rank())
        columns = -(-vocab_size // size) if width is None else width
        return cls(rank * columns, (rank + 1) * columns, vocab_size, group)

    @property
    def width(self) -> int:
        """Local columns L, padding included."""
        return self.stop - self.start

    @property
    def num_valid(self) -> int:
        """Local columns that are not padding; they come first."""
        return max(0, min(self.stop, self.vocab_size) - self.start)

    def local_columns(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Local column of each global token id, int64; -1 where another rank holds it."""
        here = (token_ids >= self.start) & (token_ids < self.start + self.num_valid)
        return torch.where(here, token_ids - self.start, -1)


@dataclass(frozen=True)
class LogNormalizers:
    """Log-normalizers of both models, and other results of one pass over the logits, for the whole vocabulary.

    The maximum and the logarithm of the sum are kept separate: (z - maximum) - log_sum keeps digits that
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


def gather_statistics(local: torch.Tensor, shard: VocabShard, token_ids: torch.Tensor) -> torch.Tensor:
    """Every rank's statistics [N, 7] in rank order, [R, N, 7]; one collective. Conjugate: none, no gradient.

    An additional last row identifies the columns and the sampled tokens. On a GPU the host reads it once per shard, so
    that a gap in the vocabulary is found at the first loss, without later synchronization: from then on the device
    itself asserts that the other ranks' columns are unchanged.

    Args:
        local: this rank's statistics.
        shard: the columns of these statistics.
        token_ids: global ids of the sampled tokens, int64 [N].

    Raises:
        LayoutError: the ranks' columns are not the whole vocabulary, some are held twice, or the ranks have different
            tokens.
    """
    if shard.group is None or shard.group.size() == 1:
        return local[None]
    bounds = local.new_tensor([[shard.start, shard.stop, shard.vocab_size, 0, 0, 0, 0]])
    bounds[0, 3] = _checksum(token_ids)
    gathered = gather_in_rank_order(torch.cat((local, bounds)), shard.group)
    everyones, checksums = gathered[:, -1, :3], gathered[:, -1, 3]
    same_tokens = (checksums == checksums[0]).all()
    key = (shard.group, shard.start, shard.stop, shard.vocab_size)
    if everyones.is_cuda and key in _KNOWN_SHARDS:
        same = (everyones == _KNOWN_SHARDS[key].to(everyones)).all()
        torch._assert_async(same, "the other ranks' vocabulary shards are not those of the first loss any more")
        torch._assert_async(same_tokens, "the ranks of a tensor-parallel group have different token_ids")
        return gathered[:, :-1]
    if not same_tokens:
        raise LayoutError(
            "the ranks of the tensor-parallel group have different token_ids. They hold columns of the same tokens' "
            "logits: give all of them the same batch, in the same order."
        )
    _check_cover(everyones.long().tolist(), shard.vocab_size)
    if everyones.is_cuda:
        _KNOWN_SHARDS[key] = everyones.clone()
    return gathered[:, :-1]


def _checksum(token_ids: torch.Tensor) -> torch.Tensor:
    """Order-dependent checksum of the tokens, below 2^20 so that it is exact in fp32; a scalar int64."""
    factors = torch.arange(1, len(token_ids) + 1, device=token_ids.device) * 40503 % 65521
    return ((token_ids + 1) * factors % 1048573).sum() % 1048573


_KNOWN_SHARDS: dict[tuple[dist.ProcessGroup, int, int, int], torch.Tensor] = {}
"""Shard on a GPU -> the columns of all ranks of its group, once they were found to cover the whole vocabulary."""


def _check_cover(bounds: list[list[int]], vocab_size: int) -> None:
    """Raises `LayoutError` unless the shards (start, stop, V) in rank order hold each of the V columns once."""
    if any(other != vocab_size for _, _, other in bounds):
        raise LayoutError(f"the ranks' shards are of vocabularies of different sizes: {[v for _, _, v in bounds]}.")
    end = 0
    for start, stop, _ in sorted(bounds):
        if start == stop or start >= vocab_size:  # empty, or nothing but padding
            continue
        if start != end:
            what = "in no shard" if start > end else "in more than one shard"
            raise LayoutError(
                f"the columns [{min(start, end)}, {max(start, end)}) are {what}; the ranks hold "
                f"{[tuple(edge[:2]) for edge in bounds]} of a vocabulary of {vocab_size}."
            )
        end = min(stop, vocab_size)
    if end < vocab_size:
        raise LayoutError(
            f"the columns [{end}, {vocab_size}) are in no shard; the ranks hold {[tuple(edge[:2]) for edge in bounds]} "
            f"of a vocabulary of {vocab_size}."
        )


def sum_in_rank_order(local: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Sum over the ranks, bitwise equal on each; one collective. Conjugate: none, no gradient."""
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


class _SumGradient(torch.autograd.Function):
    """Identity forward, sum over the group backward."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = upstream.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


def sum_gradient_over_shards(hidden: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """`hidden` itself, [N, H], as input of a head that is sharded over the group: each rank's gradient is partial.

    Conjugate: the sum of the partial gradients, one all-reduce in backward.
    """
    if group is None or group.size() == 1 or not hidden.requires_grad:
        return hidden
    return _SumGradient.apply(hidden, group)


class _GatherSequence(torch.autograd.Function):
    """All-gather of rows forward, reduce-scatter backward."""

    @staticmethod
    def forward(ctx: Any, piece: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return gather_in_rank_order(piece, group).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None]:
        parts = list(upstream.contiguous().chunk(ctx.group.size()))
        piece = torch.empty_like(parts[0])
        dist.reduce_scatter(piece, parts, group=ctx.group)
        return piece, None


def gather_sequence(piece: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Hidden states of all positions from the pieces that sequence parallelism left on the ranks: [P, H] -> [R P, H].

    Conjugate: each rank's piece of the summed gradient, one reduce-scatter in backward. So a loss that uses the result
    does not sum its gradient again (`sum_hidden_gradient=False`).
    """
    if group is None or group.size() == 1:
        return piece
    return _GatherSequence.apply(piece, group)


def reshard_rows(rows: torch.Tensor, have: VocabShard, want: VocabShard) -> torch.Tensor:
    """Reshards a head from the rows of `have` to those of `want`, a teacher's to its student's: [L, H] -> [L', H].

    Rows that `have` lacks, such as padding, are 0; rows outside of `want` are dropped. One broadcast per rank of the
    group, meant for setup. Conjugate: none, for frozen heads.

    Args:
        rows: this rank's rows, without gradient.
        have: the rows that this rank holds.
        want: the rows that it should hold; `want.group` must have the same ranks as `have.group`.
    """
    result = rows.new_zeros(want.width, *rows.shape[1:])
    group = have.group
    mine = torch.tensor([have.start, have.stop], device=rows.device)
    for rank, (start, stop) in enumerate(gather_in_rank_order(mine, group).tolist()):
        part = rows
        if group is not None and group.size() > 1:
            part = rows.contiguous() if rank == group.rank() else rows.new_empty(stop - start, *rows.shape[1:])
            dist.broadcast(part, group=group, group_src=rank)
        first, last = max(start, want.start), min(stop, want.stop, have.vocab_size, want.vocab_size)
        if first < last:
            result[first - want.start : last - want.start] = part[first - start : last - start]
    return result


def merge_statistics(statistics_RN7: torch.Tensor, cross_term_sign: float) -> LogNormalizers:
    """Statistics of all shards, merged into those of the whole vocabulary.

    Args:
        statistics_RN7: every rank's [N, 7] in rank order (`NUM_STATISTICS`).
        cross_term_sign: 0 where there is no cross term; 1 where it is the teacher's mean of (teacher - student) logits,
            -1 where it is the student's mean of (student - teacher) logits.

    Returns:
        `LogNormalizers`, [N] each.
    """
    maximum_s, sum_s, maximum_t, sum_t, target_s, target_t, cross = statistics_RN7.unbind(-1)
    student_max, student_sum, lift_s = merge_sums(maximum_s, sum_s)
    teacher_max, teacher_sum, lift_t = merge_sums(maximum_t, sum_t)
    student_log_sum, teacher_log_sum = student_sum.log(), teacher_sum.log()
    total = torch.zeros_like(student_max)
    if cross_term_sign:
        # Each rank's cross term is relative to its own maxima; move both to the global ones, then normalize.
        offset = (maximum_t - teacher_max) - (maximum_s - student_max)
        lift, weight_sum, norm = (lift_t, sum_t, teacher_sum) if cross_term_sign > 0 else (lift_s, sum_s, student_sum)
        parts = torch.where(lift > 0, lift * (cross + cross_term_sign * offset * weight_sum), 0.0)
        total = parts.sum(0) / norm + cross_term_sign * (student_log_sum - teacher_log_sum)
    return LogNormalizers(
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


@dataclass(frozen=True)
class LmHead:
    """A rank's rows of an LM head, or of the embedding that it is tied to.

    Attributes:
        weight: [L, H].
        shard: the columns of the logits that these rows compute.
        main_grad: Megatron's fp32 gradient buffer of `weight`; None where it is not trained.
    """

    weight: torch.Tensor
    shard: VocabShard
    main_grad: torch.Tensor | None = None
