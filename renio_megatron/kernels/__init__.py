"""The passes over the logits. The implementation is chosen here, once."""

from __future__ import annotations

from renio_megatron.kernels.matmul import add_outer_, project_rows
from renio_megatron.kernels.torch_ops import (
    clamped_sums,
    scale_rows_,
    statistics,
    token_statistics,
    weighted_gradient,
    working_dtype,
)

__all__ = [
    "add_outer_",
    "clamped_sums",
    "project_rows",
    "scale_rows_",
    "statistics",
    "token_statistics",
    "weighted_gradient",
    "working_dtype",
]
