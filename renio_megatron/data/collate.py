"""Rollouts -> micro-batches: prompt and completion side by side, the shift once, masks from lengths only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from renio_megatron.errors import DataError
from renio_megatron.records import MicroBatch, Rollout

View = Literal["student", "teacher"]


def collate(
    rollouts: Sequence[Rollout], *, view: View, micro_batch_size: int, pad_id: int, multiple_of: int = 1
) -> list[MicroBatch]:
    """The rollouts as micro-batches, in order; the last one may hold fewer sequences.

    No token is compared with `pad_id`: a drawn end token counts whatever its id.

    >>> from renio_megatron.records import Prompt
    >>> batch = collate([Rollout(Prompt(0, (5, 6), (5, 6)), (7, 8))], view="student", micro_batch_size=1, pad_id=0)[0]
    >>> batch.token_ids.tolist(), batch.row_index.tolist(), batch.target_ids.tolist()
    ([[5, 6, 7]], [1, 2], [7, 8])

    Args:
        rollouts: sequences, each with at least one completion token.
        view: whose prompt stands before the completion.
        micro_batch_size: sequences of a micro-batch, B.
        pad_id: fills the rows on the right.
        multiple_of: every row of every micro-batch has the same length S, a multiple of this.
    Raises:
        DataError: an empty prompt or completion.
    """
    rows = []
    for rollout in rollouts:
        prompt_ids = rollout.prompt.student_ids if view == "student" else rollout.prompt.teacher_ids
        _check(rollout, len(prompt_ids), view)
        rows.append((prompt_ids, rollout.completion_ids))
    longest = max((len(prompt) + len(completion) - 1 for prompt, completion in rows), default=0)
    length = -(-longest // multiple_of) * multiple_of
    return [
        _micro_batch(rows[start : start + micro_batch_size], length, pad_id)
        for start in range(0, len(rows), micro_batch_size)
    ]


def flat_completions(rollouts: Sequence[Rollout]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Completion tokens of all rollouts, sequence after sequence: the same order as in the micro-batches.

    Returns:
        (token_ids [N], owner [N] in [0, B), lengths [B]), int64.
    """
    token_ids = torch.tensor([token for rollout in rollouts for token in rollout.completion_ids], dtype=torch.int64)
    lengths = torch.tensor([len(rollout.completion_ids) for rollout in rollouts], dtype=torch.int64)
    return token_ids, torch.repeat_interleave(lengths), lengths


def flat_logp(rollouts: Sequence[Rollout]) -> torch.Tensor:
    """The sampler's log-probabilities of all completion tokens, nats, fp32 [N], in the order of `flat_completions`.

    Raises:
        DataError: a rollout has none, or not one for each token.
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


def _check(rollout: Rollout, prompt_length: int, view: str) -> None:
    if prompt_length == 0:
        raise DataError(
            f"Prompt {rollout.prompt.index}: the {view}'s prompt is empty; nothing predicts the first token."
        )
    if not rollout.completion_ids:
        raise DataError(f"Prompt {rollout.prompt.index}: the completion is empty; it needs at least the end token.")


def _micro_batch(rows: list[tuple[tuple[int, ...], tuple[int, ...]]], length: int, pad_id: int) -> MicroBatch:
    token_ids = torch.full((len(rows), length), pad_id, dtype=torch.int64)
    row_index, target_ids = [], []
    for row, (prompt_ids, completion_ids) in enumerate(rows):
        sequence = torch.tensor(prompt_ids + completion_ids[:-1], dtype=torch.int64)
        token_ids[row, : len(sequence)] = sequence
        # The last prompt token predicts the first completion token.
        first = row * length + len(prompt_ids) - 1
        row_index.append(torch.arange(first, first + len(completion_ids)))
        target_ids.append(torch.tensor(completion_ids, dtype=torch.int64))
    lengths = torch.tensor([len(completion_ids) for _, completion_ids in rows], dtype=torch.int64)
    return MicroBatch(
        token_ids=token_ids,
        position_ids=torch.arange(length).repeat(len(rows), 1),
        row_index=torch.cat(row_index),
        target_ids=torch.cat(target_ids),
        owner=torch.repeat_interleave(lengths),
        lengths=lengths,
    )
