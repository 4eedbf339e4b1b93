"""Payload of the loss: the teacher's final hidden states in the student's order, stored or recomputed."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import overload

import torch
import torch.distributed as dist

from renio_megatron.parallel.layout import Axis
from renio_megatron.parallel.reductions import sum_over_group
from renio_megatron.parallel.vocab import gather_in_rank_order
from renio_megatron.types import MicroBatch, Rollout


class Payload(Sequence[torch.Tensor], abc.ABC):
    """Hidden states for each of the student's micro-batches, [N of it, H], fetched or computed on
    access."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> torch.Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[torch.Tensor]: ...
    def __getitem__(self, index: int | slice) -> torch.Tensor | Sequence[torch.Tensor]:
        numbers = range(self._length)[index]
        return self.fetch(numbers) if isinstance(numbers, int) else [self.fetch(number) for number in numbers]

    @abc.abstractmethod
    def fetch(self, number: int) -> torch.Tensor:
        """Hidden states of micro-batch `number`, on the device where the loss is computed."""


class StoredPayload(Payload):
    """Hidden states that are stored on the device or the host."""

    def __init__(self, parts: Sequence[torch.Tensor], device: torch.device) -> None:
        """`parts` follow the student's micro-batches; `device` is where the loss is computed."""
        super().__init__(len(parts))
        self._parts, self._device = parts, device

    @property
    def part_bytes(self) -> list[int]:
        """Bytes of each part on the device."""
        return [part.numel() * part.element_size() for part in self._parts]

    def fetch(self, number: int) -> torch.Tensor:
        """A copy on the device, or the tensor itself where it is stored there."""
        return self._parts[number].to(self._device, non_blocking=True)


class ShardedPayload(Payload):
    """Hidden states of which each tensor rank keeps a piece; they are gathered on access.

    The ranks of the tensor group fetch in the same order.
    """

    def __init__(
        self, pieces: Sequence[torch.Tensor], lengths: Sequence[int], axis: Axis, device: torch.device
    ) -> None:
        """Pieces of micro-batches of `lengths` rows, split as in `gather_pieces` among the ranks of `axis`."""
        super().__init__(len(pieces))
        self._pieces, self._lengths, self._axis, self._device = pieces, lengths, axis, device

    @property
    def piece_bytes(self) -> list[int]:
        """Bytes of each piece where it is stored."""
        return [piece.numel() * piece.element_size() for piece in self._pieces]

    @property
    def whole_bytes(self) -> list[int]:
        """Bytes of each gathered tensor on the device, in addition to the pieces; 0 where these are whole."""
        if self._axis.size == 1 and all(piece.device == self._device for piece in self._pieces):
            return [0]
        row = self._pieces[0].shape[1] * self._pieces[0].element_size()
        return [length * row for length in self._lengths]

    def fetch(self, number: int) -> torch.Tensor:
        """The rows gathered from all ranks' pieces; one collective."""
        piece = self._pieces[number].to(self._device, non_blocking=True)
        return gather_pieces(piece, self._lengths[number], self._axis)


def gather_pieces(piece: torch.Tensor, length: int, axis: Axis) -> torch.Tensor:
    """Rows [length, width] from the pieces of the ranks, of which the first have ceil(length / ranks) each."""
    if axis.size == 1:
        return piece
    size = -(-length // axis.size)
    padded = piece.new_zeros(size, *piece.shape[1:])
    padded[: len(piece)] = piece
    return gather_in_rank_order(padded, axis.group).flatten(0, 1)[:length]


class RecomputedPayload(Payload):
    """Hidden states that the teacher recomputes, one micro-batch at a time."""

    def __init__(
        self,
        rollouts: Sequence[Rollout],
        student_batches: Sequence[MicroBatch],
        hidden_states: Callable[[Sequence[Rollout], MicroBatch], torch.Tensor],
    ) -> None:
        """`hidden_states` computes those of one micro-batch from (its rollouts, the micro-batch of these alone)."""
        super().__init__(len(student_batches))
        self._rollouts, self._batches, self._hidden_states = rollouts, student_batches, hidden_states

    def fetch(self, number: int) -> torch.Tensor:
        """The teacher's pass over the micro-batch's sequences."""
        batch = self._batches[number]
        rollouts = [self._rollouts[sequence] for sequence in batch.sequence_index.tolist()]
        tokens = _tokens_of(batch, [len(rollout.completion_ids) for rollout in self._rollouts])
        alone = replace(
            batch,
            token_index=_places(tokens, batch.token_index),
            sequence_index=torch.arange(len(rollouts), device=batch.sequence_index.device),
        )
        return self._hidden_states(rollouts, alone)


def align(
    rows: list[torch.Tensor],
    micro_batches: Sequence[MicroBatch],
    student_batches: Sequence[MicroBatch],
    group: dist.ProcessGroup | None,
) -> list[torch.Tensor]:
    """Hidden states of the teacher's micro-batches, rearranged for the student's micro-batches.

    The teacher's prompt has another length, so packing and context parallelism split its sequences differently: the
    rows are put back in the rollouts' order, and each rank takes those whose tokens it trains.

    Args:
        rows: hidden states of each of the teacher's micro-batches [N, H], on any device; the list is emptied.
        micro_batches: those of the teacher.
        student_batches: those of the student, of the same rollouts.
        group: context-parallel group; the ranks' rows are exchanged one of the student's micro-batches at a time.
    """
    pieces = 1 if group is None else group.size()
    if pieces == 1 and all(
        torch.equal(mine.token_index, theirs.token_index)
        for mine, theirs in zip(micro_batches, student_batches, strict=False)
    ):
        return rows
    lengths = torch.cat([batch.lengths for batch in micro_batches])
    lengths_of = torch.empty_like(lengths)
    lengths_of[torch.cat([batch.sequence_index for batch in micro_batches])] = lengths
    place, device = rows[0].device, micro_batches[0].token_ids.device
    flat = torch.zeros(int(lengths.sum()), rows[0].shape[1], dtype=rows[0].dtype, device=place)
    for values, batch in zip(rows, micro_batches, strict=True):
        flat[batch.token_index.to(place)] = values
    rows.clear()
    if pieces == 1:
        return [flat[batch.token_index.to(place)] for batch in student_batches]
    wanted = []
    for batch in student_batches:
        tokens = _tokens_of(batch, lengths_of.tolist())
        whole = sum_over_group(flat[tokens.to(place)].to(device), group)
        wanted.append(whole[_places(tokens, batch.token_index)].to(place))
    return wanted


def _tokens_of(batch: MicroBatch, lengths: Sequence[int]) -> torch.Tensor:
    """Indices of all completion tokens of a micro-batch's sequences, on every context-parallel rank, int64."""
    offsets = [0]
    for length in lengths:
        offsets.append(offsets[-1] + length)
    ranges = [torch.arange(offsets[number], offsets[number + 1]) for number in batch.sequence_index.tolist()]
    return torch.cat(ranges).to(batch.token_index.device)


def _places(tokens: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Positions of the `wanted` ones in `tokens`, which are unique."""
    ascending, order = tokens.sort()
    return order[torch.searchsorted(ascending, wanted)]
