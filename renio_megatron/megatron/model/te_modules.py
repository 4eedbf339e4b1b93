"""Helpers for Transformer Engine's modules and parameters, beyond the calls that Megatron makes.

None of these functions imports Transformer Engine: they read attributes of its modules and parameters.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from torch.nn.functional import pad


@contextlib.contextmanager
def padded_rows(chunk: torch.nn.Module, multiple: int) -> Iterator[None]:
    """Context in which every linear layer pads its input rows with zeros to a multiple, and cuts its output again.

    A pass over single tokens has as many rows as sequences, and FP8 products do not support most numbers. Megatron's
    `prepare_model_for_fp8_inference` pads each sequence instead, which multiplies the work of decoding by the multiple.

    Args:
        chunk: a model of Transformer Engine's modules, sequence parallelism off.
        multiple: 1 changes nothing.
    """
    linears = [module for module in chunk.modules() if hasattr(module, "is_first_microbatch")] if multiple > 1 else []
    for module in linears:
        module.forward = functools.partial(_forward_padded, module.forward, multiple)
    try:
        yield
    finally:
        for module in linears:
            del module.forward  # restores the class's own


def _forward_padded(forward: Any, multiple: int, hidden: torch.Tensor) -> tuple[torch.Tensor, Any]:
    rows = hidden.flatten(0, -2)
    output, bias = forward(pad(rows, (0, 0, 0, -len(rows) % multiple)))
    return output[: len(rows)].view(*hidden.shape[:-1], -1), bias


@contextlib.contextmanager
def whole_sequences(chunk: torch.nn.Module) -> Iterator[None]:
    """Context with Transformer Engine's attention without context parallelism: every rank decodes whole sequences."""
    attentions: list[Any] = [module for module in chunk.modules() if hasattr(module, "set_context_parallel_group")]
    attentions = [module for module in attentions if module.cp_group is not None]
    before = [(module.cp_group, module.cp_global_ranks, module.cp_stream, module.cp_comm_type) for module in attentions]
    for module in attentions:
        module.set_context_parallel_group(None, None, None, module.cp_comm_type)
    try:
        yield
    finally:
        for module, (group, ranks, stream, kind) in zip(attentions, before, strict=True):
            module.set_context_parallel_group(group, ranks, stream, kind)


def slow_attention() -> str | None:
    """A message that Transformer Engine's last attention ran without a fused kernel; None where it had one, or where
    this is unknown.

    It falls back silently, to a matrix of scores that is materialized, masked and saved.
    """
    for name, module in list(sys.modules.items()):
        chosen = getattr(module, "_attention_backends", None) if name.startswith(_ATTENTION) else None
        if isinstance(chosen, dict) and chosen.get("use_unfused_attention"):
            return (
                "Transformer Engine computes attention without a fused kernel: several times slower, and each "
                "layer keeps its scores, which `renio plan` does not count. NVTE_DEBUG=1 NVTE_DEBUG_LEVEL=2 says why. "
                "Usual causes: no flash-attn, or a cuDNN that is not torch's (CUDNN_HOME, where it is set, names the "
                "folder of the one that Transformer Engine takes). precision.backend=local does without it."
            )
    return None


_ATTENTION = "transformer_engine.pytorch.attention"


def is_quantized(parameter: torch.nn.Parameter) -> bool:
    """Whether a parameter is kept in FP8: its values must be set all at once, with `fill`."""
    return is_float8tensor(parameter)


def fill(parameter: torch.nn.Parameter, values: torch.Tensor) -> None:
    """Copies values into a parameter that is kept in FP8.

    Transformer Engine keeps the random initial values of such a parameter, from which Megatron's optimizer initializes
    its fp32 copy; these are overwritten, too.

    Args:
        values: of the parameter's shape, dtype and device.
    """
    parameter.copy_(values)
    if getattr(parameter, "_high_precision_init_val", None) is not None:
        parameter._high_precision_init_val = values.cpu()  # type: ignore[attr-defined]


def values_of(parameter: torch.Tensor) -> torch.Tensor:
    """A parameter's values without gradient, dequantized where it is kept in FP8."""
    plain = parameter.detach()
    return dequantize_fp8_tensor(plain) if is_float8tensor(plain) else plain
