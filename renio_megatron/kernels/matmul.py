"""Matrix products whose result is wider than their factors: bf16 hidden states and heads, fp32 logits and gradients.

Where the device multiplies bf16 into fp32 it does so in one call. Elsewhere the factors are widened a block at a time,
so that no second copy of an LM head ever exists.
"""

from __future__ import annotations

import functools

import torch

BLOCK_ENTRIES = 1 << 22
"""Entries of a factor that are widened at once, 16 MB in fp32."""


def project_rows(rows: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """`rows` [N, H] times `weight` [L, H] transposed, written to `out` [N, L] and returned.

    `out` has the dtype of both, or is fp32 where they are narrower; the sums are then never rounded to theirs.
    """
    if out.dtype == rows.dtype:
        return torch.mm(rows, weight.T, out=out)
    if _multiplies_into_fp32(rows.device.type, rows.dtype):
        return torch.mm(rows, weight.T, out_dtype=out.dtype, out=out)
    wide = rows.to(out.dtype)
    for block in _blocks(weight):
        torch.mm(wide, weight[block].to(out.dtype).T, out=out[:, block])
    return out


def add_outer_(total: torch.Tensor, gradient: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Adds `gradient` [N, L] transposed times `rows` [N, H] to `total` [L, H], in place, in the dtype of `total`."""
    if total.dtype == gradient.dtype:
        return total.addmm_(gradient.T, rows)
    if _multiplies_into_fp32(rows.device.type, rows.dtype):
        return torch.addmm(total, gradient.T, rows, out_dtype=total.dtype, out=total)
    wide = rows.to(total.dtype)
    for block in _blocks(total):
        total[block].addmm_(gradient[:, block].to(total.dtype).T, wide)
    return total


def _blocks(matrix: torch.Tensor) -> list[slice]:
    """Slices of rows of [L, H] of about `BLOCK_ENTRIES` entries."""
    step = max(1, BLOCK_ENTRIES // max(1, matrix.shape[1]))
    return [slice(start, start + step) for start in range(0, matrix.shape[0], step)]


@functools.cache
def _multiplies_into_fp32(device: str, dtype: torch.dtype) -> bool:
    """Whether a product of two `dtype` matrices can be had in fp32 at once; asked of the device by trying."""
    if device != "cuda":
        return False
    try:
        factor = torch.ones(16, 16, device=device, dtype=dtype)
        total = torch.zeros(16, 16, device=device)
        torch.mm(factor, factor.T, out_dtype=torch.float32, out=total)
        torch.addmm(total, factor.T, factor, out_dtype=torch.float32, out=total)
        return bool((total == 32).all())
    except (RuntimeError, TypeError):  # an older torch
        return False
