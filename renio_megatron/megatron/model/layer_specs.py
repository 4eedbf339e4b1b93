"""Layer specs of the transformer block, one function for each backend: Megatron's specs with few changes."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from renio_megatron.megatron.model.attention import SdpaCoreAttention


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with Megatron's constructor; marks its weight for sequence parallelism as Megatron's norms do."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=device)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def block_spec(config: TransformerConfig, stage: int | None, backend: str) -> TransformerBlockSubmodules:
    """The block of one pipeline stage.

    Args:
        config: configuration of the model.
        stage: index of the chunk in an interleaved pipeline, else None.
        backend: a key of `BACKENDS`.
    """
    layer, norm = BACKENDS[backend](config)
    layers = [layer] * get_num_layers_to_build(config, vp_stage=stage)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm)


def _local(config: TransformerConfig) -> tuple[ModuleSpec, type]:
    """Megatron's local layer with this package's norm and attention set through its public fields, and the final
    norm."""
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization=config.normalization
    )
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = SdpaCoreAttention
    if config.qk_layernorm:
        attention.q_layernorm = RMSNorm
        attention.k_layernorm = RMSNorm
    return layer, RMSNorm


def _te(config: TransformerConfig) -> tuple[ModuleSpec, type]:
    """Megatron's unchanged Transformer Engine layer, its attention included, and the final norm."""
    from megatron.core.extensions.transformer_engine import TENorm

    return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm), TENorm


BACKENDS = {"local": _local, "te": _te}
