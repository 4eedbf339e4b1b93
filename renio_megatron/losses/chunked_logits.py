"""Logits of one chunk of tokens at a time, in buffers that every chunk reuses."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from renio_megatron.config import HeadConfig
from renio_megatron.errors import LayoutError
from renio_megatron.losses import kernels
from renio_megatron.losses.chunk_size import token_bytes


def chosen_dtype(hidden: torch.Tensor, logits_dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of logits: `logits_dtype`, or fp32, or fp64 for hidden states in fp64.

    Raises:
        LayoutError: a dtype that is neither fp32 nor that of the hidden states.
    """
    if logits_dtype is None:
        return torch.promote_types(hidden.dtype, torch.float32)
    if logits_dtype not in (hidden.dtype, torch.promote_types(hidden.dtype, torch.float32)):
        raise LayoutError(
            f"logits_dtype must be torch.float32 or the hidden states' {hidden.dtype}; got {logits_dtype}."
        )
    return logits_dtype


def logits_dtype_of(config: HeadConfig, hidden_dtype: torch.dtype) -> torch.dtype:
    """The dtype that a recipe's `head.logits_dtype` means for hidden states of `hidden_dtype`."""
    return torch.promote_types(hidden_dtype, torch.float32) if config.logits_dtype == "fp32" else hidden_dtype


def bytes_per_token(width: int, hidden_dtype: torch.dtype, logits_dtype: torch.dtype, num_models: int = 2) -> int:
    """Buffer bytes for each token of a chunk: `chunk_size.token_bytes` from dtypes."""
    return token_bytes(width, hidden_dtype.itemsize, logits_dtype.itemsize, num_models)


class Logits:
    """One model's logits of some tokens, projected into one buffer chunk by chunk."""

    def __init__(self, hidden: torch.Tensor, head: torch.Tensor, chunk_size: int, dtype: torch.dtype) -> None:
        """`hidden` [N, H] and `head` [L, H], without gradient; the buffer is [chunk_size, L]."""
        self._hidden, self._head = hidden.detach(), head.detach()
        self.buffer = hidden.new_empty(min(chunk_size, len(hidden)), head.shape[0], dtype=dtype)

    def project(self, rows: slice) -> torch.Tensor:
        """The logits of `rows`, [rows, L]; valid until the next call."""
        hidden = self._hidden[rows]
        return kernels.project_rows(hidden, self._head, self.buffer[: len(hidden)])


def slices(num_tokens: int, chunk_size: int) -> Iterator[slice]:
    """The tokens in chunks, in order. At least one, so that ranks without tokens take part in every exchange.

    >>> list(slices(5, 2)), list(slices(0, 2))
    ([slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)], [slice(0, 0, None)])
    """
    for start in range(0, max(1, num_tokens), chunk_size):
        yield slice(start, min(start + chunk_size, num_tokens))
