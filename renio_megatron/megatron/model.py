"""A rank's part of a model: GPTModel on the local spec, its final hidden states, and its LM-head shard.

The model's output layer hands its input through, so a forward pass ends with final hidden states; logits are made from
chosen rows afterwards (`ModelPart.head_logits`), because only completion rows are ever needed. The output layer stays a
module that is called, with its weight an ordinary parameter: DDP waits for parameters in its forward hook.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import set_model_to_sequence_parallel

from renio_megatron.megatron.architecture import Architecture
from renio_megatron.megatron.attention import SdpaCoreAttention
from renio_megatron.parallel.layout import Layout
from renio_megatron.parallel.vocab import VocabShard
from renio_megatron.settings import ParallelConfig


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with Megatron's constructor; marks its weight for sequence parallelism, as Megatron's do."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class _PassThrough:
    """Mixed into the output layer's class, whatever the Megatron version made it: its output is its input."""

    def forward(
        self, input_: torch.Tensor, weight: Any = None, runtime_gather_output: Any = None
    ) -> tuple[torch.Tensor, None]:
        return input_, None


@dataclass
class ModelPart:
    """This rank's stage and shard of a model.

    Attributes:
        module: the GPTModel; its forward ends with hidden states [b, s, H] on the last stage.
        config: Megatron's configuration of it.
        architecture: the whole model's.
        shard: this rank's columns of the LM head.
        layout: this rank's place.
    """

    module: GPTModel
    config: TransformerConfig
    architecture: Architecture
    shard: VocabShard
    layout: Layout

    def head_weight(self) -> torch.Tensor:
        """This rank's rows of the LM head, [L, H]; the embedding's where they are tied. Last stage only."""
        if self.module.share_embeddings_and_output_weights:
            return self.module.shared_embedding_or_output_weight()
        return self.module.output_layer.weight

    def completion_rows(self, output: torch.Tensor, row_index: torch.Tensor) -> torch.Tensor:
        """Final hidden states of chosen positions, as the LM head reads them: [N, H].

        The gradient is summed over the tensor group in backward, as the column-parallel head needs it: by an
        all-reduce, or under sequence parallelism by the reduce-scatter that undoes the gather. The head's own gradient
        needs no sum.

        Args:
            output: what the module returned on the last stage, [b, s, H]; [b, s / tensor ranks, H] under sequence
                parallelism.
            row_index: positions in row-major order over [b, s], int64 [N].
        """
        group = self.layout.tensor.group
        if self.config.sequence_parallel:
            whole = gather_from_sequence_parallel_region(output.transpose(0, 1).contiguous(), group=group)
            return whole.transpose(0, 1).flatten(0, 1)[row_index]
        return copy_to_tensor_model_parallel_region(output.flatten(0, 1)[row_index], group=group)

    def head_logits(self, hidden_rows: torch.Tensor) -> torch.Tensor:
        """This rank's columns of the logits of some rows of `completion_rows`: [N, H] -> [N, L]."""
        return torch.nn.functional.linear(hidden_rows, self.head_weight())

    @property
    def length_multiple(self) -> int:
        """What the padded length of a micro-batch must be a multiple of."""
        return self.layout.tensor.size if self.config.sequence_parallel else 1

    @contextlib.contextmanager
    def decoding(self) -> Iterator[None]:
        """Sequence parallelism off and the model in evaluation mode, for passes over single tokens."""
        was_parallel, was_training = self.config.sequence_parallel, self.module.training
        self.module.eval()
        if was_parallel:
            set_model_to_sequence_parallel(self.module, False)
        try:
            yield
        finally:
            if was_parallel:
                set_model_to_sequence_parallel(self.module, True)
            self.module.train(was_training)


def padded_vocab_size(vocab_size: int, parallel: ParallelConfig) -> int:
    """Columns of all shards together: the smallest multiple of the divisor times the tensor-parallel size.

    >>> padded_vocab_size(17, ParallelConfig(tensor_model_parallel_size=2, make_vocab_size_divisible_by=8))
    32
    """
    multiple = parallel.make_vocab_size_divisible_by * parallel.tensor_model_parallel_size
    return -(-vocab_size // multiple) * multiple


def transformer_config(architecture: Architecture, parallel: ParallelConfig, *, bf16: bool) -> TransformerConfig:
    """Megatron's configuration of a model in a layout."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    return TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_query_groups,
        kv_channels=architecture.kv_channels,
        layernorm_epsilon=architecture.layernorm_epsilon,
        qk_layernorm=architecture.qk_layernorm,
        add_qkv_bias=architecture.add_qkv_bias,
        init_method_std=architecture.init_method_std,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=bf16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        attention_softmax_in_fp32=True,
        use_cpu_initialization=True,  # the same random weights in every layout
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        # Losses are sums; the denominator is applied once, in finalize_model_grads_func.
        calculate_per_token_loss=True,
        # Kernels of apex and Transformer Engine, which this spec does without.
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
    )


def build_model(
    architecture: Architecture,
    layout: Layout,
    parallel: ParallelConfig,
    *,
    vocab_size: int,
    bf16: bool,
    seed: int = 0,
) -> ModelPart:
    """This rank's part of a model, with random weights.

    Args:
        architecture: the whole model.
        layout, parallel: where this rank is.
        vocab_size: V of the loss. A teacher gets the student's, so that both heads are cut at the same edges.
        bf16: parameters and activations in bfloat16 instead of fp32.
        seed: of the random weights; they are the same in every layout.
    """
    config = transformer_config(architecture, parallel, bf16=bf16)
    padded = padded_vocab_size(vocab_size, parallel)
    rng_state = torch.get_rng_state()
    torch.manual_seed(seed)
    module = GPTModel(
        config,
        _block_spec(config),
        vocab_size=padded,
        max_sequence_length=architecture.max_sequence_length,
        pre_process=layout.pipeline.is_first,
        post_process=layout.pipeline.is_last,
        share_embeddings_and_output_weights=architecture.tied,
        position_embedding_type="rope",
        rotary_base=architecture.rotary_base,
        rope_scaling=architecture.rope_scaling_factor is not None,
        rope_scaling_factor=architecture.rope_scaling_factor or 1.0,
    )
    torch.set_rng_state(rng_state)
    module.to(layout.device)
    if module.post_process:
        layer_class = type(module.output_layer)
        module.output_layer.__class__ = type(f"PassThrough{layer_class.__name__}", (_PassThrough, layer_class), {})
    width = padded // layout.tensor.size
    start = layout.tensor.rank * width
    shard = VocabShard(start, start + width, vocab_size, layout.tensor.group)
    return ModelPart(module, config, architecture, shard, layout)


def _block_spec(config: TransformerConfig) -> TransformerBlockSubmodules:
    """Megatron's local spec with our norm and attention put in through its public fields."""
    layer = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization=config.normalization)
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = SdpaCoreAttention
    if config.qk_layernorm:
        attention.q_layernorm = RMSNorm
        attention.k_layernorm = RMSNorm
    layers = [layer] * get_num_layers_to_build(config)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)
