"""The weight files of a Hugging Face directory: what must be in them, and reading one tensor at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from renio_megatron.errors import ConfigError
from renio_megatron.megatron.architecture import Architecture


def hf_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a model of this architecture has."""
    hidden, ffn, width = architecture.hidden_size, architecture.ffn_hidden_size, architecture.kv_channels
    queries, keys = architecture.num_attention_heads * width, architecture.num_query_groups * width
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "mlp.gate_proj.weight": (ffn, hidden),
        "mlp.up_proj.weight": (ffn, hidden),
        "mlp.down_proj.weight": (hidden, ffn),
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


class WeightFiles:
    """A directory's safetensors files.

    Raises:
        ConfigError: none there, one that is missing, or one that cannot be read.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        index = directory / "model.safetensors.index.json"
        if index.is_file():
            try:
                self._files: dict[str, str] = json.loads(index.read_text())["weight_map"]
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(f"{index} cannot be read: {error!r}. Save the model again.") from error
        elif (directory / "model.safetensors").is_file():
            with self._open("model.safetensors") as handle:
                self._files = dict.fromkeys(handle.keys(), "model.safetensors")
        else:
            raise ConfigError(
                f"{directory} holds no model.safetensors (nor an index of several). Save the model with "
                "save_pretrained; pytorch_model.bin is not read."
            )

    def check(self, architecture: Architecture) -> None:
        """Raises `ConfigError` for the first tensor that is missing or not of the shape that config.json says.

        Reads the files' headers only.
        """
        shapes = hf_shapes(architecture)
        for file in sorted({self._file_of(name) for name in shapes}):
            with self._open(file) as handle:
                for name in (name for name in shapes if self._files[name] == file):
                    found = tuple(handle.get_slice(name).get_shape())
                    if found != shapes[name]:
                        raise ConfigError(
                            f"{self._directory}: {name} has the shape {found}, its config.json says {shapes[name]}. "
                            "config.json and the weights are not of the same model."
                        )

    def read(self, name: str) -> torch.Tensor:
        """One whole tensor."""
        with self._open(self._file_of(name)) as handle:
            return handle.get_tensor(name)

    def _file_of(self, name: str) -> str:
        if name not in self._files:
            raise ConfigError(f"{self._directory}: the weights hold no {name!r}, which config.json asks for.")
        return self._files[name]

    def _open(self, file: str) -> Any:
        try:
            return safe_open(self._directory / file, "pt")
        except (SafetensorError, OSError) as error:
            raise ConfigError(
                f"{self._directory / file} cannot be read: {error}. It may be truncated or missing; copy it again."
            ) from error
