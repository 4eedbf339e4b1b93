"""Passes over the logits, and the choice between their Triton and PyTorch implementations.

Tensors on CUDA go to the Triton kernels where Triton is installed and has what the call needs (`triton_ops.obstacle`);
all others to plain PyTorch. `RENIO_KERNELS=torch` or `triton` overrides the choice; `triton` on the CPU needs
`TRITON_INTERPRET=1`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar

import torch

from renio_megatron.errors import ConfigError
from renio_megatron.losses.kernels import torch_ops
from renio_megatron.losses.kernels.matmul import add_outer_, project_rows
from renio_megatron.losses.kernels.torch_ops import working_dtype
from renio_megatron.objective.divergences import Divergence

__all__ = [
    "add_outer_",
    "clamped_sums",
    "project_rows",
    "scale_rows_",
    "statistics",
    "sums_and_gradient",
    "token_statistics",
    "tunes",
    "weighted_gradient",
    "working_dtype",
]

Function = TypeVar("Function", bound=Callable[..., torch.Tensor])


def _dispatched(function: Function) -> Function:
    """A function of `torch_ops` that, where its arguments allow it, is the one of that name in `triton_ops`."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> torch.Tensor:
        return getattr(_implementation((*args, *kwargs.values())), function.__name__)(*args, **kwargs)

    return call  # type: ignore[return-value]


def _implementation(arguments: tuple[Any, ...]) -> ModuleType:
    """`triton_ops` or `torch_ops`.

    Raises:
        ConfigError: RENIO_KERNELS is neither, or selects kernels that cannot take the arguments.
    """
    wanted = os.environ.get("RENIO_KERNELS", "")
    if wanted not in ("", "torch", "triton"):
        raise ConfigError(f"RENIO_KERNELS must be torch or triton, or unset; got {wanted!r}.")
    matrices = [x for x in arguments if isinstance(x, torch.Tensor) and x.ndim == 2 and x.is_floating_point()]
    on_cuda = bool(matrices) and all(x.device.type == "cuda" for x in matrices)
    if wanted == "torch" or not (wanted or on_cuda):
        return torch_ops
    triton_ops = _triton_ops()
    if triton_ops is None:
        why: str | None = "triton is not installed (it is part of PyTorch's CUDA builds on Linux)"
    else:
        why = triton_ops.obstacle(matrices, [x for x in arguments if isinstance(x, Divergence)])
    if why is not None and wanted:
        raise ConfigError(f"RENIO_KERNELS=triton, but the kernels cannot run: {why}. Unset it, or set it to torch.")
    return torch_ops if triton_ops is None or why is not None else triton_ops


def tunes(device: torch.device) -> bool:
    """Whether these functions time their kernels at their first large calls on `device`.

    >>> tunes(torch.device("cpu"))
    False
    """
    is_wanted = device.type == "cuda" and os.environ.get("RENIO_KERNELS") != "torch"
    return is_wanted and not torch.are_deterministic_algorithms_enabled() and _triton_ops() is not None


@functools.cache
def _triton_ops() -> ModuleType | None:
    """The module `triton_ops`, imported at first use; None where Triton is not installed."""
    try:
        from renio_megatron.losses.kernels import triton_ops
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "triton":
            raise
        return None
    return triton_ops


clamped_sums = _dispatched(torch_ops.clamped_sums)
scale_rows_ = _dispatched(torch_ops.scale_rows_)
statistics = _dispatched(torch_ops.statistics)
sums_and_gradient = _dispatched(torch_ops.sums_and_gradient)
token_statistics = _dispatched(torch_ops.token_statistics)
weighted_gradient = _dispatched(torch_ops.weighted_gradient)
