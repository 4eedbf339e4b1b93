"""The functions of `torch_ops` as launches of Triton kernels.

Logits are fp32, bf16 or fp16 (each model its own), the arithmetic is fp32. Rows may be a view of a larger tensor; their
columns are adjacent.

Where there are too few rows to fill the device, a row is split into parts, whose results are merged in a fixed order:
no atomics, so equal calls give equal bits (except for the timed choice of block sizes: `tuning.choose_launch`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch
import triton

from renio_megatron.losses.kernels import triton_kernels as jit
from renio_megatron.losses.kernels import triton_terms
from renio_megatron.losses.kernels.tuning import LaunchConfig, choose_launch, cut_rows
from renio_megatron.objective.divergences import Divergence, Terms, forward_kl, jsd, reverse_kl
from renio_megatron.parallel.vocab import NUM_STATISTICS, LogNormalizers

FORMS: dict[Terms, int] = {
    forward_kl.terms: triton_terms.FORWARD_KL.value,
    reverse_kl.terms: triton_terms.REVERSE_KL.value,
    jsd.terms: triton_terms.JSD.value,
}
"""The kernels' form of each divergence; one that is not here runs in `torch_ops`."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def obstacle(matrices: Sequence[torch.Tensor], divergences: Sequence[Divergence]) -> str | None:
    """The reason why the kernels cannot take these [N, L] tensors and divergences, as text; None: they can."""
    for matrix in matrices:
        if matrix.device.type != "cuda" and not (triton_terms.IS_INTERPRETED and matrix.device.type == "cpu"):
            return f"a tensor is on {matrix.device}; outside CUDA they need TRITON_INTERPRET=1 and the CPU"
        if matrix.dtype not in DTYPES:
            return f"a tensor is {matrix.dtype}; they take float32, bfloat16 and float16"
        if matrix.shape[1] > 1 and matrix.stride(1) != 1:
            return f"the columns of a tensor are {matrix.stride(1)} entries apart; they take adjacent ones"
    for divergence in divergences:
        if divergence.terms not in FORMS:
            return f"{divergence.terms.__module__} has no form in triton_ops.FORMS"
    return None


def statistics(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    local_columns: torch.Tensor,
    *,
    num_valid: int,
    temperature: float,
    cross_term_sign: int,
) -> torch.Tensor:
    """Pass 1, fp32 [N, 7]; arguments as in `torch_ops.statistics`. Reads both models' logits once."""
    rows = student_logits.shape[0]
    if rows == 0 or num_valid == 0:
        return _nothing_seen(student_logits)
    factors = _factors(temperature)
    columns = local_columns.contiguous()

    def run(launch: LaunchConfig, rows: int) -> torch.Tensor:
        parts, blocks = cut_rows(rows, num_valid, launch.block, student_logits.device)
        found = student_logits.new_empty(rows, parts, NUM_STATISTICS, dtype=torch.float32)
        with _device_of(student_logits):
            jit.statistics_kernel[(rows, parts)](
                student_logits, teacher_logits, columns, found,
                student_logits.stride(0), teacher_logits.stride(0), num_valid, blocks, *factors,
                CROSS=cross_term_sign, WHOLE=parts == 1, **_options(launch),
            )  # fmt: skip
        return _merged(found, factors, cross_term_sign)

    key = ("statistics", bool(cross_term_sign), student_logits.dtype, teacher_logits.dtype, num_valid)
    return run(choose_launch(key, rows, num_valid, student_logits.device, run), rows)


def token_statistics(
    logits: torch.Tensor, local_columns: torch.Tensor, *, num_valid: int, temperature: float
) -> torch.Tensor:
    """One model's maximum, sum and sampled logit, fp32 [N, 3]; arguments as in `torch_ops.token_statistics`."""
    rows = logits.shape[0]
    if rows == 0 or num_valid == 0:
        return _nothing_seen(logits)[:, [0, 1, 4]]
    factors = _factors(temperature)
    columns = local_columns.contiguous()

    def run(launch: LaunchConfig, rows: int) -> torch.Tensor:
        parts, blocks = cut_rows(rows, num_valid, launch.block, logits.device)
        found = logits.new_empty(rows, parts, NUM_STATISTICS, dtype=torch.float32)
        with _device_of(logits):
            jit.token_statistics_kernel[(rows, parts)](
                logits, columns, found, logits.stride(0), num_valid, blocks, *factors,
                WHOLE=parts == 1, **_options(launch),
            )  # fmt: skip
        return _merged(found, factors, 0)

    key = ("token_statistics", logits.dtype, num_valid)
    return run(choose_launch(key, rows, num_valid, logits.device, run), rows)[:, [0, 1, 4]]


def clamped_sums(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    normalizers: LogNormalizers,
    divergence: Divergence,
    *,
    num_valid: int,
    temperature: float,
    beta: float,
    entry_clip: float | None,
    entry_floor: float | None,
) -> torch.Tensor:
    """Pass 2, fp32 [N, 3]; arguments as in `torch_ops.clamped_sums`. Reads both models' logits once."""
    rows = student_logits.shape[0]
    if rows == 0 or num_valid == 0:
        return student_logits.new_zeros(rows, 3, dtype=torch.float32)
    vectors = _vectors(normalizers)
    form, shares = _form(divergence, beta)
    numbers = (*_factors(temperature), *_bounds(entry_clip, entry_floor), *shares)

    def run(launch: LaunchConfig, rows: int) -> torch.Tensor:
        parts, blocks = cut_rows(rows, num_valid, launch.block, student_logits.device)
        found = student_logits.new_empty(rows, parts, 3, dtype=torch.float32)
        with _device_of(student_logits):
            jit.sums_kernel[(rows, parts)](
                student_logits, teacher_logits, *vectors, found,
                student_logits.stride(0), teacher_logits.stride(0), num_valid, blocks, *numbers,
                FORM=form, CLIPPED=entry_clip is not None, **_options(launch),
            )  # fmt: skip
        return found[:, 0] if parts == 1 else found.sum(1)

    key = ("clamped_sums", form, entry_clip is None, student_logits.dtype, teacher_logits.dtype, num_valid)
    return run(choose_launch(key, rows, num_valid, student_logits.device, run), rows)


def weighted_gradient(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    normalizers: LogNormalizers,
    divergence: Divergence,
    total_slope_N: torch.Tensor,
    scale_N: torch.Tensor,
    out: torch.Tensor,
    *,
    num_valid: int,
    temperature: float,
    beta: float,
    entry_clip: float | None,
    entry_floor: float | None,
) -> torch.Tensor:
    """Pass 3, written to `out` [N, L] and returned; arguments as in `torch_ops.weighted_gradient`.

    Reads both models' logits once, and nothing of a row whose scale is 0: its gradient is 0 whatever it holds.
    """
    rows, width = out.shape
    if rows == 0 or num_valid == 0:
        return out.zero_()
    vectors = _vectors(normalizers)
    form, shares = _form(divergence, beta)
    # The kernel's probability of a JSD is (1 - beta) p_S, as its mixture needs it.
    total = (total_slope_N.float() * 2.0 ** -shares[0]).contiguous()
    factor = (scale_N.float() / temperature).contiguous()
    numbers = (*_factors(temperature), *_bounds(entry_clip, entry_floor), *shares)

    def run(launch: LaunchConfig, rows: int, into: torch.Tensor) -> torch.Tensor:
        parts, blocks = cut_rows(rows, width, launch.block, student_logits.device)
        with _device_of(student_logits):
            jit.gradient_kernel[(rows, parts)](
                student_logits, teacher_logits, *vectors, total, factor, into,
                student_logits.stride(0), teacher_logits.stride(0), into.stride(0), num_valid, width, blocks, *numbers,
                FORM=form, CLIPPED=entry_clip is not None, **_options(launch),
            )  # fmt: skip
        return into

    def trial(launch: LaunchConfig, rows: int) -> torch.Tensor:
        return run(launch, rows, out.new_empty(rows, width))

    dtypes = (student_logits.dtype, teacher_logits.dtype, out.dtype)
    key = ("weighted_gradient", form, entry_clip is None, *dtypes, width)
    return run(choose_launch(key, rows, width, student_logits.device, trial), rows, out)


def sums_and_gradient(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    normalizers: LogNormalizers,
    divergence: Divergence,
    scale_N: torch.Tensor,
    out: torch.Tensor,
    **settings: Any,
) -> torch.Tensor:
    """Pass 2, then pass 3; arguments as in `torch_ops.sums_and_gradient`."""
    sums = clamped_sums(student_logits, teacher_logits, normalizers, divergence, **settings)
    weighted_gradient(student_logits, teacher_logits, normalizers, divergence, sums[:, 1], scale_N, out, **settings)
    return sums


def scale_rows_(gradient: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """`gradient` [N, L] times a scalar, in place, formed in fp32. A factor of 1 is detected on the device and
    costs neither a pass over the gradient nor a synchronization."""
    rows, width = gradient.shape
    if rows == 0 or width == 0:
        return gradient
    factor = factor.to(gradient.device, torch.float32)

    def run(launch: LaunchConfig, rows: int, into: torch.Tensor) -> torch.Tensor:
        parts, blocks = cut_rows(rows, width, launch.block, gradient.device)
        with _device_of(gradient):
            jit.scale_kernel[(rows, parts)](into, factor, into.stride(0), width, blocks, **_options(launch))
        return into

    def trial(launch: LaunchConfig, rows: int) -> torch.Tensor:
        return run(launch, rows, gradient.new_empty(rows, width))

    return run(
        choose_launch(("scale_rows_", gradient.dtype, width), rows, width, gradient.device, trial), rows, gradient
    )


def _nothing_seen(logits: torch.Tensor) -> torch.Tensor:
    """Statistics of a shard without columns, [N, 7]."""
    out = logits.new_zeros(logits.shape[0], NUM_STATISTICS, dtype=torch.float32)
    out[:, [0, 2, 4, 5]] = -torch.inf
    return out


def _merged(found: torch.Tensor, factors: tuple[float, float], cross_term_sign: int) -> torch.Tensor:
    """Statistics [N, 7] of rows from those of their parts [N, parts, 7]."""
    rows, parts, _ = found.shape
    if parts == 1:
        return found[:, 0]
    out = found.new_empty(rows, NUM_STATISTICS)
    with _device_of(found):
        jit.merge_parts_kernel[(rows,)](
            found, out, parts, *factors, CROSS=cross_term_sign, PARTS=triton.next_power_of_2(parts), num_warps=1
        )
    return out


def _factors(temperature: float) -> tuple[float, float]:
    """Factors of a logit: for a power of 2, and for nats."""
    return math.log2(math.e) / temperature, 1.0 / temperature


def _bounds(entry_clip: float | None, entry_floor: float | None) -> tuple[float, float]:
    """Upper and lower bound of an entry in units of ln 2; infinite where there is none."""
    clip = math.inf if entry_clip is None else entry_clip / math.log(2.0)
    return clip, -math.inf if entry_floor is None else entry_floor / math.log(2.0)


def _form(divergence: Divergence, beta: float) -> tuple[int, tuple[float, float]]:
    """The kernels' form of a divergence, and log2 of the student's and the teacher's share of its mixture (KL: 0)."""
    form = FORMS[divergence.terms]
    if form != triton_terms.JSD.value:
        return form, (0.0, 0.0)
    return form, (math.log1p(-beta) / math.log(2.0), math.log2(beta))


def _vectors(normalizers: LogNormalizers) -> list[torch.Tensor]:
    """The normalizers as the kernels read them, fp32 [N] without gaps."""
    names = ("student_max", "student_log_sum", "teacher_max", "teacher_log_sum")
    return [getattr(normalizers, name).float().contiguous() for name in names]


def _options(launch: LaunchConfig) -> dict[str, int]:
    """A launch configuration as keyword arguments; products and sums are fused, whatever Triton's default is."""
    return {"BLOCK": launch.block, "STAGES": launch.stages, "num_warps": launch.warps, "enable_fp_fusion": True}


def _device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes the tensor's device the current one, to which launches go."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else contextlib.nullcontext()
