"""Collectives that a scheme really makes: calls and bytes of one rank of two, over gloo on the CPU."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from loss_bench.problem import Cell, make_problem, sharded
from loss_bench.schemes import SCHEMES

RANKS = 2
TOKENS, VOCAB = 4096, 64


class Counter(TorchDispatchMode):
    """Counts what reaches torch's dispatcher as communication: calls, and the bytes that this rank contributes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace in ("c10d", "_c10d_functional") and "wait" not in function.name():
            self.calls += 1
            # Gathers name what they write to first.
            sent = args[1] if "gather" in function.name() else args[0]
            tensors = [value for value in tree_flatten(sent)[0] if isinstance(value, torch.Tensor)]
            self.bytes += sum(tensor.nbytes for tensor in tensors)
        return function(*args, **(kwargs or {}))


def rank_results(cell: Cell, group: dist.ProcessGroup, names: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """What each scheme that can be cut over ranks does on this rank, by its name.

    Args:
        cell: of the whole vocabulary; every rank draws the same problem and keeps its columns.
    Returns:
        Loss, this rank's gradient, and calls and bytes forward and backward.
    """
    whole = make_problem(cell, torch.device("cpu"))
    found = {}
    for scheme in SCHEMES:
        if scheme.kind != "logits" or not scheme.shards or scheme.refusal(cell, torch.device("cpu")):
            continue
        if names is not None and scheme.name not in names:
            continue
        problem = sharded(whole, group.rank(), group.size(), group)
        with Counter() as forward:
            loss = scheme.forward(problem)
        with Counter() as backward:
            (gradient,) = torch.autograd.grad(loss, problem.leaves())
        found[scheme.name] = {
            "loss": float(loss.detach()),
            "gradient": gradient,
            "forward_calls": forward.calls,
            "forward_bytes": forward.bytes,
            "backward_calls": backward.calls,
            "backward_bytes": backward.bytes,
        }
    return found


def count(divergences: list[tuple[float, float | None]]) -> list[dict[str, Any]]:
    """Rows of calls and bytes a token for each scheme and each (beta, clip), from a run of two ranks.

    4096 tokens: schemes in chunks call more often with more of them.
    """
    with tempfile.TemporaryDirectory() as name:
        mp.spawn(_rank, args=(divergences, name), nprocs=RANKS)
        return json.loads((Path(name) / "counts.json").read_text())


def _rank(rank: int, divergences: list[tuple[float, float | None]], folder: str) -> None:
    """One of the two ranks; the first one writes what it counted."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    rows = []
    for beta, clip in divergences:
        cell = Cell(TOKENS, VOCAB, tp=RANKS, beta=beta, clip=clip)
        for name, found in rank_results(cell, dist.group.WORLD).items():
            counts = {key: found[key] for key in ("forward_calls", "backward_calls")}
            for way in ("forward", "backward"):
                counts[f"{way}_bytes_per_token"] = found[f"{way}_bytes"] / TOKENS
            rows.append({"scheme": name, "beta": beta, "clip": clip, "tokens": TOKENS, **counts})
    if rank == 0:
        (Path(folder) / "counts.json").write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()
