"""Mapping of one tensor rank's Megatron parameters to rows or columns of Hugging Face tensors.

It covers all of `FAMILIES`, and the parameter names of both backends. Nothing here reads a file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from renio_megatron.errors import ConfigError
from renio_megatron.models.architecture import Architecture
from renio_megatron.models.families import experts_of

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")

_IN_LAYER: dict[str, tuple[str, ...]] = {
    "input_layernorm.weight": ("input_layernorm.weight",),
    "pre_mlp_layernorm.weight": ("post_attention_layernorm.weight",),
    # Transformer Engine fuses a norm with the linear layer after it, which then holds the norm's weight.
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

_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}

_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(linear_fc[12])\.weight")
_OUTSIDE: dict[str, tuple[str, ...]] = {
    "embedding.word_embeddings.weight": ("model.embed_tokens.weight",),
    "decoder.final_layernorm.weight": ("model.norm.weight",),
    "output_layer.weight": ("lm_head.weight",),
}

_CUT_BY_COLUMNS = ("self_attention.linear_proj.weight", "linear_fc2.weight")
VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
"""Parameters whose rows are tokens; with padding they may have more rows than the vocabulary."""


def local_name(name: str) -> str:
    """A parameter's name with Megatron's local layers, from its name in either backend.

    >>> local_name("decoder.layers.3.mlp.linear_fc1.layer_norm_weight")
    'decoder.layers.3.pre_mlp_layernorm.weight'
    >>> local_name("output_layer.weight")
    'output_layer.weight'
    """
    match = _LAYER.fullmatch(name)
    if match is None or match[2] not in _FUSED_NORMS:
        return name
    return f"decoder.layers.{match[1]}.{_FUSED_NORMS[match[2]]}"


@dataclass(frozen=True)
class Slice:
    """Rows (and optionally a range of columns) of a Hugging Face tensor, and the parameter rows that they become.

    Attributes:
        tensor: the Hugging Face name.
        start, stop: rows [start, stop) of that tensor; elements of a vector.
        columns: [first, last) of a matrix; None: all.
        to: first row of the parameter.
    """

    tensor: str
    start: int
    stop: int
    columns: tuple[int, int] | None = None
    to: int = 0

    @property
    def num_rows(self) -> int:
        """Rows that are read and written."""
        return self.stop - self.start

    def in_chunks(self, num_rows: int) -> Iterator[Slice]:
        """The same slice as several, each of `num_rows` rows or fewer.

        >>> [(chunk.start, chunk.stop, chunk.to) for chunk in Slice("a", 4, 9, to=1).in_chunks(2)]
        [(4, 6, 1), (6, 8, 3), (8, 9, 5)]
        """
        for start in range(self.start, self.stop, num_rows):
            yield replace(self, start=start, stop=min(start + num_rows, self.stop), to=self.to + start - self.start)


def hf_names(name: str, architecture: Architecture) -> tuple[str, ...]:
    """Hugging Face tensors that a Megatron parameter is made of.

    Args:
        name: Megatron's name, with the global numbers of the layer and the expert.
        architecture: the whole model.

    Raises:
        ConfigError: a parameter without a Hugging Face counterpart.
    """
    match = _LAYER.fullmatch(name)
    if match and architecture.experts is not None:
        names = experts_of(architecture.family)
        router, experts, parts = names.router, names.experts, names.parts
        if match[2] == "mlp.router.weight":
            return (f"model.layers.{match[1]}.{router}",)
        if expert := _EXPERT.fullmatch(match[2]):
            return tuple(f"model.layers.{match[1]}.{experts}.{expert[1]}.{part}.weight" for part in parts[expert[2]])
    if match and match[2] in _IN_LAYER:
        return tuple(f"model.layers.{match[1]}.{part}" for part in _IN_LAYER[match[2]])
    if name == "output_layer.weight" and architecture.tied:
        return _OUTSIDE["embedding.word_embeddings.weight"]
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    raise ConfigError(
        f"Megatron's parameter {name!r} has no counterpart in a Hugging Face {architecture.family} model."
    )


def slices_of(
    name: str,
    architecture: Architecture,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    rank: int,
    size: int,
    num_rows: int,
) -> list[Slice]:
    """The slices that make up one tensor rank's part of a Megatron parameter; together they are all of its rows.

    Query, key and value rows are interleaved by query group: [queries of group g, key g, value g] for each g, and a
    rank has consecutive rows of that: whole groups, where there are enough. Gate and up are cut separately, so that a
    rank has matching rows of both. Padding rows of the vocabulary are in no slice: they are the last ones, `num_rows`
    minus the rows of the slices.

    Args:
        name: Megatron's name, with the global number of the layer.
        architecture: the whole model.
        shapes: shapes of all Hugging Face tensors, from `hf_shapes`.
        rank, size: place on the tensor-parallel axis; for an expert's parameter on the expert-tensor-parallel axis.
        num_rows: rows of this rank's part.
    """
    names = hf_names(name, architecture)
    shape = shapes[names[0]]
    if name in VOCABULARY:
        start, stop = rank * num_rows, min((rank + 1) * num_rows, shape[0])
        return [Slice(names[0], start, stop)] if start < stop else []
    if name.endswith(_CUT_BY_COLUMNS):
        width = shape[1] // size
        return [Slice(names[0], 0, shape[0], columns=(rank * width, (rank + 1) * width) if size > 1 else None)]
    if len(names) == 1:
        return [Slice(names[0], 0, shape[0])]
    num_blocks = architecture.num_query_groups if is_qkv(name) else size
    heights = [shapes[tensor][0] // num_blocks for tensor in names]
    # With fewer groups than ranks, a rank has a part of one: Megatron gathers the group in its forward pass.
    first, last = rank * num_rows, (rank + 1) * num_rows
    slices, row = [], 0
    for block in range(num_blocks):
        for tensor, height in zip(names, heights, strict=True):
            start, stop = max(first, row), min(last, row + height)
            if start < stop:
                offset = block * height - row
                slices.append(Slice(tensor, start + offset, stop + offset, to=start - first))
            row += height
    return slices


def is_expert(name: str) -> bool:
    """Whether a parameter belongs to an expert, which is sharded over other ranks than the rest of its layer."""
    return ".mlp.experts." in name


def is_qkv(name: str) -> bool:
    """Whether a parameter is the weight or bias of queries, keys and values, not the weight of a norm fused into it."""
    return "linear_qkv" in name and "layer_norm" not in name


def is_gate_and_up(name: str) -> bool:
    """Whether a parameter is the weight or bias of the feed-forward network's first layer, not of a fused norm."""
    return "linear_fc1" in name and "layer_norm" not in name
