"""The families of models that are supported, in one table: what is special about each, and what its files call things.

No torch and no transformers here: a recipe is checked against its models before either is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ExpertNames:
    """What a layer with experts is called in a Hugging Face directory.

    Attributes:
        router, experts: below the layer.
        parts: of an expert, by Megatron's name, whose rows they are one after the other.
        count, width: keys of config.json: experts of a layer, and columns of each.
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
        defaults: what config.json may leave out of what layouts depend on: the numbers of transformers' own class, with
            which a test compares them. One without `num_key_value_heads`, there or here, has as many as it has
            attention heads.
        experts: names of its experts; None for a dense family.
        qk_layernorm, add_qkv_bias: as in Megatron's TransformerConfig.
        reads_attention_bias, reads_mlp_bias: whether the keys attention_bias and mlp_bias add biases, which are not
            built.
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
"""By `model_type`."""

MOE_FAMILIES = tuple(name for name, family in FAMILIES.items() if family.experts is not None)


def experts_of(family: str) -> ExpertNames:
    """Names of the experts of a family that has some."""
    names = FAMILIES[family].experts
    assert names is not None
    return names
