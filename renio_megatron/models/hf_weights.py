"""Weight files of a Hugging Face directory: checking their tensors, and reading one slice at a time."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from renio_megatron.errors import ConfigError
from renio_megatron.models.architecture import Architecture
from renio_megatron.models.finite import require_finite
from renio_megatron.models.hf_index import TensorIndex, View
from renio_megatron.models.param_map import Slice, hf_names

_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_BUFFERS = re.compile(r".*rotary_emb\.inv_freq")  # that old versions of transformers saved; config.json says the same
_MAX_NAMED = 3


def hf_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a model of this architecture has."""
    hidden, width = architecture.hidden_size, architecture.kv_channels
    queries, keys = architecture.num_attention_heads * width, architecture.num_query_groups * width
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        **_feed_forward_shapes(architecture),
    }
    if architecture.add_qkv_bias:
        layer |= {
            "self_attn.q_proj.bias": (queries,),
            "self_attn.k_proj.bias": (keys,),
            "self_attn.v_proj.bias": (keys,),
        }
    if architecture.qk_layernorm:
        layer |= {"self_attn.q_norm.weight": (width,), "self_attn.k_norm.weight": (width,)}
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (architecture.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not architecture.tied:
        shapes["lm_head.weight"] = (architecture.vocab_size, hidden)
    for number in range(architecture.num_layers):
        shapes |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
    return shapes


def _feed_forward_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of one layer's feed-forward network, or of its router and experts."""
    hidden, ffn, experts = architecture.hidden_size, architecture.ffn_hidden_size, architecture.experts
    parameters: dict[str, tuple[int, ...]] = {
        "mlp.linear_fc1.weight": (ffn, hidden),
        "mlp.linear_fc2.weight": (hidden, ffn),
    }
    if experts is not None:
        parameters = {
            f"mlp.experts.local_experts.{number}.{name.removeprefix('mlp.')}": shape
            for number in range(experts.num_experts)
            for name, shape in parameters.items()
        } | {"mlp.router.weight": (experts.num_experts, hidden)}
    layer = "decoder.layers.0."
    return {
        part.removeprefix("model.layers.0."): shape
        for name, shape in parameters.items()
        for part in hf_names(layer + name, architecture)
    }


class WeightFiles:
    """A directory's safetensors files.

    Attributes:
        bytes_read: bytes of all slices read so far, in the files' dtypes; headers are not counted.

    Raises:
        ConfigError: there are no weight files, or one is missing or cannot be read.
    """

    def __init__(self, directory: Path) -> None:
        self._directory, self._index = directory, TensorIndex(directory)
        self._views: dict[str, View] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._item_bytes: dict[str, int] = {}
        self.bytes_read = 0
        self._lock = Lock()

    def check(self, architecture: Architecture) -> None:
        """Raises `ConfigError` for tensors that are missing, differ from config.json, or are unexpected.

        Unexpected tensors without effect are ignored: rotary frequencies, which config.json determines, and the
        LM head of a model whose head is the embedding. Reads the files' headers only.
        """
        shapes = hf_shapes(architecture)
        self._views = self._index.views(
            architecture.family, architecture.experts.num_experts if architecture.experts else 0
        )
        surplus = set(self._views)
        for file in sorted({self.file_of(name) for name in shapes}):
            with self.open(file) as handle:
                found = set(handle.keys())
                surplus |= found - {view.tensor for view in self._views.values()}
                for name in (name for name in shapes if self.file_of(name) == file):
                    if self._views[name].tensor not in found:
                        raise self._missing(name)
                    self._check_tensor(name, handle.get_slice(self._views[name].tensor), shapes[name])
        self._refuse_surplus(surplus - shapes.keys(), architecture)

    def _check_tensor(self, name: str, tensor: Any, expected: tuple[int, ...]) -> None:
        shape, kept_as = self._views[name].shape(tensor.get_shape()), tensor.get_dtype()
        if shape != expected:
            whole = self._views[name].tensor
            part = "" if whole == name else f" for {name}, a part of it"
            raise ConfigError(
                f"{self._directory}: {whole} has the shape {tuple(tensor.get_shape())}, its config.json says "
                f"{expected}{part}. config.json and the weights are not of the same model."
            )
        if kept_as not in _ITEM_BYTES:
            raise ConfigError(
                f"{self._directory}: {name} is kept as {kept_as}; {', '.join(_ITEM_BYTES)} are read. Choose weights "
                "that are not quantized."
            )
        self._shapes[name], self._item_bytes[name] = shape, _ITEM_BYTES[kept_as]

    def _refuse_surplus(self, names: set[str], architecture: Architecture) -> None:
        harmless = {"lm_head.weight"} if architecture.tied else set()
        surplus = sorted(name for name in names - harmless if not _BUFFERS.fullmatch(name))
        if surplus:
            more = f" and {len(surplus) - _MAX_NAMED} more" if len(surplus) > _MAX_NAMED else ""
            raise ConfigError(
                f"{self._directory}: config.json does not ask for {', '.join(map(repr, surplus[:_MAX_NAMED]))}{more}, "
                f"which the weights hold. A {architecture.family} model without them computes something else: "
                "config.json and the weights are not of the same model."
            )

    def size_of(self, one: Slice) -> int:
        """Bytes of a slice; the directory must have passed `check`."""
        width = prod(self._shapes[one.tensor][1:]) if one.columns is None else one.columns[1] - one.columns[0]
        return one.num_rows * width * self._item_bytes[one.tensor]

    def read(self, handle: Any, one: Slice) -> torch.Tensor:
        """A slice as a view of the memory-mapped file: the disk is read, and memory used, when it is copied.

        The disk is read in pages, with read-ahead. For rows that is little more than the slice; for columns, which have
        a piece in most pages, it is nearly the whole tensor, once for all ranks of a host.

        Args:
            handle: the open file that holds the slice's tensor.
            one: the rows, and columns if not all.
        """
        columns = None if one.columns is None else slice(*one.columns)
        values = self._views[one.tensor].read(handle, slice(one.start, one.stop), columns)
        require_finite(values, f"{self._directory}: {self._views[one.tensor].tensor}")
        with self._lock:
            self.bytes_read += values.nbytes
        return values

    def place_of(self, name: str, order: Mapping[str, int]) -> tuple[int, int, int]:
        """Sort key for the position of a tensor in its file; `order` numbers the file's tensors."""
        view = self._views[name]
        return order[view.tensor], view.expert or 0, view.part[0]

    def file_of(self, name: str) -> str:
        """The file that a tensor is in."""
        if name not in self._views:
            raise self._missing(name)
        return self._index.files[self._views[name].tensor]

    def open(self, file: str) -> Any:
        """Opens a file as a safetensors handle, which is a context manager."""
        return self._index.open(file)

    def _missing(self, name: str) -> ConfigError:
        return ConfigError(f"{self._directory}: the weights hold no {name!r}, which config.json asks for.")
