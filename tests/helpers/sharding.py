"""What the multi-process tests share: cuts of a vocabulary into shards, and counted collectives."""

from __future__ import annotations

import contextlib
import functools
import inspect

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

VOCABULARY_CUTS = ("equal, padded", "uneven", "one rank all padding", "one rank empty")
PADDING = float("nan")  # whoever reads a padding column shows it


def vocabulary_edges(kind, ranks, vocab):
    """(start, stop) of every rank; stop may lie beyond the vocabulary."""

    def uneven(parts):
        stops = [vocab * (i + 1) * (i + 2) // (parts * (parts + 1)) for i in range(parts)]
        return list(zip([0, *stops[:-1]], stops, strict=True))

    if kind == "equal, padded":
        width = -(-(vocab // ranks + 1) // 8) * 8
        return [(r * width, (r + 1) * width) for r in range(ranks)]
    if kind == "one rank all padding":
        return [*uneven(ranks - 1), (vocab, vocab + 5)]
    if kind == "one rank empty":
        return [(0, 0), *uneven(ranks - 1)]
    return uneven(ranks)


def columns(logits, start, stop):
    """The shard's columns of whole logits, padding filled in."""
    padding = logits.new_full((logits.shape[0], max(0, stop - max(start, logits.shape[1]))), PADDING)
    return torch.cat((logits[:, start:stop], padding), 1)


COLLECTIVES = (
    *("all_gather", "all_gather_coalesced", "all_gather_into_tensor", "all_gather_single", "all_gather_object"),
    *(
        "all_reduce",
        "all_reduce_coalesced",
        "reduce",
        "reduce_scatter",
        "reduce_scatter_tensor",
        "reduce_scatter_single",
    ),
    *("all_to_all", "all_to_all_single", "barrier", "monitored_barrier", "broadcast", "broadcast_object_list"),
    *("gather", "gather_object", "scatter", "scatter_object_list", "batch_isend_irecv"),
    *("isend", "irecv", "send", "recv", "send_object_list", "recv_object_list"),
)


class CountingDispatch(TorchDispatchMode):
    """Counts every communication that reaches PyTorch's dispatcher, however it was called."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.namespace in ("c10d", "_c10d_functional", "_c10d_functional_autograd")
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def counting():
    """Replaces every collective of torch.distributed; yields a list of (name, group, largest contribution in bytes)."""
    calls, originals = [], {name: getattr(dist, name) for name in COLLECTIVES if hasattr(dist, name)}

    def counted(name, original):
        @functools.wraps(original)
        def call(*args, **kwargs):
            bound = inspect.signature(original).bind(*args, **kwargs).arguments
            sent = bound.get("input_tensor", bound.get("input", bound.get("tensor")))
            calls.append((name, bound.get("group"), sent.numel() * sent.element_size() if sent is not None else 0))
            return original(*args, **kwargs)

        return call

    for name, original in originals.items():
        setattr(dist, name, counted(name, original))
    try:
        yield calls
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
