"""Megatron's own schedules, driven by micro-batches: hidden states at completion rows come out of the last stage."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func

from renio_megatron.megatron.model import ModelPart
from renio_megatron.parallel.layout import Layout
from renio_megatron.records import MicroBatch

OnRows = Callable[[int, MicroBatch, torch.Tensor], Any]
"""(index, micro-batch, final hidden states at its completion rows [N, H]) -> what the caller collects."""


def run_forward(part: ModelPart, micro_batches: Sequence[MicroBatch], on_rows: OnRows) -> list[Any]:
    """Forward passes without gradient; the results of `on_rows` in order, on the last stage (elsewhere empty).

    All micro-batches are of one shape.
    """

    def collect(index: int, micro_batch: MicroBatch, output: torch.Tensor, non_loss_data: bool = True) -> Any:
        return on_rows(index, micro_batch, part.completion_rows(output, micro_batch.row_index))

    with torch.no_grad():
        return _run(part.module, micro_batches, collect, forward_only=True, collect_non_loss_data=True)


def run_forward_backward(
    part: ModelPart, module: torch.nn.Module, micro_batches: Sequence[MicroBatch], loss_on_rows: OnRows
) -> list[Any]:
    """Forward and backward passes of one optimiser step, gradients reduced and scaled by the config's own hook.

    Args:
        part: the model.
        module: its DDP wrapper; the config's `finalize_model_grads_func` is called at the end.
        micro_batches: all of one shape.
        loss_on_rows: returns (sum of the loss, what to collect).

    Returns:
        What `loss_on_rows` gave to collect, in order, on the last stage (elsewhere empty).
    """

    def loss(index: int, micro_batch: MicroBatch, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Any]:
        rows = part.completion_rows(output, micro_batch.row_index)
        total, collected = loss_on_rows(index, micro_batch, rows)
        # Megatron counts tokens in an integer and clamps the count at 1; our denominator is neither, so it sees 0 here
        # and the division happens in finalize_model_grads_func.
        return total, torch.zeros((), dtype=torch.int, device=output.device), collected

    return _run(module, micro_batches, loss, forward_only=False, collect_non_loss_data=False)


def broadcast_from_last_stage(tensor: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The last stage's `tensor`, on every stage; the others pass one of the same shape and dtype."""
    if layout.pipeline.size > 1:
        dist.broadcast(tensor, src=layout.pipeline.ranks[-1], group=layout.pipeline.group)
    return tensor


def _run(
    module: torch.nn.Module, micro_batches: Sequence[MicroBatch], loss: Callable[..., Any], **how: bool
) -> list[Any]:
    def forward_step(iterator: Any, model: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., Any]]:
        index, micro_batch = next(iterator)
        output = model(micro_batch.token_ids, micro_batch.position_ids, None)
        return output, functools.partial(loss, index, micro_batch)

    rows, length = micro_batches[0].token_ids.shape
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(enumerate(micro_batches)),
        model=module,
        num_microbatches=len(micro_batches),
        seq_length=length,
        micro_batch_size=rows,
        **how,
    )
