"""Megatron's TransformerConfig of a model, from its architecture, layout and training settings."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from renio_megatron.config import ParallelConfig, PrecisionConfig, TrainConfig
from renio_megatron.megatron.model.backend import megatron_settings
from renio_megatron.megatron.model.moe import moe_settings
from renio_megatron.models.architecture import Architecture

WITHOUT_OTHER_PACKAGES: dict[str, Any] = {
    # Kernels of apex and Transformer Engine, which neither spec needs; `build_model` enables the first.
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "apply_rope_fusion": False,
    "persist_layer_norm": False,
}
ALWAYS: dict[str, Any] = {
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "activation_func": torch.nn.functional.silu,
    "add_bias_linear": False,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    # Losses are sums; the denominator is applied once, in finalize_model_grads_func.
    "calculate_per_token_loss": True,
}


def transformer_config(
    architecture: Architecture,
    parallel: ParallelConfig,
    train: TrainConfig,
    precision: PrecisionConfig,
    *,
    trained: bool,
    initialize: bool = True,
    backend: str = "local",
) -> TransformerConfig:
    """Megatron's configuration of a model in a layout; a frozen one is not interleaved and recomputes nothing.

    For `initialize` see `build.build_model`.
    """
    dtype = torch.bfloat16 if train.bf16 else torch.float32
    # Not perform_initialization=False, which also omits the attributes by which gradient norms count shards.
    drawers = ("init_method", "output_layer_init_method", "embedding_init_method")
    quantized = megatron_settings(precision, backend, trained=trained)
    return TransformerConfig(
        **_of_architecture(architecture),
        bf16=train.bf16,
        deterministic_mode=train.deterministic_mode,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        # On the host: the same random weights for every tensor-parallel size. FP8 weights cannot be made there.
        use_cpu_initialization=initialize and not quantized.get("fp8_param", False),
        **({} if initialize else dict.fromkeys(drawers, _leave)),
        **_of_layout(parallel, trained),
        **moe_settings(architecture, parallel),
        # Packed rows differ in length. Megatron allows that with this dispatcher only, even without experts.
        variable_seq_lengths=train.max_tokens_per_micro_batch is not None,
        moe_token_dispatcher_type="alltoall",
        **(_of_recomputation(train) if trained else {}),
        **ALWAYS,
        **WITHOUT_OTHER_PACKAGES,
        **quantized,
    )


def _of_architecture(architecture: Architecture) -> dict[str, Any]:
    keys = (
        *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"),
        *("layernorm_epsilon", "qk_layernorm", "add_qkv_bias", "init_method_std"),
    )
    return {key: getattr(architecture, key) for key in keys}


def _of_layout(parallel: ParallelConfig, trained: bool) -> dict[str, Any]:
    interleaved = parallel.virtual_pipeline_model_parallel_size if trained else None
    keys = (
        *("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size", "sequence_parallel"),
    )
    return {key: getattr(parallel, key) for key in keys} | {
        "virtual_pipeline_model_parallel_size": interleaved,
        # Interleaved stages with batched sends run, and their gradients are silently wrong.
        "overlap_p2p_comm": interleaved is not None,
        "batch_p2p_comm": interleaved is None,
    }


def _of_recomputation(train: TrainConfig) -> dict[str, Any]:
    if train.recompute_granularity is None:
        return {}
    method, num_layers = train.recomputed_layers or (None, None)
    return {
        "recompute_granularity": train.recompute_granularity,
        "recompute_method": method,
        "recompute_num_layers": num_layers,
    }


def _leave(weight: torch.Tensor) -> torch.Tensor:
    """An initializer that draws nothing."""
    return weight
