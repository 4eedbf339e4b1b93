"""Table of the supported model families: defaults, biases, and tensor names in their files.

No torch or transformers here: a recipe is checked against its models before either is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ExpertNames:
    """Names of a layer's router and experts in a Hugging Face directory.

    Attributes:
        router, experts: prefixes below the layer.
        parts: Megatron's name of an expert's matrix -> the tensors whose rows it concatenates.
        count, width: keys of config.json for the number of experts of a layer and the feed-forward width of each.
    """

    router: str
    experts: str
    parts: Mapping[str, tuple[str, ...]]
    count: str
    width: str


@dataclass(frozen=True)
class Family:
    """A `model_type` of config.json.

    Attributes:
        defaults: defaults of keys that layouts depend on and config.json may leave out: those of transformers' config
            class, checked by a test. Without `num_key_value_heads`, there or here, it is the number of attention heads.
        experts: names of its experts; None for a dense family.
        qk_layernorm, add_qkv_bias: as in Megatron's TransformerConfig.
        reads_attention_bias, reads_mlp_bias: whether the keys attention_bias and mlp_bias add biases, which are not
            supported.
    """

    defaults: Mapping[str, Any]
    experts: ExpertNames | None = None
    qk_layernorm: bool = False
    add_qkv_bias: bool = False
    reads_attention_bias: bool = False
    reads_mlp_bias: bool = False


_LAYERS = {"num_attention_heads": 32, "num_hidden_layers": 32}
_QWEN3_EXPERTS = ExpertNames(
    "mlp.gate.weight",
    "mlp.experts",
    {"linear_fc1": ("gate_proj", "up_proj"), "linear_fc2": ("down_proj",)},
    count="num_experts",
    width="moe_intermediate_size",
)
_MIXTRAL_EXPERTS = ExpertNames(
    "block_sparse_moe.gate.weight",
    "block_sparse_moe.experts",
    {"linear_fc1": ("w1", "w3"), "linear_fc2": ("w2",)},
    count="num_local_experts",
    width="intermediate_size",
)

FAMILIES: Mapping[str, Family] = {
    "llama": Family(_LAYERS, reads_attention_bias=True, reads_mlp_bias=True),
    "qwen2": Family({**_LAYERS, "num_key_value_heads": 32}, add_qkv_bias=True),
    "qwen3": Family({**_LAYERS, "num_key_value_heads": 32}, qk_layernorm=True, reads_attention_bias=True),
    "qwen3_moe": Family(
        {
            "num_attention_heads": 32,
            "num_hidden_layers": 24,
            "num_key_value_heads": 4,
            "num_experts": 128,
            "moe_intermediate_size": 768,
        },
        experts=_QWEN3_EXPERTS,
        qk_layernorm=True,
        reads_attention_bias=True,
    ),
    "mixtral": Family(
        {**_LAYERS, "num_key_value_heads": 8, "num_local_experts": 8, "intermediate_size": 14336},
        experts=_MIXTRAL_EXPERTS,
    ),
}
"""`model_type` of config.json -> family."""

MOE_FAMILIES = tuple(name for name, family in FAMILIES.items() if family.experts is not None)


def experts_of(family: str) -> ExpertNames:
    """Tensor names of the experts, for families with experts."""
    names = FAMILIES[family].experts
    assert names is not None
    return names
