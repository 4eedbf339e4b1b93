"""Each kernel, and the fused loss, against fp64: the cases of `tests/losses/triton_cases.py` on this device, then whole
vocabularies."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import partial
from typing import Any

import torch

from gpu_check.machine import ROOT
from gpu_check.record import Record
from gpu_check.unit import Setting, Unit, Wrong, require, seconds

LIMITS = {"loss": 1e-5, "bfloat16": 2.0**-8, "float32": 1e-5, "linear": 2.0**-7}
"""Relative errors: of a loss; of a gradient that is rounded to 16 bits, of one that is not, and of one that is a
product of rounded numbers, itself rounded."""
ONLY_KERNELS = ("rows without weight",)
"""What the passes in PyTorch do not promise: they read rows of weight 0."""
BEYOND = ((0.0, 0.05), (0.3, None))
"""(beta, clip) of the losses that are tried with offsets beyond 32 bits."""
SANITIZER_SECONDS = 30


def units(setting: Setting) -> list[Unit]:
    """Whole vocabularies first: what a training step asks for."""
    from tests.losses import triton_cases

    at_size = [Unit(cell.title, partial(exact, cell=cell)) for cell in cells(setting)]
    names = [name for name in triton_cases.GROUPS if setting.is_cuda or name not in ONLY_KERNELS]
    groups = [Unit(name, partial(group, name=name)) for name in names]
    last = [Unit("offsets beyond 32 bits", beyond), Unit("memory checker", checker)]
    return [*at_size[:2], Unit("scores with entropies", scores), *groups, *at_size[2:], *last]


def cells(setting: Setting) -> list[Any]:
    """Few tokens of a whole vocabulary, over logits and from hidden states: too few for a choice of block sizes, which
    would compile six variants of every kernel."""
    import dataclasses

    from loss_bench.problem import Cell

    tokens, vocab, hidden, teacher = (32, 300, 16, 24) if setting.toy else (256, 151936, 2048, 2560)
    found = []
    for beta, clip in ((0.0, 0.05), (0.5, None), (0.0, None), (1.0, 0.05)):
        cell = Cell(tokens, vocab, 1, beta, clip, torch.bfloat16)
        found += [dataclasses.replace(cell, hidden=hidden, teacher_hidden=teacher, trained=True), cell]
    found.append(Cell(tokens, vocab, 1, 0.0, 0.05, torch.float32))
    return found


def exact(record: Record, setting: Setting, cell: Any) -> None:
    """Errors of our forms of the loss for one problem. bf16 logits are rounded logits, and are measured without a
    limit."""
    from loss_bench import measure
    from loss_bench.exact import Exact
    from loss_bench.problem import make_problem
    from loss_bench.schemes import FUSED, OURS

    problem = make_problem(cell, setting.device)
    answer = Exact(problem)
    for scheme in FUSED.values() if cell.hidden else (OURS,):
        if scheme.refusal(cell, setting.device) is not None:
            continue
        loss, gradients = measure.run_once(scheme, measure.working_copy(scheme, problem))
        errors = answer.errors(float(loss), gradients, weighted=scheme.weights != "none")
        name, dtype = f"{cell.title}, {scheme.name}", str(cell.dtype).removeprefix("torch.")
        if "bf16 logits" in scheme.name:
            record.add(f"{name}, error of the loss", errors.loss, "1")
            record.add(f"{name}, error of the gradient", errors.gradient, "1")
            continue
        require(record, f"{name}, error of the loss", errors.loss, LIMITS["loss"])
        require(record, f"{name}, error of the gradient", errors.gradient, LIMITS["linear" if cell.hidden else dtype])


def scores(record: Record, setting: Setting) -> None:
    """A scoring pass over an LM head, with entropies and without: errors beside fp64, and times."""
    from renio_megatron.config import HeadConfig
    from renio_megatron.losses.token_logp import linear_token_scores
    from renio_megatron.parallel.vocab import LmHead, VocabShard

    tokens, vocab, hidden_size = (32, 300, 16) if setting.toy else (2048, 151936, 2048)
    generator = torch.Generator(setting.device).manual_seed(1)
    draw = partial(torch.randn, generator=generator, device=setting.device, dtype=torch.bfloat16)
    hidden, head = draw(tokens, hidden_size), draw(vocab, hidden_size) * hidden_size**-0.5
    ids = torch.randint(0, vocab, (tokens,), generator=generator, device=setting.device)
    given = (hidden, LmHead(head, VocabShard(0, vocab, vocab)), ids, HeadConfig(logits_dtype="fp32"))
    found = linear_token_scores(*given, with_entropy=True)
    few = slice(0, 64)
    exact = (hidden[few].double() @ head.double().T).log_softmax(-1)
    assert found.entropy is not None
    for name, mine, truth in (
        ("log p", found.logp[few], exact.gather(1, ids[few, None])[:, 0]),
        ("entropy", found.entropy[few], -(exact.exp() * exact).sum(-1)),
    ):
        error = (mine.double() - truth).abs().max() / truth.abs().max()
        require(record, f"scores, error of {name}", float(error), 1e-5)
    for name, is_wanted in (("scores", False), ("scores with entropies", True)):
        took = seconds(lambda wanted=is_wanted: linear_token_scores(*given, with_entropy=wanted), setting.device, 5)
        record.add(f"{name}, time", took, "s", tokens=tokens, vocab=vocab, hidden=hidden_size)


def group(record: Record, setting: Setting, name: str) -> None:
    """How many comparisons of a group there were, and the largest share of its limit that one took."""
    from tests.losses import triton_cases

    _judge(record, name, list(triton_cases.GROUPS[name]()))


def beyond(record: Record, setting: Setting) -> None:
    """So many rows that offsets pass 2^31, with block sizes chosen by their time."""
    from tests.losses import triton_cases

    if not setting.is_cuda or torch.cuda.mem_get_info()[0] < triton_cases.FREE_BYTES:
        record.add("offsets beyond 32 bits, comparisons", None, "1", why="needs a GPU with 20 GB free")
        return
    _judge(record, "offsets beyond 32 bits", list(triton_cases.beyond_32_bits(BEYOND)))


def _judge(record: Record, name: str, measured: list[tuple[str, float, float]]) -> None:
    wrong = [f"{label}: {found:.3g} > {limit:.3g}" for label, found, limit in measured if not found <= limit]
    record.add(f"{name}, comparisons", len(measured), "1")
    record.add(f"{name}, outside their limit", len(wrong), "1", first=wrong[:10])
    if wrong or not measured:
        raise Wrong("; ".join(wrong[:3]) or "nothing was measured")


def checker(record: Record, setting: Setting) -> None:
    """Some groups under NVIDIA's memory checker, torch's own cache off: it would hide accesses beyond a tensor."""
    program = shutil.which("compute-sanitizer")
    if not setting.is_cuda or program is None:
        why = "there is no compute-sanitizer" if setting.is_cuda else "needs a GPU"
        record.add("memory checker, errors", None, "1", why=why)
        return
    command = [
        program,
        "--error-exitcode",
        "9",
        sys.executable,
        "-m",
        "tests.losses.triton_cases",
        "views",
        "nothing to do",
    ]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "RENIO_KERNELS": "triton"}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SANITIZER_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        record.add("memory checker, errors", None, "1", why=f"took longer than {SANITIZER_SECONDS} s")
        return
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("=========")]
    record.add("memory checker, errors", float(done.returncode != 0), "1", said=lines[-3:])
    if done.returncode != 0:
        raise Wrong("\n".join(lines[:20]) or done.stderr[-1500:])
