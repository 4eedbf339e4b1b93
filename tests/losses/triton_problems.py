"""What the cases of the Triton kernels share: problems, their values in fp64, and how far a result may be from them."""

from __future__ import annotations

import os

import torch

from renio_megatron import distillation_loss
from renio_megatron.losses import kernels
from renio_megatron.objective.divergences import divergence_of
from renio_megatron.objective.reference import reference_objective
from renio_megatron.parallel.vocab import merge_statistics
from tests.helpers.vectors import Case, exempt_entries, worst

INF = float("inf")
BETAS = (0.0, 0.3, 1.0)
BOUNDS = {"free": (None, 0.0), "clipped": (0.05, 0.0), "clipped above": (0.05, None)}
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "bf16, teacher fp32": (torch.bfloat16, torch.float32),
    "fp32, teacher bf16": (torch.float32, torch.bfloat16),
}
DEVICE = "cuda" if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1" else "cpu"
"""Without a GPU and without the interpreter the cases run through PyTorch's passes."""


def problem(seed, *, rows=5, width=75, sequences=3, spread=1.5, dtypes=DTYPES["fp32"]):
    """Student and teacher logits (rounded to their dtypes), token ids, owners, number of sequences."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, rows, width, generator=generator, dtype=torch.float64).mul_(spread)
    ids = torch.randint(0, width, (rows,), generator=generator)
    owner = torch.randint(0, sequences, (rows,), generator=generator)
    return logits[0].to(dtypes[0]), logits[1].to(dtypes[1]), ids, owner, sequences


def oracle(student, teacher, ids, owner, sequences, **settings):
    """The reference objective in fp64, its gradient among the values, and the entries whose clip fp32 may miss."""
    student = student.double().requires_grad_()
    found = reference_objective(student, teacher.double(), ids, owner, sequences, **settings)
    found["loss"].backward()
    values = {name: value.detach() for name, value in found.items()} | {"gradient": student.grad}
    wanted = {"beta": 0.0, "temperature": 1.0, "entry_clip": None} | settings
    tensors = {"student_logits": student.detach(), "teacher_logits": teacher.double()}
    return values, exempt_entries(Case(0, wanted, tensors), torch.float32)


def through_the_kernels(student, teacher, ids, owner, sequences, loss, **options):
    """`distillation_loss` and its gradient, on DEVICE."""
    student = student.to(DEVICE, copy=True).requires_grad_()
    here = [x.to(DEVICE) for x in (teacher, ids, owner)]
    out = distillation_loss(student, *here, sequences, loss, **options)
    out.loss.backward()
    return out, student.grad


def compare(label, out, gradient, expected, exempt):
    """Every quantity of a loss against fp64: 1e-5 of the largest value; a gradient may be rounded to its dtype, too.
    A loss is a mean, and may be as far off as the tokens' divergences that it is the mean of."""
    for name in ("loss", "weights", "raw_weights", "log_ratio", "token_divergence"):
        values = expected["token_divergence" if name == "loss" else name]
        bound = 1e-5 * max(float(values.abs().max()), float(expected[name].abs().max()), 1e-3)
        yield f"{label} {name}", worst(getattr(out, name).cpu(), expected[name].view_as(getattr(out, name))), bound
    wanted = expected["gradient"]
    difference = (gradient.cpu().double() - wanted).abs()
    difference -= rounding(wanted, gradient.dtype)
    difference = difference[~exempt]
    yield f"{label} gradient", float(difference.max()) if difference.numel() else 0.0, 1e-5 * float(wanted.abs().max())
    yield f"{label} gradient is finite", float(not gradient.isfinite().all()), 0.0


def rounding(exact, dtype):
    """What storing fp64 values in a dtype may change: half a unit in the last place, or a subnormal's. The interpreter
    cuts the digits beyond bf16 off, where the hardware rounds."""
    limits = torch.finfo(dtype)
    if dtype == torch.float32:
        return torch.zeros_like(exact)
    share = limits.eps if DEVICE == "cpu" and dtype == torch.bfloat16 else limits.eps / 2
    return exact.abs() * share + limits.smallest_normal * limits.eps


def divergence_by_hand(student, teacher, beta):
    """Of each row, temperature 1.1, from probabilities, differentiable."""
    p, q = (student / 1.1).softmax(-1), (teacher / 1.1).softmax(-1)
    m = (1 - beta) * p + beta * q
    if beta in (0.0, 1.0):
        return (q * (q / p).log()).sum(1) if beta == 0 else (p * (p / q).log()).sum(1)
    return (beta * q * (q / m).log() + (1 - beta) * p * (p / m).log()).sum(1)


def prepared(student, teacher, beta, num_valid=70):
    """Normalisers, divergence, total slope and bounds of whole rows whose last columns are padding."""
    divergence, shared = divergence_of(beta), {"num_valid": num_valid, "temperature": 1.1}
    bounds = {"beta": beta, "entry_clip": None, "entry_floor": 0.0, "temperature": 1.1}
    logits = [x.to(DEVICE) for x in (student, teacher)]
    nowhere = torch.full((len(student),), -1, device=DEVICE)
    normalizers = merge_statistics(kernels.statistics(*logits, nowhere, cross_term_sign=0, **shared)[None], 0)
    sums = kernels.clamped_sums(*logits, normalizers, divergence, num_valid=num_valid, **bounds)
    return normalizers, divergence, sums[:, 1], bounds
