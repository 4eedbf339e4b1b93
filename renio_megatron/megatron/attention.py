"""Core attention on torch's scaled_dot_product_attention: no Transformer Engine, on the CPU and on CUDA."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from torch.nn.functional import scaled_dot_product_attention

from renio_megatron.errors import LayoutError


class SdpaCoreAttention(MegatronModule):
    """Causal attention of one rank's heads, with grouped queries and with a cache of earlier keys.

    Queries are the last positions of the keys' sequence: as many of both in training, fewer while decoding. Rows are
    padded on the right only, so the causal mask is the only one there is.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config)
        if config.context_parallel_size > 1:
            raise LayoutError("context_parallel_size above 1 is not available with this attention; use 1.")
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """Attention output [queries, b, heads x head width] from [queries | keys, b, heads, head width]."""
        queries, keys = query.shape[0], key.shape[0]
        mask = None
        if 1 < queries < keys:
            mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
        # With a single query, every cached key is visible.
        output = scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            attn_mask=mask,
            is_causal=queries == keys and queries > 1,
            scale=self.softmax_scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return output.permute(2, 0, 1, 3).flatten(2).contiguous()
