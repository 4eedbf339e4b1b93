"""Number of tokens whose logits exist at a time, and the bytes of their buffers: arithmetic without torch."""

from __future__ import annotations

from renio_megatron.errors import LayoutError

LEAST_CHUNK = 2048
"""Tokens of a chunk below which reading the head costs more than the products, and latency dominates the exchanges."""
CHUNK_BYTES = 1 << 30
"""Bytes that the buffers of a chunk may take, where that allows `LEAST_CHUNK` tokens."""


def token_bytes(width: int, hidden_bytes: int, logits_bytes: int, num_models: int = 2) -> int:
    """Buffer bytes for each token of a chunk: both models' logits [L], and the gradient where it is narrower than the
    logits and so cannot take their place.

    Args:
        width: L, columns of this rank.
        hidden_bytes, logits_bytes: bytes of an element of the hidden states and of the logits.
        num_models: 2 for the loss, 1 for scoring, which has no gradient.

    >>> token_bytes(1000, 2, 4), token_bytes(1000, 4, 4), token_bytes(1000, 2, 4, num_models=1)
    (10000, 8000, 4000)
    """
    narrow = hidden_bytes if num_models == 2 and hidden_bytes != logits_bytes else 0
    return width * (num_models * logits_bytes + narrow)


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


def loss_buffer_bytes(
    num_tokens: int, width: int, hidden_bytes: int, logits_bytes: int, chunk_size: int | None = None
) -> int:
    """Bytes that `linear_distillation_loss` takes in addition to its results: logits of both models for a chunk of
    tokens, and the gradient where it is narrower than they are.

    >>> round(loss_buffer_bytes(8192, 151_936, 2, 4) / 2**30, 2)    # 2048 tokens, fp32 logits, bf16 gradient
    2.9
    """
    each = token_bytes(width, hidden_bytes, logits_bytes)
    return min(num_tokens, chunk_size_for(num_tokens, each, chunk_size)) * each
