"""Shapes of published models, random weights for them, and what they must compute."""

from __future__ import annotations

import torch

from renio_megatron.megatron.model.build import ModelPart
from renio_megatron.models.architecture import Architecture
from renio_megatron.models.rope import Rope


def dense(
    family: str, layers: int, hidden: int, ffn: int, heads: int, groups: int, vocab: int, width: int = 128
) -> Architecture:
    """A dense, tied model of this shape, with heads of `width` columns."""
    return Architecture(
        family=family,
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=width,
        layernorm_epsilon=1e-6,
        qk_layernorm=family == "qwen3",
        add_qkv_bias=False,
        init_method_std=0.02,
        vocab_size=vocab,
        tied=True,
        rope=Rope(1e6),
        max_sequence_length=4096,
    )


SHAPES = {
    "tiny": dense("qwen3", 2, 64, 192, 2, 1, 512),
    "qwen3-0.6b": dense("qwen3", 28, 1024, 3072, 16, 8, 151936),
    "qwen3-1.7b": dense("qwen3", 28, 2048, 6144, 16, 8, 151936),
    "qwen3-4b": dense("qwen3", 36, 2560, 9728, 32, 8, 151936),
    "smollm2-135m": dense("llama", 30, 576, 1536, 9, 3, 49152, width=64),
    "smollm2-tiny": dense("llama", 2, 48, 96, 3, 1, 49152, width=16),
}


def random_model(part: ModelPart, seed: int, *, on_host: bool = False) -> ModelPart:
    """Fills a model that was built without weights: matrices by their deviation, norms with 1.

    `on_host` draws on the host, so that every device gets the same weights.
    """
    device = torch.device("cpu") if on_host else part.layout.device
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for _, parameter in part.named_parameters():
            if parameter.dim() > 1:
                dtype = torch.float32 if on_host else parameter.dtype
                drawn = torch.empty(parameter.shape, dtype=dtype, device=device)
                drawn.normal_(0.0, part.architecture.init_method_std, generator=generator)
                parameter.copy_(drawn.to(parameter.dtype))
            else:
                parameter.fill_(1.0)
    return part


def layer_parameters(shape: Architecture) -> int:
    """Entries of the matrices of all decoder layers, embedding and head left out.

    >>> layer_parameters(SHAPES["qwen3-1.7b"])    # 28 x 2048 x (2 x 2048 + 2 x 1024 + 3 x 6144)
    1409286144
    """
    queries, groups = shape.num_attention_heads * shape.kv_channels, shape.num_query_groups * shape.kv_channels
    each = shape.hidden_size * (2 * queries + 2 * groups + 3 * shape.ffn_hidden_size)
    return shape.num_layers * each


def forward_flops(shape: Architecture, sequences: int, length: int, head_rows: int) -> float:
    """Floating-point operations of a forward pass, a product of n x k by k x m counting 2nkm.

    Args:
        shape: of the model.
        sequences, length: what it reads, each sequence seeing itself from its beginning.
        head_rows: positions whose logits are made.

    >>> forward_flops(SHAPES["tiny"], 1, 1, 0) == 2 * layer_parameters(SHAPES["tiny"]) + 2 * 2 * 2 * 256
    True
    """
    tokens = sequences * length
    scores = sequences * length * (length + 1) / 2  # causal
    width = shape.num_attention_heads * shape.kv_channels
    attention = 2 * 2 * scores * width * shape.num_layers
    return 2.0 * tokens * layer_parameters(shape) + attention + 2.0 * head_rows * shape.vocab_size * shape.hidden_size
