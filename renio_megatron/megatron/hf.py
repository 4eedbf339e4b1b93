"""Weights between Hugging Face directories and Megatron's shards, for dense Llama, Qwen2 and Qwen3.

A Megatron parameter is made of one or several Hugging Face tensors (`recipe`); a rank reads just the tensors that its
parameters need, merges them and keeps its shard. Export runs the same recipes backwards.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch

from renio_megatron.errors import ConfigError
from renio_megatron.megatron.architecture import Architecture
from renio_megatron.megatron.hf_files import WeightFiles
from renio_megatron.megatron.lora import is_adapter
from renio_megatron.megatron.model import ModelPart
from renio_megatron.megatron.te_modules import fill, values_of

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")

_IN_LAYER: dict[str, tuple[str, ...]] = {
    "input_layernorm.weight": ("input_layernorm.weight",),
    "pre_mlp_layernorm.weight": ("post_attention_layernorm.weight",),
    # Where Transformer Engine computes a norm together with the product after it, its weight is that layer's.
    "self_attention.linear_qkv.layer_norm_weight": ("input_layernorm.weight",),
    "mlp.linear_fc1.layer_norm_weight": ("post_attention_layernorm.weight",),
    "self_attention.linear_qkv.weight": tuple(f"self_attn.{x}_proj.weight" for x in "qkv"),
    "self_attention.linear_qkv.bias": tuple(f"self_attn.{x}_proj.bias" for x in "qkv"),
    "self_attention.linear_proj.weight": ("self_attn.o_proj.weight",),
    "self_attention.q_layernorm.weight": ("self_attn.q_norm.weight",),
    "self_attention.k_layernorm.weight": ("self_attn.k_norm.weight",),
    "mlp.linear_fc1.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.linear_fc2.weight": ("mlp.down_proj.weight",),
}

_OUTSIDE: dict[str, tuple[str, ...]] = {
    "embedding.word_embeddings.weight": ("model.embed_tokens.weight",),
    "decoder.final_layernorm.weight": ("model.norm.weight",),
    "output_layer.weight": ("lm_head.weight",),
}


def hf_names(name: str, architecture: Architecture) -> tuple[str, ...]:
    """Hugging Face tensors that a Megatron parameter is made of.

    Args:
        name: Megatron's name, with the layer's number in the whole model.
        architecture: the whole model.

    Raises:
        ConfigError: a parameter without a counterpart.
    """
    match = _LAYER.fullmatch(name)
    if match and match[2] in _IN_LAYER:
        return tuple(f"model.layers.{match[1]}.{part}" for part in _IN_LAYER[match[2]])
    if name == "output_layer.weight" and architecture.tied:
        return _OUTSIDE["embedding.word_embeddings.weight"]
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    raise ConfigError(
        f"Megatron's parameter {name!r} has no counterpart in a Hugging Face {architecture.family} model."
    )


def to_megatron(name: str, parts: list[torch.Tensor], architecture: Architecture) -> torch.Tensor:
    """The whole Megatron tensor from its Hugging Face parts.

    Query, key and value rows are interleaved by query group: [queries of group g, key g, value g] for each g.
    """
    if _is_product(name, "linear_qkv"):
        groups, width = architecture.num_query_groups, architecture.kv_channels
        rows = [part.reshape(groups, -1, width, *part.shape[1:]) for part in parts]
        return torch.cat(rows, dim=1).reshape(-1, *parts[0].shape[1:])
    return torch.cat(parts, dim=0) if len(parts) > 1 else parts[0]


def to_hf(name: str, tensor: torch.Tensor, architecture: Architecture) -> list[torch.Tensor]:
    """The Hugging Face parts of a whole Megatron tensor; undoes `to_megatron`, bit for bit."""
    if _is_product(name, "linear_qkv"):
        groups, width = architecture.num_query_groups, architecture.kv_channels
        queries = architecture.num_attention_heads // groups
        rows = tensor.reshape(groups, queries + 2, width, *tensor.shape[1:])
        return [part.reshape(-1, *tensor.shape[1:]).contiguous() for part in rows.split([queries, 1, 1], dim=1)]
    if _is_product(name, "linear_fc1"):
        return [part.contiguous() for part in tensor.chunk(2, dim=0)]
    return [tensor]


def take_shard(name: str, whole: torch.Tensor, parameter: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """This rank's part of a whole Megatron tensor; rows of a vocabulary that the model lacks are zeros.

    Args:
        name: Megatron's name.
        whole: the whole tensor; embedding and head without padding rows.
        parameter: this rank's parameter: its shape and Megatron's partition marks.
        rank, size: place on the tensor axis.
    """
    if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        rows = parameter.shape[0]
        mine = whole[rank * rows : (rank + 1) * rows]
        return torch.nn.functional.pad(mine, (0, 0, 0, rows - mine.shape[0]))
    if size == 1 or not getattr(parameter, "tensor_model_parallel", False):
        return whole
    if "linear_fc1" in name:  # gate and up are cut separately, so that each rank has matching rows of both
        return torch.cat([half.chunk(size, dim=0)[rank] for half in whole.chunk(2, dim=0)], dim=0)
    return whole.chunk(size, dim=parameter.partition_dim)[rank]  # type: ignore[attr-defined]


def load_weights(part: ModelPart, directory: Path) -> None:
    """Fills this rank's parameters from a Hugging Face directory; adapters stay as they are.

    Raises:
        ConfigError: no safetensors, a tensor missing, or one of another shape.
    """
    files = WeightFiles(directory)
    files.check(part.architecture)
    tensor = part.layout.tensor
    with torch.no_grad():
        for name, parameter in part.named_parameters():
            if is_adapter(name):
                continue
            names = hf_names(name, part.architecture)
            parts = [files.read(hf_name) for hf_name in names]
            shard = take_shard(name, to_megatron(name, parts, part.architecture), parameter, tensor.rank, tensor.size)
            fill(parameter, shard)


def hf_state(part: ModelPart) -> Iterator[tuple[str, torch.Tensor]]:
    """Hugging Face names and tensors of a model that is whole on this rank (one tensor rank, one stage).

    Adapters are left out.
    """
    for name, parameter in part.named_parameters():
        if is_adapter(name):
            continue
        whole = values_of(parameter)
        if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            whole = whole[: part.architecture.vocab_size]
        yield from zip(hf_names(name, part.architecture), to_hf(name, whole, part.architecture), strict=True)


def _is_product(name: str, layer: str) -> bool:
    """Whether a parameter is the weight or bias of a linear layer, not of the norm that came into it."""
    return layer in name and "layer_norm" not in name
