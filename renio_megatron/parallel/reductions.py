"""Sums over the pieces of a sequence (context parallelism) and means over the batch (data parallelism)."""

from __future__ import annotations

import torch
import torch.distributed as dist

from renio_megatron.parallel.layout import ParallelLayout
from renio_megatron.parallel.vocab import gather_in_rank_order


def sum_over_group(values_B: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Sum of additive values, per sequence for example, over the ranks of a group; one collective.

    Args:
        values_B: [B, ...], the same entries in the same order on every rank of the group.
        group: the ranks, for example those that share the sequences; None: this rank alone.
    """
    if group is None or group.size() == 1:
        return values_B
    total = values_B.clone()
    dist.all_reduce(total, group=group)
    return total


def batch_mean(raw_B: torch.Tensor, group: dist.ProcessGroup | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean raw weight and number of sequences over all ranks of the group; one collective.

    Args:
        raw_B: this rank's raw weights; the ranks may have different numbers of sequences, also none.
        group: data-parallel group, without context-parallel ranks; None: the batch is all here.

    Returns:
        (mean, count), fp64 scalars; the mean is 1 where there is no sequence at all.
    """
    # fp64, so that the mean does not depend on how the batch is cut into ranks.
    totals = torch.stack((raw_B.double().sum(), raw_B.new_tensor(raw_B.numel(), dtype=torch.float64)))
    if group is not None and group.size() > 1:
        dist.all_reduce(totals, group=group)
    total, count = totals.unbind()
    return torch.where(count > 0, total / count.clamp(min=1.0), 1.0), count


def group_means(
    raw_B: torch.Tensor, group_size: int, group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean raw weight of each sequence's group of `group_size` neighbors in the global order; one collective.

    The global order is rank after rank. A group may begin on one rank and end on another, so every rank publishes its
    first and last `group_size` raw weights: whatever its offset, its neighbors' share of its first and last group is
    among them. The last group of the batch may be short.

    Args:
        raw_B: this rank's raw weights, fp32 or fp64 [B].
        group_size: sequences of a group, at least 1.
        group: data-parallel group; None: the batch is all here.

    Returns:
        (mean of each local sequence's group, fp64 [B]; sequences of the whole batch, fp64 scalar).
    """
    raw = raw_B.double()
    count = raw.numel()
    ends = raw.new_zeros(1 + 2 * group_size)
    ends[0] = count
    head, tail = raw[:group_size], raw[max(0, count - group_size) :]
    ends[1 : 1 + head.numel()] = head
    ends[1 + group_size : 1 + group_size + tail.numel()] = tail
    gathered = gather_in_rank_order(ends, group).cpu()
    counts = [int(row[0]) for row in gathered]
    rank = 0 if group is None else group.rank()
    offset, total = sum(counts[:rank]), sum(counts)

    missing_before = offset % group_size
    missing_after = min(-(offset + count) % group_size, total - offset - count)
    before = _published(gathered, counts, range(rank), 1 + group_size, group_size)
    after = _published(gathered, counts, range(rank + 1, len(counts)), 1, group_size)
    row = torch.cat((before[before.numel() - missing_before :], raw.cpu(), after[:missing_after]))
    means = torch.cat([chunk.mean().expand(chunk.numel()) for chunk in row.split(group_size)]) if row.numel() else row
    local = means[missing_before : missing_before + count].to(raw_B.device)
    return local, torch.tensor(float(total), dtype=torch.float64, device=raw_B.device)


def _published(gathered: torch.Tensor, counts: list[int], ranks: range, start: int, group_size: int) -> torch.Tensor:
    """The values that `ranks` published from column `start` on, concatenated."""
    parts = [gathered[r, start : start + min(counts[r], group_size)] for r in ranks]
    return torch.cat(parts) if parts else gathered.new_zeros(0)


def gather_batch(values_B: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """The whole batch's per-sequence values in the global order, from equal shares: [B, ...] -> [ranks x B, ...]."""
    return gather_in_rank_order(values_B, group).flatten(0, 1)


def gather_shares(values: torch.Tensor, group: dist.ProcessGroup | None) -> tuple[torch.Tensor, slice]:
    """All ranks' values, rank after rank, from shares of any sizes, and where this rank's are; two collectives.

    Args:
        values: [n of this rank, ...].
        group: ranks that hold the other shares; None: this rank holds all.

    Returns:
        ([sum of n, ...], this rank's rows).
    """
    if group is None or group.size() == 1:
        return values, slice(0, len(values))
    counts = gather_in_rank_order(torch.tensor(len(values), device=values.device), group).tolist()
    padded = values.new_zeros(max(counts), *values.shape[1:])
    padded[: len(values)] = values
    rows = gather_in_rank_order(padded, group)
    start = sum(counts[: group.rank()])
    return torch.cat([row[:count] for row, count in zip(rows, counts, strict=True)]), slice(start, start + len(values))


def sum_over_ranks(values: torch.Tensor, layout: ParallelLayout) -> torch.Tensor:
    """Sum over all ranks of values that are equal on tensor ranks, counted once per tensor group; one collective."""
    total = values.clone() if layout.tensor.is_first else torch.zeros_like(values)
    if layout.world_size > 1:
        dist.all_reduce(total)
    return total
