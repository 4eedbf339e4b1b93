"""Rotary position embeddings as transformers computes them, set in Megatron's module."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

KINDS = ("default", "linear", "dynamic", "llama3", "yarn")
"""Supported values of `rope_type`. Dynamic rope equals the default up to `max_position_embeddings`, which no sequence
exceeds."""


@dataclass(frozen=True)
class Rope:
    """A model's rotary position embeddings, from transformers' config.

    Attributes:
        theta: base of the frequencies.
        kind: transformers' `rope_type`, one of `KINDS`.
        parameters: the other entries of its `rope_parameters`, by name.
    """

    theta: float = 10_000.0
    kind: str = "default"
    parameters: tuple[tuple[str, Any], ...] = ()


def frequencies(rope: Rope, width: int, max_sequence_length: int) -> tuple[torch.Tensor, float]:
    """Inverse frequencies, fp32 [width / 2], and the factor on cosines and sines, from transformers' functions.

    Args:
        rope: the kind and its constants.
        width: width of a head.
        max_sequence_length: the model's `max_position_embeddings`.
    """
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(  # every family's frequencies depend on these four alone
        hidden_size=width,
        num_attention_heads=1,
        head_dim=width,
        max_position_embeddings=max_sequence_length,
        rope_parameters={"rope_theta": rope.theta, "rope_type": rope.kind, **dict(rope.parameters)},
    )
    module = LlamaRotaryEmbedding(config)
    return module.inv_freq.clone(), float(module.attention_scaling)  # a plain tensor; Megatron's is not a buffer


def set_rope(chunk: Any, rope: Rope, width: int, max_sequence_length: int) -> None:
    """Sets the frequencies of one of Megatron's GPTModels, and the factor in its config.

    Attention computes YaRN's factor from the config, 0.1 x mscale x ln(scaling) + 1, which with a scaling of e^10 is
    mscale + 1: so any factor can be set, also one that config.json gives explicitly.
    """
    inv_freq, factor = frequencies(rope, width, max_sequence_length)
    module = chunk.rotary_pos_emb
    module.inv_freq = inv_freq.to(module.inv_freq.device)
    if factor != 1.0:
        chunk.config.yarn_rotary_scaling_factor = math.exp(10.0)
        chunk.config.yarn_mscale, chunk.config.yarn_mscale_all_dim = factor - 1.0, 0.0
