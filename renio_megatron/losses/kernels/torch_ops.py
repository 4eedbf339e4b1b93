"""The three passes over a shard's logits in plain PyTorch: statistics, clamped sums, gradient.

A few rows are processed at a time, so the fp32 working copies stay small whatever N is. Padding columns come last in a
shard and are never read; arithmetic on -inf is avoided by slicing them off, not by masking.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from renio_megatron.objective.divergences import Divergence
from renio_megatron.objective.divergences.zero_probability import mask_zero_probability_
from renio_megatron.parallel.vocab import NUM_STATISTICS, LogNormalizers

CHUNK_ENTRIES = 1 << 18
"""Vocabulary entries that are processed at once: 8 rows of 32,768 columns, 1 MB in fp32, near a CPU core's cache."""


def working_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """The dtype of the arithmetic: fp64 where all tensors are fp64, else fp32."""
    return torch.float64 if all(t.dtype == torch.float64 for t in tensors) else torch.float32


def statistics(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    local_columns: torch.Tensor,
    *,
    num_valid: int,
    temperature: float,
    cross_term_sign: int,
) -> torch.Tensor:
    """Pass 1: this shard's statistics of both distributions, [N, 7] (columns: `parallel.vocab.NUM_STATISTICS`).

    Args:
        student_logits, teacher_logits: [N, L], any floating dtype.
        local_columns: column of the sampled token, -1 where another rank has it, int64 [N].
        num_valid: leading columns that are not padding.
        temperature: divides both models' logits.
        cross_term_sign: 1 sums exp(u - max u) ((u - max u) - (z - max z)), -1 the same with the models exchanged, 0
            neither; z and u are the student's and the teacher's scaled logits.
    """
    dtype = working_dtype(student_logits, teacher_logits)
    out = student_logits.new_zeros(student_logits.shape[0], NUM_STATISTICS, dtype=dtype)
    out[:, [0, 2, 4, 5]] = -torch.inf
    if num_valid == 0:
        return out
    buffers = _buffers(student_logits, num_valid, dtype)
    for rows in _row_chunks(student_logits):
        part, columns, shifted = out[rows], local_columns[rows], []
        models = (student_logits, [0, 1, 4], buffers[0]), (teacher_logits, [2, 3, 5], buffers[1])
        for logits, into, buffer in models:
            found, below_maximum, exponentials = _one_model(logits[rows, :num_valid], columns, temperature, buffer)
            part[:, into] = found
            shifted.append((below_maximum, exponentials))
        if cross_term_sign:
            (own, weight), (other, _) = shifted[::-1] if cross_term_sign > 0 else shifted
            part[:, 6] = mask_zero_probability_(own.sub_(other).mul_(weight), weight).sum(1)
    return out


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
    """Pass 2: sums over this shard's columns, [N, 3]: clamped entries, slopes inside the clamp, entries cut above.

    Shapes and arguments as in `statistics`; `entry_clip` None bounds nothing.
    """
    dtype = working_dtype(student_logits, teacher_logits)
    sums = student_logits.new_zeros(student_logits.shape[0], 3, dtype=dtype)
    if num_valid == 0:
        return sums
    buffers = _buffers(student_logits, num_valid, dtype)
    for rows in _row_chunks(student_logits):
        student_logp, teacher_logp = _log_probabilities(
            student_logits, teacher_logits, normalizers, rows, temperature, buffers
        )
        entry, slope = divergence.terms(student_logp, teacher_logp, beta)
        _sum_terms(sums[rows], entry, slope, entry_clip, entry_floor)
    return sums


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
    """Pass 3: d loss / d student_logits = scale / temperature (slope - p_S G), written to `out` and returned.

    Args:
        total_slope_N: G, the slopes' sum over the whole vocabulary [N].
        scale_N: factor of each token's divergence in the loss [N].
        out: [N, L], may be `student_logits` itself. Padding columns become exactly 0.
    Other arguments as in `clamped_sums`.
    """
    dtype = working_dtype(student_logits, teacher_logits)
    factor = scale_N.to(dtype) / temperature
    buffers = _buffers(student_logits, num_valid, dtype)
    for rows in _row_chunks(student_logits):
        if num_valid:
            student_logp, teacher_logp = _log_probabilities(
                student_logits, teacher_logits, normalizers, rows, temperature, buffers
            )
            entry, slope = divergence.terms(student_logp, teacher_logp, beta)
            if entry_clip is not None:
                _drop_clamped_slopes_(slope, entry, entry_clip, entry_floor)
            _write_gradient(out[rows, :num_valid], student_logp, slope, total_slope_N[rows], factor[rows])
        out[rows, num_valid:] = 0
    return out


def sums_and_gradient(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    normalizers: LogNormalizers,
    divergence: Divergence,
    scale_N: torch.Tensor,
    out: torch.Tensor,
    *,
    num_valid: int,
    temperature: float,
    beta: float,
    entry_clip: float | None,
    entry_floor: float | None,
) -> torch.Tensor:
    """Passes 2 and 3 at once, where this shard is the whole vocabulary and its own sum of slopes is G.

    Arguments as in `weighted_gradient`, result as in `clamped_sums`; every entry is computed once instead of twice.
    """
    dtype = working_dtype(student_logits, teacher_logits)
    sums = student_logits.new_zeros(student_logits.shape[0], 3, dtype=dtype)
    factor = scale_N.to(dtype) / temperature
    buffers = _buffers(student_logits, num_valid, dtype)
    for rows in _row_chunks(student_logits):
        student_logp, teacher_logp = _log_probabilities(
            student_logits, teacher_logits, normalizers, rows, temperature, buffers
        )
        entry, slope = divergence.terms(student_logp, teacher_logp, beta)
        _sum_terms(sums[rows], entry, slope, entry_clip, entry_floor)
        _write_gradient(out[rows, :num_valid], student_logp, slope, sums[rows, 1], factor[rows])
        out[rows, num_valid:] = 0
    return sums


def token_statistics(
    logits: torch.Tensor, local_columns: torch.Tensor, *, num_valid: int, temperature: float
) -> torch.Tensor:
    """Maximum, sum of exponentials and sampled logit of one model's shard, [N, 3]; arguments as in `statistics`."""
    dtype = working_dtype(logits)
    out = logits.new_zeros(logits.shape[0], 3, dtype=dtype)
    out[:, [0, 2]] = -torch.inf
    if num_valid == 0:
        return out
    buffer = _buffers(logits, num_valid, dtype)[0]
    for rows in _row_chunks(logits):
        out[rows], *_ = _one_model(logits[rows, :num_valid], local_columns[rows], temperature, buffer)
    return out


def _one_model(
    logits: torch.Tensor, columns: torch.Tensor, temperature: float, buffer: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Some rows' maximum, sum of exponentials and sampled logit (-inf: not here) [n, 3]; logits below the maximum, and
    their exponentials, [n, L] each."""
    scaled = _scaled(logits, temperature, buffer)
    maximum = scaled.amax(1)
    target = torch.where(columns >= 0, scaled.gather(1, columns.clamp(min=0)[:, None])[:, 0], -torch.inf)
    # A row of nothing but -inf keeps its maximum, but must not compute -inf - -inf.
    scaled.sub_(torch.where(maximum == -torch.inf, 0.0, maximum)[:, None])
    exponentials = scaled.exp()
    return torch.stack((maximum, exponentials.sum(1), target), dim=1), scaled, exponentials


def scale_rows_(gradient: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """`gradient` [N, L] times a scalar, in place. The product is formed in fp32 or better: a loss scale may lie beyond
    the range of fp16, a denominator between two numbers of bfloat16."""
    if gradient.dtype in (torch.float32, torch.float64):
        return gradient.mul_(factor.to(gradient.dtype))
    for rows in _row_chunks(gradient):
        gradient[rows] = (gradient[rows].float() * factor).to(gradient.dtype)
    return gradient


def _row_chunks(logits: torch.Tensor) -> Iterator[slice]:
    """Slices of rows that hold about `CHUNK_ENTRIES` entries each."""
    step = _rows_at_once(logits)
    for start in range(0, logits.shape[0], step):
        yield slice(start, start + step)


def _rows_at_once(logits: torch.Tensor) -> int:
    return max(1, CHUNK_ENTRIES // max(1, logits.shape[1]))


def _scaled(logits: torch.Tensor, temperature: float, buffer: torch.Tensor) -> torch.Tensor:
    """The logits divided by the temperature, in the buffer's dtype and the first rows of its memory."""
    copy = buffer[: len(logits)]
    if logits.dtype == copy.dtype:
        return torch.div(logits, temperature, out=copy)
    return copy.copy_(logits).div_(temperature)


def _buffers(logits: torch.Tensor, num_valid: int, dtype: torch.dtype) -> torch.Tensor:
    """Memory for two models' rows of one chunk: fresh memory for each would cost the CPU as much as the arithmetic."""
    return logits.new_empty(2, min(_rows_at_once(logits), logits.shape[0]), num_valid, dtype=dtype)


def _log_probabilities(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    normalizers: LogNormalizers,
    rows: slice,
    temperature: float,
    buffers: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """log p_S and log p_T of some rows' valid columns, in the buffers."""
    num_valid = buffers.shape[2]
    student = _scaled(student_logits[rows, :num_valid], temperature, buffers[0])
    teacher = _scaled(teacher_logits[rows, :num_valid], temperature, buffers[1])
    student.sub_(normalizers.student_max[rows, None]).sub_(normalizers.student_log_sum[rows, None])
    teacher.sub_(normalizers.teacher_max[rows, None]).sub_(normalizers.teacher_log_sum[rows, None])
    return student, teacher


def _sum_terms(
    sums: torch.Tensor, entry: torch.Tensor, slope: torch.Tensor, entry_clip: float | None, entry_floor: float | None
) -> None:
    """Some rows' sums [n, 3] of pass 2; the slopes of clamped entries are 0 afterwards, `entry` is used up."""
    if entry_clip is not None:
        clamped = _drop_clamped_slopes_(slope, entry, entry_clip, entry_floor)
        sums[:, 2] = entry.gt_(entry_clip).sum(1)
        entry = clamped
    sums[:, 0] = entry.sum(1)
    sums[:, 1] = slope.sum(1)


def _write_gradient(
    out: torch.Tensor, student_logp: torch.Tensor, slope: torch.Tensor, total_slope: torch.Tensor, factor: torch.Tensor
) -> None:
    """Some rows of pass 3; `slope` and `student_logp` are used up."""
    slope.sub_(student_logp.exp_().mul_(total_slope[:, None]))
    torch.mul(slope, factor[:, None], out=out)


def _drop_clamped_slopes_(
    slope: torch.Tensor, entry: torch.Tensor, entry_clip: float, entry_floor: float | None
) -> torch.Tensor:
    """Zeroes the slopes of entries outside the bounds, in place; the bounds are inside. Returns the clamped entries.

    A product with 0 and 1 in the working dtype runs in vector registers on the CPU, a boolean mask does not.
    """
    clamped = entry.clamp(min=entry_floor, max=entry_clip)
    if entry.device.type == "cpu" and math.isfinite(float(entry.sum() + slope.sum())):
        slope.mul_(torch.eq(entry, clamped, out=torch.empty_like(entry)))
        return clamped
    outside = entry > entry_clip
    if entry_floor is not None:
        outside |= entry < entry_floor
    slope.masked_fill_(outside, 0.0)
    return clamped
