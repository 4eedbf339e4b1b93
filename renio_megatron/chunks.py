"""Logits a chunk of tokens at a time, in buffers that every chunk uses again."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from renio_megatron import kernels
from renio_megatron.errors import LayoutError
from renio_megatron.settings import HeadConfig

LEAST_CHUNK = 2048
"""Tokens below which a chunk's products no longer pay for reading the head, nor its exchanges for their latency."""
CHUNK_BYTES = 1 << 30
"""What the buffers of a chunk may take where that allows `LEAST_CHUNK` tokens."""


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
    """What the buffers take for each token of a chunk: both models' logits [L], and the gradient where it is narrower
    than the logits and so cannot take their place."""
    narrow = hidden_dtype.itemsize if num_models == 2 and hidden_dtype != logits_dtype else 0
    return width * (num_models * logits_dtype.itemsize + narrow)


def chunk_size_for(num_tokens: int, token_bytes: int, chunk_size: int | None = None) -> int:
    """Tokens of a chunk: `chunk_size`, or as many as `CHUNK_BYTES` allow and at least `LEAST_CHUNK`; at most all, and
    cut so that all chunks are about as long.

    >>> chunk_size_for(5000, 400_000), chunk_size_for(5000, 4_000_000), chunk_size_for(100, 4_000_000)
    (2500, 1667, 100)
    >>> chunk_size_for(5000, 400_000, 300)
    300

    Raises:
        LayoutError: a chunk without tokens.
    """
    if chunk_size is not None:
        if chunk_size < 1:
            raise LayoutError(f"chunk_size must be at least 1, or None; got {chunk_size}.")
        return min(chunk_size, max(1, num_tokens))
    most = max(LEAST_CHUNK, CHUNK_BYTES // max(1, token_bytes))
    return -(-num_tokens // max(1, -(-num_tokens // most))) or 1


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
