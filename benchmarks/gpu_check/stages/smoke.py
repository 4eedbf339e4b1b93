"""The first minute: does everything import, does one of each kind of call run and come out right, how fast is the
device. What stands here decides whether the other stages are worth their time."""

from __future__ import annotations

import importlib
import importlib.util
import math
import time

import torch

from gpu_check.record import Record
from gpu_check.unit import Setting, Unit, require, seconds
from renio_megatron.megatron.runtime.cudnn import torchs_cudnn

HEAD = (2048, 151936, 2048)
"""Tokens, columns and hidden size of the LM head's products: a chunk of a 1.7B student."""


def units(setting: Setting) -> list[Unit]:
    """What is tried, the most telling first."""
    return [
        Unit("imports", imports),
        Unit("rates", rates),
        Unit("products of an LM head", head_products),
        Unit("losses", losses),
        Unit("passes over the logits", passes),
        Unit("a tiny step", tiny_step),
        Unit("attention", attention),
        Unit("Transformer Engine", transformer_engine),
    ]


def imports(record: Record, setting: Setting) -> None:
    """Seconds of each import, torch being there already; Transformer Engine before Megatron, which imports it, too."""
    for name in ("transformer_engine.pytorch", "megatron.core", "transformers"):
        package = name.partition(".")[0]
        if importlib.util.find_spec(package) is None:
            record.add(f"import {name}", None, "s", why="it is not installed")
            continue
        began = time.monotonic()
        with torchs_cudnn():
            importlib.import_module(name)
        record.add(f"import {name}", time.monotonic() - began, "s")


def rates(record: Record, setting: Setting) -> None:
    """Of a large copy, bytes read and written, and of square products."""
    device, toy = setting.device, setting.toy
    source = torch.randn(1 << (16 if toy else 30), device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    record.add("copy", 2 * source.nbytes / seconds(lambda: target.copy_(source), device), "B/s")
    size = 64 if toy else 8192
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        name = str(dtype).removeprefix("torch.")
        record.add(f"{name} product", 2 * size**3 / seconds(lambda a=a, b=b: a @ b, device, 5), "FLOP/s")


def head_products(record: Record, setting: Setting) -> None:
    """Time and rate of each of the products, and the error of fp32 logits of bf16 factors."""
    from renio_megatron.losses.kernels.matmul import add_outer_, project_rows

    device = setting.device
    rows, width, hidden = (32, 96, 16) if setting.toy else HEAD
    states = torch.randn(rows, hidden, device=device, dtype=torch.bfloat16)
    head = torch.randn(width, hidden, device=device, dtype=torch.bfloat16) * hidden**-0.5
    wide = torch.empty(rows, width, device=device)
    narrow = torch.empty(rows, width, device=device, dtype=torch.bfloat16)
    total = torch.zeros(width, hidden, device=device)
    for name, run in (
        ("fp32 logits", lambda: project_rows(states, head, wide)),
        ("bf16 logits", lambda: project_rows(states, head, narrow)),
        ("head gradient into fp32", lambda: add_outer_(total, narrow, states)),
        ("head gradient in bf16", lambda: torch.mm(narrow.T, states)),
        ("hidden gradient", lambda: torch.mm(narrow, head)),
    ):
        took = seconds(run, device)
        record.add(f"{name}, time", took, "s")
        record.add(f"{name}, rate", 2.0 * rows * width * hidden / took, "FLOP/s")
    exact = states[:8].double() @ head[:4096].double().T
    error = (wide[:8, :4096].double() - exact).norm() / exact.norm()
    require(record, "fp32 logits, error", float(error), 1e-5)


def losses(record: Record, setting: Setting) -> None:
    """Losses and gradients of bf16 logits against the reference in fp64."""
    from renio_megatron import LossConfig, distillation_loss
    from renio_megatron.losses import kernels
    from renio_megatron.objective.reference import reference_objective

    device, rows, width = setting.device, 64, 300 if setting.toy else 151936
    generator = torch.Generator(device).manual_seed(1)
    student, teacher = (
        torch.randn(rows, width, generator=generator, device=device, dtype=torch.bfloat16) for _ in range(2)
    )
    ids = torch.randint(0, width, (rows,), generator=generator, device=device)
    owner = torch.arange(rows, device=device) // 16
    implementation = kernels._implementation((student, teacher)).__name__.rpartition(".")[2]
    if setting.is_cuda and implementation != "triton_ops":
        raise RuntimeError(f"tensors on the GPU are computed by {implementation}, not by the Triton kernels")
    for beta, clip in ((0.0, None), (0.0, 0.05), (0.5, None), (1.0, 0.05)):
        began = time.monotonic()
        leaf, exact = student.clone().requires_grad_(), student.double().requires_grad_()
        out = distillation_loss(leaf, teacher, ids, owner, 4, LossConfig(beta=beta, entry_clip=clip))
        out.loss.backward()
        found = float(out.loss.detach())
        name = f"beta {beta:g}, {'no clip' if clip is None else f'clip {clip:g}'}"
        record.add(f"{name}, first call", time.monotonic() - began, "s", implementation=implementation)
        wanted = reference_objective(exact, teacher.double(), ids, owner, 4, beta=beta, entry_clip=clip)
        wanted["loss"].backward()
        require(record, f"{name}, error of the loss", abs(found / float(wanted["loss"]) - 1), 1e-5)
        if clip is None:  # entries at the bound may fall to either side
            error = (leaf.grad.double() - exact.grad).norm() / exact.grad.norm()
            require(record, f"{name}, error of the gradient", float(error), 2.0**-8)


def passes(record: Record, setting: Setting) -> None:
    """What the passes over given logits take: 8192 tokens, V = 151,936, bf16, forward KL with a clip."""
    from renio_megatron import LossConfig, distillation_loss

    device = setting.device
    rows, width = (32, 300) if setting.toy else (8192, 151936)
    student, teacher = (torch.randn(rows, width, device=device, dtype=torch.bfloat16) for _ in range(2))
    ids, owner = torch.randint(0, width, (rows,), device=device), torch.arange(rows, device=device) * 16 // rows
    weights = torch.ones(16, device=device)

    def run() -> torch.Tensor:
        leaf = student.detach().requires_grad_()
        loss = LossConfig(entry_clip=0.05)
        return distillation_loss(
            leaf, teacher, ids, owner, 16, loss, weights=weights, overwrite_logits=True
        ).loss.detach()

    began = time.monotonic()
    require(record, "finite loss", float(not math.isfinite(float(run()))), 0.0)
    record.add("first call, kernels chosen and compiled", time.monotonic() - began, "s", cuts=_launches(setting))
    took = seconds(run, device, 5)
    record.add("passes over the logits", took, "s")
    record.add("passes, of the 14 B an entry that they must move", 14 * rows * width / took, "B/s")


def _launches(setting: Setting) -> dict[str, str]:
    if not setting.is_cuda:
        return {}
    from renio_megatron.losses.kernels import tuning

    return {str(key): f"{launch.block}/{launch.warps}/{launch.stages}" for key, launch in tuning._fastest.items()}


def attention(record: Record, setting: Setting) -> None:
    """torch's attention with grouped queries: a whole sequence, and one query."""
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    device, length = setting.device, 16 if setting.toy else 320
    query = torch.randn(4, 16, length, 128, device=device, dtype=torch.bfloat16, requires_grad=True)
    key, value = (torch.randn(4, 8, length, 128, device=device, dtype=torch.bfloat16) for _ in range(2))
    sdpa(query, key, value, is_causal=True, enable_gqa=True).sum().backward()
    with torch.no_grad():
        one = seconds(lambda: sdpa(query[:, :, :1], key, value, enable_gqa=True), device)
        whole = seconds(lambda: sdpa(query, key, value, is_causal=True, enable_gqa=True), device)
    record.add("attention, whole", whole, "s")
    record.add("attention, one query", one, "s")


def transformer_engine(record: Record, setting: Setting) -> None:
    """FP8 products of a layer against bf16's, forward and backward; attention of packed rows against torch's."""
    if not setting.is_cuda or importlib.util.find_spec("transformer_engine") is None:
        record.add("Transformer Engine", None, "1", why="it is not there" if setting.is_cuda else "needs a GPU")
        return
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import Float8BlockScaling, Float8CurrentScaling

    layer = te.LayerNormLinear(2048, 6144, bias=False, normalization="RMSNorm", params_dtype=torch.bfloat16).cuda()
    states = torch.randn(4096, 2048, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    plain = layer(states)
    plain.sum().backward()
    record.add("bf16 layer", seconds(lambda: layer(states), setting.device), "s")
    for name, recipe in (("tensorwise", Float8CurrentScaling()), ("blockwise", Float8BlockScaling())):

        def run(recipe=recipe) -> torch.Tensor:
            with te.fp8_autocast(enabled=True, fp8_recipe=recipe):
                return layer(states)

        out = run()
        out.sum().backward()
        require(record, f"FP8 {name}, error", float((out.float() - plain.float()).norm() / plain.float().norm()), 0.1)
        record.add(f"FP8 {name} layer", seconds(run, setting.device), "s")
    lengths = [320, 200, 320]
    edges = torch.tensor([0, *lengths], device="cuda").cumsum(0, dtype=torch.int32)
    query = torch.randn(sum(lengths), 16, 128, device="cuda", dtype=torch.bfloat16)
    key, value = (torch.randn(sum(lengths), 8, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    module = te.DotProductAttention(16, 128, num_gqa_groups=8, qkv_format="thd", attn_mask_type="padding_causal")
    longest = {"max_seqlen_q": max(lengths), "max_seqlen_kv": max(lengths)}
    out = module(query, key, value, cu_seqlens_q=edges, cu_seqlens_kv=edges, **longest)
    heads = [x[: lengths[0]].transpose(0, 1)[None] for x in (query, key, value)]
    wanted = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
    wanted = wanted[0].transpose(0, 1).flatten(1).float()
    error = (out[: lengths[0]].float() - wanted).norm() / wanted.norm()
    require(record, "attention of packed rows, error", float(error), 1e-2)


def tiny_step(record: Record, setting: Setting) -> None:
    """Two steps of the trainer with the smallest models: groups, Megatron, sampler, teacher, optimizer."""
    from step_bench.models import SHAPES
    from step_bench.roles import Step, Workload

    step = Step(SHAPES["tiny"], SHAPES["tiny"], Workload(sequences=4, prompt=16, completion=8), lr=1e-3)
    try:
        for number in (1, 2):
            found = step.run(number)
            record.add(f"tiny step {number}, loss", found.metrics["loss"], "nats/token")
            for phase, figures in found.phases.items():
                record.add(f"tiny step {number}, {phase}", figures.seconds, "s")
    finally:
        step.close()
