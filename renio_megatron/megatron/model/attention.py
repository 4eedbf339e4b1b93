"""Core attention on torch's scaled_dot_product_attention: no Transformer Engine, on the CPU and on CUDA.

Each sequence attends to itself only. Rows are padded on the right, so only the causal mask is needed; packed sequences
are processed one by one; and under context parallelism the keys and values of the whole row are gathered, in the
sequences' own order, while each rank keeps its own queries.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from torch.nn.functional import scaled_dot_product_attention

from renio_megatron.parallel.context import natural_order


@dataclass
class Packing(PackedSeqParams):
    """Megatron's description of a row of packed sequences; also keeps the boundaries as numbers on the CPU."""

    boundaries: tuple[int, ...] = ()


def packing_of(boundaries: Sequence[int], device: torch.device) -> Packing:
    """The description of a row whose sequences begin at `boundaries`, the last of which is the row's length."""
    cumulative = torch.tensor(boundaries, dtype=torch.int32, device=device)
    longest = max(_lengths(boundaries))
    return Packing(
        qkv_format="thd",
        cu_seqlens_q=cumulative,
        cu_seqlens_kv=cumulative,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        boundaries=tuple(boundaries),
    )


class SdpaCoreAttention(MegatronModule):
    """Causal attention of one rank's heads, with grouped queries and with a cache of earlier keys."""

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
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Packing | None = None,
    ) -> torch.Tensor:
        """Attention output: [queries, b, heads x head width], or [queries, heads, head width] of a packed row.

        Args:
            query, key, value: [queries | keys, b, heads, head width], or [queries | keys, heads, head width] of packed
                sequences. Under context parallelism this rank's positions. While decoding, queries are the last
                positions of the keys' sequence.
            packed_seq_params: boundaries of the packed sequences.
        """
        is_packed = packed_seq_params is not None
        if is_packed:
            query, key, value = (tensor.unsqueeze(1) for tensor in (query, key, value))
        if self.config.context_parallel_size > 1:
            output = self._context_parallel(query, key, value, packed_seq_params)
        elif packed_seq_params is not None:
            lengths = _lengths(packed_seq_params.boundaries)
            # Split, not sliced: the gradient of n slices would be a sum of n whole rows.
            pieces = zip(*(_heads_first(one).split(lengths, dim=2) for one in (query, key, value)), strict=True)
            output = torch.cat([self._attend(*piece) for piece in pieces])
        else:
            output = self._attend(*map(_heads_first, (query, key, value)))
        return output.squeeze(1) if is_packed else output.flatten(2)

    def _context_parallel(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packing: Packing | None
    ) -> torch.Tensor:
        """As `_attend`, where this rank has chunks r and 2 x ranks - 1 - r of every sequence."""
        group = parallel_state.get_context_parallel_group()
        size, rank = group.size(), group.rank()
        boundaries = (0, len(query) * size) if packing is None else packing.boundaries
        both = _GatherSequence.apply(torch.stack((key, value), dim=1), group)
        key, value = both[natural_order(boundaries, size).to(query.device)].unbind(1)
        lengths = _lengths(boundaries)
        chunks = [length // (2 * size) for length in lengths]
        queries = iter(_heads_first(query).split([chunk for chunk in chunks for _ in range(2)], dim=2))
        outputs = []
        for chunk, *whole in zip(
            chunks, *(_heads_first(one).split(lengths, dim=2) for one in (key, value)), strict=True
        ):
            for number in (rank, 2 * size - 1 - rank):
                seen = [one[:, :, : (number + 1) * chunk] for one in whole]
                outputs.append(self._attend(next(queries), *seen))
        return torch.cat(outputs)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attention of queries that are the last positions of the keys' sequence, [queries, b, heads, head width].

        Args:
            query, key, value: [b, heads, queries | keys, head width].
        """
        queries, keys = query.shape[2], key.shape[2]
        mask = None
        if 1 < queries < keys:
            mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
        # With a single query, every key is visible.
        output = scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=queries == keys and queries > 1,
            scale=self.softmax_scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return output.permute(2, 0, 1, 3).contiguous()


def _lengths(boundaries: Sequence[int]) -> list[int]:
    return [stop - start for start, stop in itertools.pairwise(boundaries)]


def _heads_first(tensor: torch.Tensor) -> torch.Tensor:
    """[positions, b, heads, head width] -> [b, heads, positions, head width], a view."""
    return tensor.permute(1, 2, 0, 3)


class _GatherSequence(torch.autograd.Function):
    """All-gather of the ranks' positions, rank after rank; backward sums the gradients of this rank's positions."""

    @staticmethod
    def forward(context: Any, local: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        context.group = group
        pieces = [torch.empty_like(local) for _ in range(group.size())]
        dist.all_gather(pieces, local.contiguous(), group=group)
        return torch.cat(pieces)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        pieces = list(gradient.contiguous().chunk(context.group.size()))
        mine = torch.empty_like(pieces[0])
        dist.reduce_scatter(mine, pieces, group=context.group)
        return mine, None
