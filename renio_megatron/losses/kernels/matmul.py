"""Matrix products with bf16 factors (hidden states, heads) and fp32 results (logits, gradients).

Where the device multiplies bf16 into fp32 this is one call. Elsewhere the factors are cast one block at a time, so that
no second copy of an LM head ever exists.
"""

from __future__ import annotations

import functools
import logging

import torch

_log = logging.getLogger(__name__)

BLOCK_ENTRIES = 1 << 22
"""Entries of a factor that are cast at once, 16 MB in fp32."""


def project_rows(rows: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """`rows` [N, H] times `weight` [L, H] transposed, written to `out` [N, L] and returned.

    `out` has the dtype of both, or is fp32 where they are narrower; the sums are then never rounded to their dtype.

    Raises:
        RuntimeError: the device fails (out of memory, an earlier fault), or multiplies wrongly.
    """
    if out.dtype == rows.dtype:
        return torch.mm(rows, weight.T, out=out)
    if _multiplies_into_fp32(rows):
        return torch.mm(rows, weight.T, out_dtype=out.dtype, out=out)
    wide = rows.to(out.dtype)
    for block in _blocks(weight):
        torch.mm(wide, weight[block].to(out.dtype).T, out=out[:, block])
    return out


def add_outer_(total: torch.Tensor, gradient: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Adds `gradient` [N, L] transposed times `rows` [N, H] to `total` [L, H], in place, in the dtype of `total`.

    Raises:
        RuntimeError: the device fails (out of memory, an earlier fault), or multiplies wrongly.
    """
    if total.dtype == gradient.dtype:
        return total.addmm_(gradient.T, rows)
    if _multiplies_into_fp32(rows):
        return torch.addmm(total, gradient.T, rows, out_dtype=total.dtype, out=total)
    wide = rows.to(total.dtype)
    for block in _blocks(total):
        total[block].addmm_(gradient[:, block].to(total.dtype).T, wide)
    return total


def _blocks(matrix: torch.Tensor) -> list[slice]:
    """Slices of rows of [L, H] of about `BLOCK_ENTRIES` entries."""
    step = max(1, BLOCK_ENTRIES // max(1, matrix.shape[1]))
    return [slice(start, start + step) for start in range(0, matrix.shape[0], step)]


_REFUSALS = ("out_dtype", "CUBLAS_STATUS_NOT_SUPPORTED", "CUBLAS_STATUS_ARCH_MISMATCH")
"""Texts of a RuntimeError that mean "unsupported", not a failure: torch's own checks of such a product all name
`out_dtype`; cuBLAS returns one of two statuses on an old GPU. A failure contains none of these."""


def _multiplies_into_fp32(rows: torch.Tensor) -> bool:
    """Whether the device of `rows` multiplies two matrices of its dtype into fp32 in one call."""
    return _is_on_cuda(rows) and _has_fp32_product(rows.device, rows.dtype)


def _is_on_cuda(rows: torch.Tensor) -> bool:
    return rows.device.type == "cuda"


@functools.cache
def _has_fp32_product(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a CUDA device multiplies `dtype` into fp32; cached, with a warning where it does not.

    torch's declared overloads are checked first, which no state of the device can falsify: an older torch has no such
    overload, and there is none for other dtypes. A build may declare it and still refuse (no kernel for its backend,
    an old GPU), so it is also tried. Any other error is raised and not cached: a device that was out of memory once
    must be tried again, or the run would keep the slow path for good.

    Raises:
        RuntimeError: the device fails, or multiplies wrongly.
    """
    why: object = "it has no mm and addmm with out_dtype for this dtype"
    declared = all("dtype_out" in operator.overloads() for operator in (torch.ops.aten.mm, torch.ops.aten.addmm))
    if declared and dtype in (torch.bfloat16, torch.float16):
        try:
            _try_fp32_product(device, dtype)
            return True
        except (TypeError, NotImplementedError) as error:
            why = error
        except RuntimeError as error:
            is_refusal = not isinstance(error, torch.cuda.OutOfMemoryError) and any(s in str(error) for s in _REFUSALS)
            if not is_refusal:
                raise
            why = error
    reason = str(why).splitlines()[0][:200]
    _log.warning(
        "torch %s does not multiply %s into float32 on %s (%s): LM heads are widened a block at a time, "
        "which is slower.",
        *(torch.__version__, dtype, device, reason),
    )
    return False


def _try_fp32_product(device: torch.device, dtype: torch.dtype) -> None:
    """Runs both products on small matrices of ones. Their sum must be exact; reading it also reveals earlier faults."""
    factor = torch.ones(16, 16, device=device, dtype=dtype)
    total = torch.zeros(16, 16, device=device)
    torch.mm(factor, factor.T, out_dtype=torch.float32, out=total)
    torch.addmm(total, factor.T, factor, out_dtype=torch.float32, out=total)
    if not bool((total == 32).all()):
        raise RuntimeError(
            f"{device} multiplies {dtype} into float32 wrongly: 16 + 16 products of ones are {total.flatten()[0]} "
            "instead of 32. The device or its driver is broken; nothing computed on it can be trusted."
        )
