"""Collation of rollouts into micro-batches, with the next-token shift and masks from lengths only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from renio_megatron.data.batching.packing import pack
from renio_megatron.errors import DataError
from renio_megatron.parallel.context import local_positions
from renio_megatron.types import MicroBatch, Rollout

Audience = Literal["student", "teacher"]


@dataclass(frozen=True)
class BatchLayout:
    """How sequences become micro-batches.

    Attributes:
        pad_id: fills rows on the right. No token is compared with it: a sampled end token counts whatever its id.
        micro_batch_size: sequences of a micro-batch, each in a row of its own.
        max_tokens: tokens of a micro-batch whose sequences are packed into one row; None: one row per sequence.
        sp_size: ranks over which sequence parallelism splits the rows; 1 without it.
        cp_size, cp_rank: place on the context axis.
        multiple_of: the number of micro-batches is a multiple of this (interleaved pipelines need it).
        piece_multiple: positions of a row that one rank computes on are a multiple of this (FP8 products need it).
    """

    pad_id: int
    micro_batch_size: int = 1
    max_tokens: int | None = None
    sp_size: int = 1
    cp_size: int = 1
    cp_rank: int = 0
    multiple_of: int = 1
    piece_multiple: int = 1

    @property
    def sequence_multiple(self) -> int:
        """Alignment of packed sequences: their length, padding included, is a multiple of this."""
        return 2 * self.cp_size if self.cp_size > 1 else 1

    @property
    def row_multiple(self) -> int:
        """Alignment of rows: their length is a multiple of this."""
        here = self.sp_size * self.piece_multiple  # of the positions of a context rank
        return here if self.cp_size == 1 else self.cp_size * math.lcm(2, here)


def collate(rollouts: Sequence[Rollout], *, audience: Audience, batch_layout: BatchLayout) -> list[MicroBatch]:
    """Collates rollouts into micro-batches: in order, or packed in the order that `packing.pack` chooses.

    >>> from renio_megatron.types import Prompt
    >>> rollouts = [Rollout(Prompt(0, (5, 6), (5, 6)), (7, 8))]
    >>> batch = collate(rollouts, audience="student", batch_layout=BatchLayout(pad_id=0))[0]
    >>> batch.token_ids.tolist(), batch.row_index.tolist(), batch.target_ids.tolist()
    ([[5, 6, 7]], [1, 2], [7, 8])

    Args:
        rollouts: sequences, each with at least one completion token.
        audience: the model whose view of the prompt precedes the completion.
        batch_layout: how they are arranged in micro-batches. Rows of unpacked micro-batches all have the same length.
    Raises:
        DataError: an empty prompt or completion, or a sequence that is longer than a packed row may be.
    """
    prompts = [
        rollout.prompt.student_ids if audience == "student" else rollout.prompt.teacher_ids for rollout in rollouts
    ]
    for rollout, prompt_ids in zip(rollouts, prompts, strict=True):
        _check(rollout, len(prompt_ids), audience)
    sequences = [
        _Sequence(number, rollout.prompt.index, prompt_ids, rollout.completion_ids)
        for number, (prompt_ids, rollout) in enumerate(zip(prompts, rollouts, strict=True))
    ]
    offsets = [0]
    for rollout in rollouts:
        offsets.append(offsets[-1] + len(rollout.completion_ids))
    if batch_layout.max_tokens is None:
        row = _ceil(max((sequence.length for sequence in sequences), default=0), batch_layout.row_multiple)
        size = batch_layout.micro_batch_size
        chosen = [sequences[start : start + size] for start in range(0, len(sequences), size)]
        return [_micro_batch(group, [row] * len(group), offsets, batch_layout) for group in chosen]
    lengths = [_ceil(sequence.length, batch_layout.sequence_multiple) for sequence in sequences]
    for rollout, length in zip(rollouts, lengths, strict=True):
        if length > batch_layout.max_tokens:
            raise DataError(
                f"Prompt {rollout.prompt.index}: prompt and completion make {length} tokens, more than "
                f"train.max_tokens_per_micro_batch={batch_layout.max_tokens}. Raise it, or leave the record out."
            )
    packs = pack(lengths, batch_layout.max_tokens, multiple_of=batch_layout.multiple_of)
    return [
        _micro_batch([sequences[i] for i in chosen], [lengths[i] for i in chosen], offsets, batch_layout)
        for chosen in packs
    ]


def flat_completions(rollouts: Sequence[Rollout]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Completion tokens of all rollouts, sequence after sequence: the order of `MicroBatch.token_index`.

    Returns:
        (token_ids [N], owner [N] in [0, B), lengths [B]), int64.
    """
    token_ids = torch.tensor([token for rollout in rollouts for token in rollout.completion_ids], dtype=torch.int64)
    lengths = torch.tensor([len(rollout.completion_ids) for rollout in rollouts], dtype=torch.int64)
    return token_ids, torch.repeat_interleave(lengths), lengths


def flat_positions(rollouts: Sequence[Rollout]) -> torch.Tensor:
    """Each completion token's place in its completion, from 0 on, int64 [N], in the order of `flat_completions`."""
    return torch.cat([torch.empty(0, dtype=torch.int64), *(torch.arange(len(one.completion_ids)) for one in rollouts)])


def flat_logp(rollouts: Sequence[Rollout]) -> torch.Tensor:
    """The sampler's log-probabilities of all completion tokens, nats, fp32 [N], in the order of `flat_completions`.

    Raises:
        DataError: a rollout has none, or not one per token.
    """
    pieces = [torch.empty(0)]
    for rollout in rollouts:
        if rollout.logp is None or len(rollout.logp) != len(rollout.completion_ids):
            found = "none" if rollout.logp is None else str(len(rollout.logp))
            raise DataError(
                f"Prompt {rollout.prompt.index}: {len(rollout.completion_ids)} completion tokens need as many "
                f"log-probabilities of the sampler; got {found}."
            )
        pieces.append(rollout.logp.float())
    return torch.cat(pieces)


@dataclass(frozen=True)
class _Sequence:
    """One rollout as one of the models reads it."""

    number: int
    prompt_index: int
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]

    @property
    def length(self) -> int:
        """Tokens that the model reads."""
        return len(self.prompt_ids) + len(self.completion_ids) - 1


def _check(rollout: Rollout, prompt_length: int, audience: str) -> None:
    if prompt_length == 0:
        raise DataError(
            f"Prompt {rollout.prompt.index}: the {audience}'s prompt is empty; nothing predicts the first token."
        )
    if not rollout.completion_ids:
        raise DataError(f"Prompt {rollout.prompt.index}: the completion is empty; it needs at least the end token.")


def _micro_batch(
    sequences: Sequence[_Sequence], lengths: list[int], offsets: list[int], batch_layout: BatchLayout
) -> MicroBatch:
    """A micro-batch of the sequences, each padded to its length, then cut for this context-parallel rank."""
    is_packed = batch_layout.max_tokens is not None
    if is_packed:  # the padding up to the row's alignment belongs to the last sequence
        lengths = [*lengths[:-1], lengths[-1] + -sum(lengths) % batch_layout.row_multiple]
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    token_ids = torch.full((starts[-1],), batch_layout.pad_id, dtype=torch.int64)
    sequence_of = torch.full((starts[-1],), -1)
    row_index, target_ids, token_index = [], [], []
    for number, (sequence, start) in enumerate(zip(sequences, starts, strict=False)):
        read = torch.tensor(sequence.prompt_ids + sequence.completion_ids[:-1], dtype=torch.int64)
        token_ids[start : start + len(read)] = read
        sequence_of[start : start + len(read)] = number
        count, first = len(sequence.completion_ids), start + len(sequence.prompt_ids) - 1
        # The last prompt token predicts the first completion token.
        row_index.append(torch.arange(first, first + count))
        target_ids.append(torch.tensor(sequence.completion_ids, dtype=torch.int64))
        token_index.append(torch.arange(offsets[sequence.number], offsets[sequence.number] + count))
    counts = torch.tensor([len(sequence.completion_ids) for sequence in sequences], dtype=torch.int64)
    position_ids = torch.cat([torch.arange(length) for length in lengths])
    rows, targets, tokens, owner = (
        torch.cat(row_index),
        torch.cat(target_ids),
        torch.cat(token_index),
        torch.repeat_interleave(counts),
    )
    if batch_layout.cp_size > 1:
        here = local_positions(starts, batch_layout.cp_size, batch_layout.cp_rank)
        place = torch.full((starts[-1],), -1).scatter_(0, here, torch.arange(len(here)))
        kept = place[rows] >= 0
        token_ids, position_ids, sequence_of = token_ids[here], position_ids[here], sequence_of[here]
        rows, targets, tokens, owner = place[rows[kept]], targets[kept], tokens[kept], owner[kept]
    height = 1 if is_packed else len(sequences)
    return MicroBatch(
        token_ids=token_ids.view(height, -1),
        position_ids=position_ids.view(height, -1),
        row_index=rows,
        target_ids=targets,
        owner=owner,
        token_index=tokens,
        sequence_index=torch.tensor([sequence.number for sequence in sequences], dtype=torch.int64),
        prompt_index=torch.tensor([sequence.prompt_index for sequence in sequences], dtype=torch.int64),
        lengths=counts,
        sequence_of=sequence_of.view(height, -1),
        boundaries=tuple(starts) if is_packed else None,
        cp_size=batch_layout.cp_size,
    )


def _ceil(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def select_sequences(batch: MicroBatch, chosen: torch.Tensor) -> tuple[MicroBatch, torch.Tensor]:
    """Restricts the completion tokens of a micro-batch to those of some sequences.

    The model inputs are unchanged. `token_index` and `sequence_index` still count all of the rank's rollouts.

    Args:
        batch: the micro-batch.
        chosen: mask of its sequences, bool [B].

    Returns:
        (the micro-batch of the chosen sequences, indices of their tokens in `batch`'s [N], int64).
    """
    number = torch.where(chosen, chosen.long().cumsum(0) - 1, -1)
    rows = chosen[batch.owner].nonzero()[:, 0]
    own = replace(
        batch,
        row_index=batch.row_index[rows],
        target_ids=batch.target_ids[rows],
        owner=number[batch.owner[rows]],
        token_index=batch.token_index[rows],
        sequence_index=batch.sequence_index[chosen],
        prompt_index=batch.prompt_index[chosen],
        lengths=batch.lengths[chosen],
        sequence_of=torch.where(batch.sequence_of >= 0, number[batch.sequence_of.clamp(min=0)], -1),
    )
    return own, rows
