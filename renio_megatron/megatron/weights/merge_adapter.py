"""A PEFT adapter merged into a model's weights while they are loaded, slice by slice."""

from __future__ import annotations

from pathlib import Path
from threading import Lock
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from renio_megatron.errors import ConfigError
from renio_megatron.megatron.weights.peft import check_names
from renio_megatron.megatron.weights.peft_config import WEIGHTS, read_adapter_config
from renio_megatron.megatron.weights.residual import residual_of
from renio_megatron.models.architecture import Architecture
from renio_megatron.models.finite import require_finite
from renio_megatron.models.hf_weights import hf_shapes
from renio_megatron.models.param_map import Slice

SETTING = "teacher.adapter"


class Merger:
    """Adds scale B A to slices of W: each rank reads the rows of B and the columns of A that it needs."""

    def __init__(
        self, directory: Path, architecture: Architecture, weights: Path, device: torch.device | None = None
    ) -> None:
        """Checks the adapter's description and the shapes of all its tensors; their values are not read.

        Args:
            directory: directory of the adapter.
            architecture: architecture of the teacher.
            weights: the teacher's Hugging Face directory.
            device: device of matrix decompositions, for adapters that need them; None: the CPU.

        Raises:
            ConfigError: no adapter, one of an unsupported kind, or one of another model.
        """
        adapter = read_adapter_config(directory, SETTING)
        self._lora = adapter.lora
        self._residual = residual_of(adapter, weights, architecture, device or torch.device("cpu"))
        try:
            self._file: Any = safe_open(directory / WEIGHTS, "pt")
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{SETTING}: {directory / WEIGHTS} cannot be read: {error}.") from error
        self._lock = Lock()  # the slices are read by several threads
        self._names = set(self._file.keys())
        check_names(directory / WEIGHTS, self._names, architecture.num_layers, self._lora.names, SETTING)
        shapes, r = hf_shapes(architecture), self._lora.r
        for name in self._names:
            tensor = name.removeprefix("base_model.model.").replace(".lora_A.", ".").replace(".lora_B.", ".")
            rows, columns = shapes[tensor]
            wanted = [r, columns] if ".lora_A." in name else [rows, r]
            if (found := list(self._file.get_slice(name).get_shape())) != wanted:
                raise ConfigError(
                    f"{SETTING}: {name} in {directory / WEIGHTS} has the shape {found}, the teacher needs {wanted}. "
                    "It was trained beside another model."
                )

    def __call__(self, one: Slice, values: torch.Tensor) -> torch.Tensor:
        """The values of a slice plus the adapter's part, fp32 or better; unchanged where there is no adapter."""
        down, up = (f"base_model.model.{one.tensor.removesuffix('.weight')}.lora_{which}.weight" for which in "AB")
        if down not in self._names:
            return values
        with self._lock:
            b = self._file.get_slice(up)[one.start : one.stop]
            a = self._file.get_slice(down)[:, slice(*one.columns or (None,))]
        for tensor, name in ((b, up), (a, down)):
            require_finite(tensor, f"{SETTING}: {name}")
        if self._residual is not None:
            values = self._residual(one, values)
        dtype = torch.promote_types(values.dtype, torch.float32)
        return torch.addmm(values.to(dtype), b.to(dtype), a.to(dtype), alpha=self._lora.scale)
