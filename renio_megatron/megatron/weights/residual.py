"""Base weights of PiSSA and OLoRA adapters: the model's weights minus the initial adapters.

PEFT computes them from the model whenever it loads such an adapter. PiSSA subtracts the part of the r largest singular
values of W, OLoRA scale x Q_r R_r of W = Q R.
"""

from __future__ import annotations

import functools
from pathlib import Path
from threading import Lock

import torch

from renio_megatron.megatron.weights.peft_config import PeftAdapter, block_of
from renio_megatron.models.architecture import Architecture
from renio_megatron.models.hf_weights import WeightFiles, hf_shapes
from renio_megatron.models.param_map import Slice

_REMEMBERED = 16  # matrices: a thread reads the slices of a parameter one after the other


def residual_of(
    adapter: PeftAdapter | None, weights: Path, architecture: Architecture, device: torch.device
) -> Residual | None:
    """The change of the weights while they are loaded for an adapter; None where they are unchanged.

    Arguments as in `Residual`; an adapter without a `start`, or none, subtracts nothing.
    """
    if adapter is None or adapter.start is None:
        return None
    return Residual(adapter, weights, architecture, device)


class Residual:
    """Slices of weights minus the initial adapters of the whole matrices."""

    def __init__(self, adapter: PeftAdapter, weights: Path, architecture: Architecture, device: torch.device) -> None:
        """Reads nothing yet.

        Args:
            adapter: with a `start`.
            weights: the model's Hugging Face directory.
            architecture: the model.
            device: device of the decompositions of whole matrices.
        """
        assert adapter.start is not None
        self._start, self._lora, self._device = adapter.start, adapter.lora, device
        self._files = WeightFiles(weights)
        self._files.check(architecture)
        self._shapes = hf_shapes(architecture)
        self._matrices = {
            f"model.layers.{layer}.{block_of(target)}.{target}.weight"
            for layer in range(architecture.num_layers)
            for target in adapter.lora.names
        }
        self._lock = Lock()  # slices are read by several threads
        self._removed = functools.lru_cache(_REMEMBERED)(self._factors)

    def __call__(self, one: Slice, values: torch.Tensor) -> torch.Tensor:
        """The values of a slice minus that part, fp32 or better; unchanged where its matrix has no adapter."""
        if one.tensor not in self._matrices:
            return values
        with self._lock:
            left, right = self._removed(one.tensor)
        dtype = torch.promote_types(values.dtype, torch.float32)
        rows, columns = slice(one.start, one.stop), slice(*one.columns or (None,))
        return torch.addmm(values.to(dtype), left[rows].to(dtype), right[:, columns].to(dtype), alpha=-1.0)

    def _factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """[out, r] and [r, in], fp32 on the CPU, whose product is subtracted from a matrix."""
        with self._files.open(self._files.file_of(name)) as handle:
            whole = self._files.read(handle, Slice(name, 0, self._shapes[name][0])).to(self._device, torch.float32)
        r = self._lora.r
        if self._start == "pissa":
            left, values, right = torch.linalg.svd(whole, full_matrices=False)
            return (left[:, :r] * values[:r]).cpu(), right[:r].cpu()
        q, upper = torch.linalg.qr(whole)
        return self._lora.scale * q[:, :r].cpu(), upper[:r].cpu()
