"""The Triton kernels against values from outside them: what is measured, on whatever device the logits are.

A group yields (label, measured, limit). `python -m tests.losses.triton_cases` prints those of all groups as JSON; under
TRITON_INTERPRET=1 they run on the CPU, in a process of their own, because the interpreter is chosen once a process.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from types import SimpleNamespace

import torch

from renio_megatron import LossConfig, VocabShard, WeightingConfig, distillation_loss
from renio_megatron.losses import kernels
from renio_megatron.losses.token_logp import cross_entropy
from renio_megatron.objective.divergences import divergence_of
from renio_megatron.parallel.vocab import merge_statistics
from tests.helpers.sharding import VOCABULARY_CUTS, columns, vocabulary_edges
from tests.helpers.vectors import exempt_entries, load_cases, worst
from tests.losses.triton_problems import (
    BETAS,
    BOUNDS,
    DEVICE,
    DTYPES,
    INF,
    compare,
    divergence_by_hand,
    oracle,
    prepared,
    problem,
    rounding,
    through_the_kernels,
)


def reference_vectors():
    for case in load_cases():
        if DEVICE == "cpu" and len(case.owner) > 20:
            continue  # the interpreter takes a hundredth of a second a row
        arguments = (case.student_logits.float(), case.teacher_logits.float(), case.token_ids, case.owner)
        out, gradient = through_the_kernels(
            *arguments,
            case.batch,
            case.loss_config,
            weighting=case.weighting_config,
            overwrite_logits=case.number % 2 == 1,
        )
        names = ("loss", "weights", "raw_weights", "log_ratio", "token_divergence")
        expected = {name: getattr(case, name) for name in names} | {"gradient": case.grad_student_logits}
        yield f"case {case.number} pivotal", float((out.is_pivotal.cpu() != case.pivotal).sum()), 0.0
        yield from compare(f"case {case.number}", out, gradient, expected, exempt_entries(case, torch.float32))


def against_the_reference():
    """Divergences, bounds, temperatures and dtypes; few rows, so that a row is cut into parts, and more."""
    seed = 0
    for dtypes in DTYPES.values():
        for beta in BETAS:
            for name, (clip, floor) in BOUNDS.items():
                seed += 1
                settings = {
                    "beta": beta,
                    "temperature": (1.0, 1.1, 0.7)[seed % 3],
                    "entry_clip": clip,
                    "entry_floor": floor,
                }
                arguments = problem(seed, rows=(1, 2, 7)[seed // 3 % 3], width=(75, 128, 33)[seed % 3], dtypes=dtypes)
                expected, exempt = oracle(*arguments, **settings)
                out, gradient = through_the_kernels(*arguments, LossConfig(**settings))
                yield f"seed {seed} dtype", float(gradient.dtype != dtypes[0] or out.loss.dtype != torch.float32), 0.0
                yield from compare(f"seed {seed}, beta {beta}, {name}", out, gradient, expected, exempt)


def far_from_zero():
    """Logits around 30 and models whose logits are 40 apart: nothing may be lost to their size."""
    for beta in BETAS:
        for clip in (None, 0.05):
            student, teacher, *rest = problem(50, rows=3, spread=4.0)
            arguments = ((student + 20.0), (teacher - 20.0), *rest)
            settings = {"beta": beta, "temperature": 1.1, "entry_clip": clip}
            expected, exempt = oracle(*arguments, **settings)
            out, gradient = through_the_kernels(*arguments, LossConfig(**settings))
            yield from compare(f"beta {beta}, clip {clip}", out, gradient, expected, exempt)


def shards():
    """Column slices, each through the kernels, merged by hand: uneven, padded with NaN, all padding, empty."""
    for cut in VOCABULARY_CUTS:
        for ranks in (2, 3):
            for beta, clip in ((0.0, None), (1.0, None), (0.0, 0.05), (0.3, None), (0.3, 0.05), (1.0, 0.05)):
                yield from sharded(f"{cut} over {ranks}, beta {beta}, clip {clip}", cut, ranks, beta, clip)


def sharded(label, cut, ranks, beta, clip, impossible=None):
    """One problem in shards; `impossible`: rank whose columns are -inf in both models."""
    student, teacher, ids, owner, sequences = problem(60 + ranks, rows=2)
    edges = vocabulary_edges(cut, ranks, student.shape[1])
    if impossible is not None:
        start, stop = edges[impossible]
        student[:, start:stop] = teacher[:, start:stop] = -INF
        ids = torch.full_like(ids, stop % student.shape[1])
    finite = [x.clamp(min=-600.0) for x in (student, teacher)]
    settings = {"beta": beta, "entry_clip": clip, "temperature": 1.1}
    expected, exempt = oracle(*finite, ids, owner, sequences, uniform=True, **settings)
    divergence = divergence_of(beta)
    bounds = {"beta": beta, "entry_clip": clip, "entry_floor": 0.0, "temperature": 1.1}
    sign = {0.0: 1, 1.0: -1}.get(beta, 0) if clip is None else 0
    parts = []
    for start, stop in edges:
        shard = VocabShard(start, stop, student.shape[1], group=SimpleNamespace(size=lambda: 2))
        logits = [columns(x, start, stop).to(DEVICE) for x in (student, teacher)]
        parts.append((shard, logits, shard.local_columns(ids).to(DEVICE)))
    local = [
        kernels.statistics(*logits, mine, num_valid=shard.num_valid, temperature=1.1, cross_term_sign=sign)
        for shard, logits, mine in parts
    ]
    normalizers = merge_statistics(torch.stack(local), sign)
    logp = [(x.double() / 1.1).log_softmax(-1).gather(1, ids[:, None])[:, 0] for x in finite]
    yield f"{label}: student logp", worst(normalizers.student_logp.cpu(), logp[0]), 1e-5
    yield f"{label}: teacher logp", worst(normalizers.teacher_logp.cpu(), logp[1]), 1e-5
    if sign:
        value, slope = normalizers.cross, divergence.total_slope(normalizers.cross)
    else:
        sums = [
            kernels.clamped_sums(*logits, normalizers, divergence, num_valid=shard.num_valid, **bounds)
            for shard, logits, _ in parts
        ]
        value, slope, count = torch.stack(sums).sum(0).unbind(1)
        if clip is None:
            yield f"{label}: nothing cut", float(count.sum()), 0.0
    bound = 1e-5 * max(float(expected["token_divergence"].abs().max()), 1e-3)
    yield f"{label}: value", worst(value.cpu(), expected["token_divergence"]), bound
    scale = (1.0 / torch.bincount(owner, minlength=sequences)[owner] / sequences).float().to(DEVICE)
    for shard, logits, _ in parts:
        found = kernels.weighted_gradient(
            *logits, normalizers, divergence, slope, scale, logits[0], num_valid=shard.num_valid, **bounds
        ).cpu()
        wanted = columns(expected["gradient"], shard.start, shard.stop).nan_to_num(0.0)
        leave = columns(exempt.double(), shard.start, shard.stop).nan_to_num(0.0) > 0
        yield f"{label}: gradient", worst(found, wanted, leave), 1e-5 * float(expected["gradient"].abs().max())
        yield f"{label}: padding", float(found[:, shard.num_valid :].abs().sum()), 0.0


def impossible_columns():
    """Logits of -inf: probability 0, gradient 0, no NaN; as a logit so small that its probability is 0."""
    for beta in BETAS:
        for clip in (None, 0.05):
            for who in ("student", "teacher", "both"):
                if clip is None and (beta, who) in ((0.0, "student"), (1.0, "teacher")):
                    continue  # infinite
                student, teacher, ids, owner, sequences = problem(70, rows=3)
                ids = ids % 10 + 40
                gone = slice(0, 37)
                if who != "teacher":
                    student[:, gone] = -INF
                if who != "student":
                    teacher[:, gone] = -INF
                settings = {"beta": beta, "entry_clip": clip}
                small = -6e4 if clip and who != "both" and beta != 0.3 else -600.0  # its log ratio must be clipped, too
                finite = [x.clamp(min=small) for x in (student, teacher)]
                expected, exempt = oracle(*finite, ids, owner, sequences, **settings)
                out, gradient = through_the_kernels(student, teacher, ids, owner, sequences, LossConfig(**settings))
                yield from compare(
                    f"beta {beta}, clip {clip}, {who}", out, gradient, expected, exempt & (student > -INF)
                )
                if who != "teacher" and (beta != 0.0 or who == "both"):
                    yield f"beta {beta}, {who}: gradient 0", float(gradient[:, gone].abs().sum()), 0.0
        yield from sharded(f"one shard, beta {beta}", "uneven", 3, beta, None, impossible=1)


def rows_without_weight():
    """A row of scale 0 becomes 0 and is not read: it holds NaN."""
    for beta in BETAS:
        for in_place in (False, True):
            student, teacher, *_ = problem(80, rows=6)
            scale = torch.tensor([0.5, 0.0, 0.25, 0.0, 1.0, 0.0])
            normalizers, divergence, slope, bounds = prepared(student, teacher, beta)
            poisoned = [torch.where(scale[:, None] == 0, float("nan"), x).to(DEVICE) for x in (student, teacher)]
            out = poisoned[0] if in_place else torch.full_like(poisoned[0], 7.0)
            found = kernels.weighted_gradient(
                *poisoned, normalizers, divergence, slope, scale.to(DEVICE), out, num_valid=70, **bounds
            ).cpu()
            yield f"beta {beta}: zeros", float((found[scale == 0] != 0).sum() + (found[:, 70:] != 0).sum()), 0.0
            oracle_logits = student[:, :70].double().requires_grad_()
            total = (scale.double() * divergence_by_hand(oracle_logits, teacher[:, :70].double(), beta)).sum()
            total.backward()
            yield f"beta {beta}: the others", worst(found[:, :70], oracle_logits.grad), 1e-5


def views():
    """Rows inside something larger, not aligned to anything; what is around them stays as it was."""
    for dtype in (torch.float32, torch.bfloat16):
        plain = problem(90, rows=4, width=70, dtypes=(dtype, dtype))
        buffers = [torch.full((9, width), 5.0, dtype=dtype, device=DEVICE) for width in (90, 96, 101)]
        inside = [buffer[1::2, 3:73] for buffer in buffers]
        for view, logits in zip(inside, plain[:2], strict=False):
            view.copy_(logits)
        for beta in BETAS:
            normalizers, divergence, slope, bounds = prepared(*plain[:2], beta)
            again, _, sums, _ = prepared(*inside[:2], beta)
            yield f"beta {beta} statistics", worst(again.student_log_sum, normalizers.student_log_sum), 1e-6
            yield f"beta {beta} sums", worst(sums, slope), 1e-6
            scale = torch.rand(4, generator=torch.Generator().manual_seed(1)).to(DEVICE)
            given = (normalizers, divergence, slope, scale)
            copies = [x.to(DEVICE) for x in plain[:2]]
            expected = kernels.weighted_gradient(*copies, *given, torch.empty_like(copies[0]), num_valid=70, **bounds)
            found = kernels.weighted_gradient(*inside[:2], *given, inside[2], num_valid=70, **bounds)
            yield f"beta {beta} gradient", worst(found, expected), 1e-6 if dtype == torch.float32 else 1e-3
            yield f"beta {beta} same memory", float(found.data_ptr() != inside[2].data_ptr()), 0.0
        for buffer in buffers:
            rim = torch.ones_like(buffer, dtype=torch.bool)
            rim[1::2, 3:73] = False
            yield "around", float((buffer[rim] != 5.0).sum()), 0.0


def equal_bits():
    """The same call twice, with a row in parts and without: under deterministic algorithms not a bit differs."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # not all that the loss does besides has such a form
    try:
        for rows in (1, 3, 9):
            for beta in BETAS:
                for clip in (None, 0.05):
                    arguments = problem(rows, rows=rows, width=200)
                    runs = [through_the_kernels(*arguments, LossConfig(beta=beta, entry_clip=clip)) for _ in range(2)]
                    (one, first), (two, second) = runs
                    same = torch.equal(first, second) and torch.equal(one.token_divergence, two.token_divergence)
                    yield f"{rows} rows, beta {beta}, clip {clip}", float(not same), 0.0
    finally:
        torch.use_deterministic_algorithms(False)


def nothing_to_do():
    """No rows, no columns, only padding."""
    for rows, width, num_valid in ((0, 20, 20), (3, 0, 0), (3, 20, 0)):
        logits = torch.full((rows, width), float("nan"), device=DEVICE)
        mine = torch.full((rows,), -1, device=DEVICE)
        shared = {"num_valid": num_valid, "temperature": 1.0}
        label = f"{rows} rows, {num_valid} of {width} columns"
        expected = torch.tensor([-INF, 0.0, -INF, 0.0, -INF, -INF, 0.0], device=DEVICE).expand(rows, 7)
        for sign in (-1, 0, 1):
            found = kernels.statistics(logits, logits, mine, cross_term_sign=sign, **shared)
            yield f"{label}: statistics", float(not torch.equal(found, expected)), 0.0
        found = kernels.token_statistics(logits, mine, **shared)
        yield f"{label}: one model", float(not torch.equal(found, expected[:, [0, 1, 4]])), 0.0
        zeros = torch.zeros(rows, device=DEVICE)
        normalizers = merge_statistics(torch.zeros(1, rows, 7, device=DEVICE), 0)
        bounds = {"beta": 0.0, "entry_clip": 0.05, "entry_floor": 0.0, **shared}
        found = kernels.clamped_sums(logits, logits, normalizers, divergence_of(0.0), **bounds)
        yield f"{label}: sums", float(found.shape != (rows, 3) or bool(found.any())), 0.0
        found = kernels.weighted_gradient(
            logits, logits, normalizers, divergence_of(0.0), zeros, zeros + 1, logits, **bounds
        )
        yield f"{label}: gradient", float(found.shape != (rows, width) or bool(found.any())), 0.0
        yield f"{label}: scaled", float(kernels.scale_rows_(found, torch.tensor(2.0, device=DEVICE)).any()), 0.0
    out, gradient = through_the_kernels(*problem(1, rows=0), LossConfig(entry_clip=0.05))
    yield "loss of nothing", float(out.loss) + float(gradient.shape != (0, 75)), 0.0


def scaled_gradients():
    """A product in fp32: factors beyond fp16, factors between two numbers of bf16; a factor of 1 changes nothing."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for factor in (1.0, 0.3, 2.0**17, 0.0):
            exact = problem(100, rows=3, spread=2.0**-10, dtypes=(dtype, dtype))[0]
            buffer = torch.full((3, 90), 5.0, dtype=dtype, device=DEVICE)
            inside = buffer[:, 4:79]
            inside.copy_(exact)
            found = kernels.scale_rows_(inside, torch.tensor(factor, device=DEVICE))
            expected = exact.double() * torch.tensor(factor).double()
            difference = (found.cpu().double() - expected).abs() - rounding(expected, dtype)
            yield f"{dtype} x {factor}", float(difference.max()), 1e-7 * float(expected.abs().max())
            if factor == 1.0:
                yield f"{dtype} x 1", float(not torch.equal(found.cpu(), exact)), 0.0
            yield f"{dtype} x {factor} around", float((buffer != 5.0).sum() - (inside != 5.0).sum()), 0.0


def cross_entropies():
    for rows in (2, 9):
        logits, _, ids, _, _ = problem(110 + rows, rows=rows, spread=3.0)
        expected = logits.double().requires_grad_()
        value = torch.nn.functional.cross_entropy(expected, ids, reduction="sum")
        value.backward()
        here = logits.to(DEVICE).requires_grad_()
        found = cross_entropy(here, ids.to(DEVICE), VocabShard(0, 75, 75))
        found.backward()
        yield f"{rows} rows: value", worst(found.cpu(), value), 1e-5 * float(value.detach())
        yield f"{rows} rows: gradient", worst(here.grad.cpu(), expected.grad), 1e-5


def given_weights_in_place():
    """Weights of 0 through the public loss, gradient over the logits."""
    student, teacher, ids, _, _ = problem(120, rows=6)
    owner = torch.tensor([0, 1, 2, 0, 1, 2])
    weights = torch.tensor([1.0, 0.0, 2.0])
    expected = student.double().requires_grad_()
    divergence = divergence_by_hand(expected, teacher.double(), 0.3)
    ((weights / 2 / 3).double()[owner] * divergence).sum().backward()
    out, gradient = through_the_kernels(
        *(student, teacher, ids, owner, 3, LossConfig(beta=0.3, temperature=1.1)),
        weighting=WeightingConfig(name="uniform"),
        weights=weights.to(DEVICE),
        overwrite_logits=True,
    )
    yield "weights", worst(out.weights.cpu(), weights), 0.0
    yield "gradient", worst(gradient.cpu(), expected.grad), 1e-6
    yield "rows of weight 0", float(gradient[owner.to(DEVICE) == 1].abs().sum()), 0.0


FREE_BYTES = 20 << 30
"""What `beyond_32_bits` needs of a GPU's memory."""


BEYOND = tuple(itertools.product((0.0, 0.3, 1.0), (None, 0.05)))
"""(beta, clip) of its losses."""


def beyond_32_bits(losses=BEYOND):
    """V = 151,936 in bf16, so many rows that offsets pass 2^31; in place; first, last and middle rows."""
    from renio_megatron.losses.kernels import tuning

    vocab, rows = 151936, 14400
    looked_at = [0, rows // 2, rows - 1]
    for beta, clip in losses:
        tuning._fastest.clear()  # so that the cuts are timed
        generator = torch.Generator("cuda").manual_seed(3)
        student, teacher = (
            torch.randn(rows, vocab, generator=generator, device="cuda", dtype=torch.bfloat16).mul_(2.0)
            for _ in range(2)
        )
        kept = [x[looked_at].cpu().double() for x in (student, teacher)]
        ids = torch.randint(0, vocab - 100, (rows,), generator=generator, device="cuda")
        owner = torch.arange(rows, device="cuda") // (rows // 8)
        out = distillation_loss(
            student.requires_grad_(),
            teacher,
            *(ids, owner, 8, LossConfig(beta=beta, entry_clip=clip)),
            shard=VocabShard(0, vocab, vocab - 100),
            weights=torch.ones(8, device="cuda"),
            overwrite_logits=True,
        )
        out.loss.backward()
        label = f"beta {beta}, clip {clip}"
        yield f"{label}: kernels that were not timed", float(len(tuning._fastest) < 2), 0.0
        valid = [x[:, : vocab - 100] for x in kept]
        expected, exempt = oracle(
            *valid, ids.cpu()[looked_at], torch.arange(3), 3, beta=beta, entry_clip=clip, uniform=True
        )
        values = expected["token_divergence"]
        found = worst(out.token_divergence[looked_at].cpu(), values)
        yield f"{label}: divergence", found, 1e-5 * float(values.max())
        wanted = expected["gradient"] * 3 / rows
        gradient = student.grad[looked_at].cpu().double()
        difference = (gradient[:, : vocab - 100] - wanted).abs() - rounding(wanted, torch.bfloat16)
        yield f"{label}: gradient", float(difference[~exempt].max()), 1e-5 * float(wanted.abs().max())
        yield f"{label}: padding", float(gradient[:, vocab - 100 :].abs().sum()), 0.0
        del student, teacher, out


GROUPS = {
    "reference vectors": reference_vectors,
    "reference in fp64": against_the_reference,
    "far from zero": far_from_zero,
    "shards": shards,
    "impossible columns": impossible_columns,
    "rows without weight": rows_without_weight,
    "views": views,
    "equal bits": equal_bits,
    "nothing to do": nothing_to_do,
    "scaled gradients": scaled_gradients,
    "cross-entropy": cross_entropies,
    "given weights": given_weights_in_place,
}


def main():
    torch.set_num_threads(1)
    measured = {}
    for name in sys.argv[1:] or GROUPS:
        began = time.monotonic()
        measured[name] = list(GROUPS[name]())
        print(f"{name}: {time.monotonic() - began:.1f} s", file=sys.stderr)
    print(json.dumps(measured))


if __name__ == "__main__":
    assert os.environ.get("RENIO_KERNELS") == "triton"
    assert os.environ.get("TRITON_INTERPRET") == "1" or DEVICE == "cuda"
    main()
