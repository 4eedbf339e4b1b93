"""Entries and slopes of the divergences inside a Triton kernel, for a block of columns.

A divergence that is not here runs in `torch_ops`. Logarithms are base 2 throughout; a new form needs its number below,
a branch in `_terms` and a line in `triton_ops.FORMS`.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl
from triton.language.extra import libdevice

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether the kernels run in Triton's interpreter, on tensors of the CPU; Triton decides it where they are defined."""

INTERPRETER = tl.constexpr(IS_INTERPRETED)
LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
NOTHING = tl.constexpr(-1000.0)  # a power of two that is 0 in fp32 and has finite products

FORWARD_KL = tl.constexpr(0)
REVERSE_KL = tl.constexpr(1)
JSD = tl.constexpr(2)


@triton.jit
def normalizer(maximum, log_sum, inverse, part):
    """Two numbers: one to subtract from a logit before the multiplication by `scale`, one to subtract after it (log2 of
    the sum, converted from nats, less `part`).

    The division is never fused with a subtraction, so both passes get the same number.
    """
    return tl.div_rn(tl.load(maximum), inverse), tl.load(log_sum) * LOG2E - part


@triton.jit
def _terms(a, b, student_part, teacher_part, FORM: tl.constexpr):
    """Entry / ln 2, slope and p_S (JSD: times 1 - beta) from log2 p_S and log2 p_T (JSD: plus their parts, the log2 of
    their shares of the mixture); 0 for an entry of probability 0."""
    if FORM == FORWARD_KL:
        teacher_p = tl.exp2(b)
        entry = tl.where(teacher_p == 0, 0.0, teacher_p * (b - a))
        return entry, -teacher_p, tl.exp2(a)
    elif FORM == REVERSE_KL:
        student_p = tl.exp2(a)
        entry = tl.where(student_p == 0, 0.0, student_p * (a - b))
        return entry, entry * LN2 + student_p, student_p
    else:
        return _jsd_terms(a, b, student_part, teacher_part)


@triton.jit
def _jsd_terms(a, b, student_part, teacher_part):
    """Entry / ln 2, slope and (1 - beta) p_S from a = log2 (1 - beta) p_S and b = log2 beta p_T.

    With d <= 0 the smaller less the larger, log2 m = larger + log2 (1 + 2^d), and 2^d times the larger probability is
    the smaller one: two exponentials and a logarithm, no division.
    """
    apart = a - b
    student_larger = apart > 0
    apart = -tl.abs(apart)
    apart = tl.where(apart > NOTHING, apart, NOTHING)  # also where both are -inf
    ratio = tl.exp2(apart)
    over = tl.log2(1.0 + ratio) if INTERPRETER else libdevice.fast_log2f(1.0 + ratio)
    high = tl.exp2(tl.maximum(a, b))
    low = high * ratio
    of_high = high * -(over + tl.where(student_larger, student_part, teacher_part))
    of_low = low * (apart - (over + tl.where(student_larger, teacher_part, student_part)))
    slope = tl.where(student_larger, of_high, of_low)
    return of_high + of_low, slope * LN2, tl.where(student_larger, high, low)


@triton.jit
def bounded_terms(
    a, b, clip, floor, student_part, teacher_part, FORM: tl.constexpr, CLIPPED: tl.constexpr
):  # fmt: skip
    """`_terms` with the slope of an entry outside [floor, clip] dropped; the entry itself as it was.

    No entry of a JSD is below 0, so the floor does not apply: a negative one is a rounding error.
    """
    entry, slope, student_p = _terms(a, b, student_part, teacher_part, FORM)
    if CLIPPED:
        outside = entry > clip
        if FORM != JSD:
            outside |= entry < floor
        slope = tl.where(outside, 0.0, slope)
    return entry, slope, student_p


@triton.jit
def add_terms(
    entries, slopes, cut, a, b, clip, floor, student_part, teacher_part, FORM: tl.constexpr, CLIPPED: tl.constexpr
):  # fmt: skip
    """Three running sums of every lane after one more entry."""
    entry, slope, _ = bounded_terms(a, b, clip, floor, student_part, teacher_part, FORM, CLIPPED)
    if CLIPPED:
        cut += tl.where(entry > clip, 1.0, 0.0)
        entry = tl.minimum(entry, clip)
        if FORM != JSD:
            entry = tl.maximum(entry, floor)
    return entries + entry, slopes + slope, cut
