"""Which attention Transformer Engine chooses here, and what the candidates take: `python -m gpu_check.attention`.

Under NVTE_DEBUG=1 NVTE_DEBUG_LEVEL=2 Transformer Engine says what it leaves out; that is read by the stage. Prints JSON
in its last line: candidate -> seconds of forward and backward, bytes beyond the inputs, error beside fp32.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from gpu_check.unit import seconds
from renio_megatron.megatron.model.backend import te_problem

HEADS, GROUPS, WIDTH = 16, 8, 128
LENGTHS = (511,) * 12 + (640, 300, 700, 404)
"""Of a packed row of 8176 tokens."""
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def main() -> None:
    """Measures every candidate that is there."""
    found: dict[str, Any] = {}
    te_problem()  # imports Transformer Engine as the product does
    torch.manual_seed(0)
    tokens = sum(LENGTHS)
    row = tuple(
        torch.randn(tokens, heads, WIDTH, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for heads in (HEADS, GROUPS, GROUPS)
    )
    with torch.no_grad():
        exact = a_sequence_at_a_time(*(x.float() for x in row))
    edges = torch.tensor([0, *itertools.accumulate(LENGTHS)], device="cuda", dtype=torch.int32)
    for name, make in (
        ("Transformer Engine, packed row", lambda: packed_by_te(edges)),
        ("torch, a sequence at a time", lambda: a_sequence_at_a_time),
        ("torch, varlen_attn", lambda: packed_by_torch(edges)),
    ):
        try:
            found[name] = measured(make(), row, exact)
        except Exception as error:  # the others still have something to say
            found[name] = {"error": f"{type(error).__name__}: {error}"[:500]}
    try:
        found["Transformer Engine, decoding"] = decoding_by_te()
    except Exception as error:
        found["Transformer Engine, decoding"] = {"error": f"{type(error).__name__}: {error}"[:500]}
    print(json.dumps(found))


def measured(attend: Callable[..., torch.Tensor], row: Tensors, exact: torch.Tensor) -> dict[str, float]:
    """Seconds of forward and of both, bytes beyond inputs and gradients, relative error of the output."""

    def both() -> None:
        out = attend(*row)
        torch.autograd.grad(out.float().square().sum(), row)

    out = attend(*row).detach()
    error = float((out.float().reshape(exact.shape) - exact).norm() / exact.norm())
    with torch.no_grad():
        forward = seconds(lambda: attend(*row), row[0].device, 5)
    took = seconds(both, row[0].device, 5)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    both()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in row)
    return {"forward": forward, "both": took, "bytes": peak, "error": error}


def packed_by_te(edges: torch.Tensor) -> Callable[..., torch.Tensor]:
    """As Megatron calls it for a packed row."""
    import transformer_engine.pytorch as te

    module = te.DotProductAttention(
        HEADS, WIDTH, num_gqa_groups=GROUPS, attention_dropout=0.0, qkv_format="thd", attn_mask_type="padding_causal"
    )
    shared = {
        "cu_seqlens_q": edges,
        "cu_seqlens_kv": edges,
        "max_seqlen_q": max(LENGTHS),
        "max_seqlen_kv": max(LENGTHS),
    }
    return lambda q, k, v: module(q, k, v, **shared).view(-1, HEADS, WIDTH)


def a_sequence_at_a_time(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """As our local layers compute it."""
    heads_first = [x.transpose(0, 1)[None].split(LENGTHS, dim=2) for x in (query, key, value)]
    outputs = [
        sdpa(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1) for q, k, v in zip(*heads_first, strict=True)
    ]
    return torch.cat(outputs)


def packed_by_torch(edges: torch.Tensor) -> Callable[..., torch.Tensor]:
    """torch's own varlen attention; keys and values repeated for each query head, which it asks for."""
    from torch.nn.attention.varlen import varlen_attn

    longest = max(LENGTHS)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = (x.repeat_interleave(HEADS // GROUPS, dim=1) for x in (k, v))
        return varlen_attn(q, k, v, edges, edges, longest, longest, window_size=(-1, 0))

    return attend


def decoding_by_te() -> dict[str, float]:
    """One query of 16 rows after 512 keys, as Megatron's static cache gives them; torch's attention beside it."""
    import transformer_engine.pytorch as te

    query = torch.randn(1, 16, HEADS, WIDTH, device="cuda", dtype=torch.bfloat16)
    key, value = (torch.randn(512, 16, GROUPS, WIDTH, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    module = te.DotProductAttention(
        HEADS, WIDTH, num_gqa_groups=GROUPS, attention_dropout=0.0, qkv_format="sbhd", attn_mask_type="no_mask"
    )
    first = [x.permute(1, 2, 0, 3) for x in (query, key, value)]
    with torch.no_grad():
        return {
            "forward": seconds(lambda: module(query, key, value), query.device),
            "by torch": seconds(lambda: sdpa(*first, enable_gqa=True), query.device),
        }


if __name__ == "__main__":
    main()
