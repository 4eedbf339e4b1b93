"""Megatron's parameters made the long way: whole tensors merged, then cut by Megatron's own partition marks.

What the loader's slices, and every layout's gradients, are compared with.
"""

from __future__ import annotations

import torch


def to_megatron(name, parts, architecture):
    """The whole Megatron tensor from its Hugging Face parts.

    Query, key and value rows are interleaved by query group: [queries of group g, key g, value g] for each g.
    """
    if "linear_qkv" in name and "layer_norm" not in name:
        groups, width = architecture.num_query_groups, architecture.kv_channels
        rows = [part.reshape(groups, -1, width, *part.shape[1:]) for part in parts]
        return torch.cat(rows, dim=1).reshape(-1, *parts[0].shape[1:])
    return torch.cat(parts, dim=0) if len(parts) > 1 else parts[0]


def take_shard(name, whole, parameter, rank, size):
    """One rank's part of a whole Megatron tensor; rows of a vocabulary that the model lacks are zeros.

    Args:
        whole: embedding and head without padding rows.
        parameter: the rank's parameter: its shape and Megatron's partition marks.
        rank, size: place on the tensor axis.
    """
    if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        rows = parameter.shape[0]
        mine = whole[rank * rows : (rank + 1) * rows]
        return torch.nn.functional.pad(mine, (0, 0, 0, rows - mine.shape[0]))
    if size == 1 or not getattr(parameter, "tensor_model_parallel", False):
        return whole
    if "linear_fc1" in name:  # gate and up are cut separately, so that each rank has matching rows of both
        return torch.cat([half.chunk(size, dim=0)[rank] for half in whole.chunk(2, dim=0)], dim=0)
    return whole.chunk(size, dim=parameter.partition_dim)[rank]
