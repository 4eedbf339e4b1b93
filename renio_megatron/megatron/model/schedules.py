"""Megatron's pipeline schedules over micro-batches, with hidden states at completion rows as the result."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func

from renio_megatron.megatron.model.attention import packing_of
from renio_megatron.megatron.model.build import ModelPart
from renio_megatron.parallel.layout import ParallelLayout
from renio_megatron.parallel.reductions import sum_over_group
from renio_megatron.types import MicroBatch

OnRows = Callable[[int, MicroBatch, torch.Tensor], Any]
"""(index, micro-batch, final hidden states at its completion rows [N, H]) -> result that the caller collects."""


def run_forward(part: ModelPart, micro_batches: Sequence[MicroBatch], on_rows: OnRows) -> list[Any]:
    """Forward passes without gradient; the results of `on_rows` in order, on the last stage (elsewhere empty)."""

    def collect(index: int, micro_batch: MicroBatch, output: torch.Tensor, non_loss_data: bool = True) -> Any:
        return on_rows(index, micro_batch, part.completion_rows(output, micro_batch.row_index))

    part.sync_params()
    with torch.no_grad():
        found = _run(part, part.chunks, micro_batches, collect, forward_only=True, collect_non_loss_data=True)
    for chunk in part.chunks:  # which would keep the last input from the previous stage
        chunk.set_input_tensor([None])
    return found


def run_forward_backward(
    part: ModelPart,
    chunks: Sequence[torch.nn.Module],
    micro_batches: Sequence[MicroBatch],
    loss_on_rows: Callable[[int, MicroBatch, torch.Tensor], tuple[torch.Tensor, Any]],
) -> list[Any]:
    """Forward and backward passes of one optimizer step, gradients reduced and scaled by the config's own hook.

    Args:
        part: the model.
        chunks: the DDP wrappers of its chunks; the config's `finalize_model_grads_func` is called at the end.
        micro_batches: those of the step.
        loss_on_rows: returns (sum of the loss, result to collect).

    Returns:
        The results of `loss_on_rows`, in order, on the last stage (elsewhere empty).
    """

    def loss(index: int, micro_batch: MicroBatch, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Any]:
        rows = part.completion_rows(output, micro_batch.row_index)
        total, collected = loss_on_rows(index, micro_batch, rows)
        # Megatron counts tokens in an integer and clamps the count at 1; our denominator is neither, so it gets 0 here
        # and the division happens in finalize_model_grads_func.
        return total, torch.zeros((), dtype=torch.int, device=output.device), collected

    return _run(part, chunks, micro_batches, loss, forward_only=False, collect_non_loss_data=False)


def broadcast_from_last_stage(tensor: torch.Tensor, layout: ParallelLayout) -> torch.Tensor:
    """The last stage's `tensor`, on every stage; the others pass one of the same shape and dtype."""
    if layout.pipeline.size > 1:
        dist.broadcast(tensor, src=layout.pipeline.ranks[-1], group=layout.pipeline.group)
    return tensor


def broadcast_token_values(
    collected: Sequence[torch.Tensor], micro_batches: Sequence[MicroBatch], layout: ParallelLayout
) -> torch.Tensor:
    """One number for each completion token of the rank's rollouts, on every rank that shares them: fp32 [N].

    Args:
        collected: a number for each row of each micro-batch, on the last stage; elsewhere nothing.
        micro_batches: this context-parallel rank's.
    """
    count = sum(int(micro_batch.lengths.sum()) for micro_batch in micro_batches)
    flat = torch.zeros(count, dtype=torch.float32, device=layout.device)
    if not count:
        return flat
    for values, micro_batch in zip(collected, micro_batches, strict=False):
        flat[micro_batch.token_index] = values.float()
    return broadcast_from_last_stage(sum_over_group(flat, layout.context.group), layout)


def _run(
    part: ModelPart,
    chunks: Sequence[torch.nn.Module],
    micro_batches: Sequence[MicroBatch],
    loss: Callable[..., Any],
    **how: bool,
) -> list[Any]:
    def forward_step(iterator: Any, model: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., Any]]:
        index, micro_batch = next(iterator)
        if not how["forward_only"]:
            part.begin(micro_batch)
        packing = {}
        if micro_batch.boundaries is not None:
            packing["packed_seq_params"] = packing_of(micro_batch.boundaries, micro_batch.token_ids.device)
        output = model(micro_batch.token_ids, micro_batch.position_ids, None, **packing)
        return output, functools.partial(loss, index, micro_batch)

    interleaved = len(chunks) > 1
    iterators = [iter(enumerate(micro_batches)) for _ in chunks]
    schedule = get_forward_backward_func(part.layout.pipeline.size, len(chunks) if interleaved else None)
    return schedule(
        forward_step_func=forward_step,
        data_iterator=iterators if interleaved else iterators[0],
        model=list(chunks) if interleaved else chunks[0],
        num_microbatches=len(micro_batches),
        seq_length=micro_batches[0].row_length,
        micro_batch_size=micro_batches[0].token_ids.shape[0],
        **how,
    )
