"""Checks of a loss's arguments against each other; every message names the wrong argument and the fix."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from renio_megatron.errors import LayoutError
from renio_megatron.parallel.vocab import VocabShard


def check_logits(student_logits: torch.Tensor, teacher_logits: torch.Tensor, shard: VocabShard) -> None:
    """Raises `LayoutError` unless both are [N, L] with the shard's L columns, on one device."""
    if student_logits.ndim != 2 or student_logits.shape != teacher_logits.shape:
        raise LayoutError(
            "student_logits and teacher_logits must both be [N, L]: completion tokens only, flat, the same columns; "
            f"got {tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}. Cut the wider vocabulary first."
        )
    _check_floating({"student_logits": student_logits, "teacher_logits": teacher_logits})
    _check_width("the logits have", "columns", student_logits.shape[1], shard)


def check_heads(
    student_hidden: torch.Tensor,
    student_head: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_head: torch.Tensor,
    shard: VocabShard,
) -> None:
    """Raises `LayoutError` unless these are hidden states [N, H] and LM heads [L, H] that fit together."""
    for who, hidden, head in (("student", student_hidden, student_head), ("teacher", teacher_hidden, teacher_head)):
        if hidden.ndim != 2 or head.ndim != 2:
            raise LayoutError(
                f"{who}_hidden must be [N, H], completion tokens only, flat, and {who}_head [L, H]; got "
                f"{tuple(hidden.shape)} and {tuple(head.shape)}."
            )
        if hidden.shape[1] != head.shape[1]:
            raise LayoutError(
                f"{who}_hidden has hidden size {hidden.shape[1]}, {who}_head {head.shape[1]}; take both of one model."
            )
        if hidden.dtype != head.dtype:
            raise LayoutError(f"{who}_hidden is {hidden.dtype}, {who}_head {head.dtype}; cast one of them.")
        _check_width(f"{who}_head has", "rows", head.shape[0], shard)
    if (student_hidden.dtype == torch.float64) != (teacher_hidden.dtype == torch.float64):
        raise LayoutError(
            f"the student is {student_hidden.dtype}, the teacher {teacher_hidden.dtype}; fp64 wants both, cast one."
        )
    _check_floating(
        {
            "student_hidden": student_hidden,
            "student_head": student_head,
            "teacher_hidden": teacher_hidden,
            "teacher_head": teacher_head,
        }
    )


def check_tokens(
    rows: int,
    token_ids: torch.Tensor,
    owner: torch.Tensor,
    num_sequences: int,
    shard: VocabShard,
    weights: torch.Tensor | None,
    sequence_lengths: torch.Tensor | None,
    *,
    read_values: bool = True,
) -> None:
    """Raises `LayoutError` unless these describe `rows` tokens of `num_sequences` sequences.

    With `read_values` the values of the indices are checked, too, which synchronizes with a GPU.
    """
    if not isinstance(num_sequences, int) or num_sequences < 0:
        raise LayoutError(f"num_sequences must be a whole number of at least 0; got {num_sequences!r}.")
    for name, index, limit in (("token_ids", token_ids, shard.vocab_size), ("owner", owner, num_sequences)):
        if index.shape != (rows,) or index.dtype != torch.int64:
            raise LayoutError(f"{name} must be int64 [{rows}]; got {index.dtype} {tuple(index.shape)}.")
        if read_values and rows and (int(index.min()) < 0 or int(index.max()) >= limit):
            raise LayoutError(
                f"{name} must lie in [0, {limit}); got values from {int(index.min())} to {int(index.max())}."
            )
    for name, values in (("weights", weights), ("sequence_lengths", sequence_lengths)):
        if values is not None and values.shape != (num_sequences,):
            raise LayoutError(f"{name} must be [{num_sequences}], a value a sequence; got {tuple(values.shape)}.")
    if read_values and sequence_lengths is not None:
        counts = torch.bincount(owner, minlength=num_sequences)
        if (too_short := counts > sequence_lengths).any():
            sequence = int(too_short.nonzero()[0])
            raise LayoutError(
                f"sequence_lengths says {float(sequence_lengths[sequence]):g} tokens for sequence {sequence}, and "
                f"{int(counts[sequence])} of them are here. It counts the tokens of each whole sequence."
            )


def _check_floating(tensors: Mapping[str, torch.Tensor]) -> None:
    (first, reference), *rest = tensors.items()
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise LayoutError(f"{name} must be of a floating dtype; got {tensor.dtype}.")
    for name, tensor in rest:
        if tensor.device != reference.device:
            raise LayoutError(f"{first} are on {reference.device}, {name} on {tensor.device}; move one.")


def _check_width(what: str, unit: str, width: int, shard: VocabShard) -> None:
    if width != shard.width:
        raise LayoutError(
            f"{what} {width} {unit}, the shard [{shard.start}, {shard.stop}) has {shard.width} columns; "
            "shard.start and shard.stop count padding columns, too."
        )
