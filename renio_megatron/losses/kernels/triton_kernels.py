"""The passes over a shard's logits as Triton kernels: a program reads one row, or one part of it, block by block.

Everything that the loop needs stays in registers, one value per lane; lanes are reduced once, at the end of the row.
Exponents are base 2 with log2(e) / temperature folded into one factor, and the maximum is subtracted before that factor
is applied, so large logits lose no precision. Padding is excluded by index; only the block that holds the border is
masked, so that the other blocks load whole vectors.

Arguments that all kernels share: pointers to rows whose columns are adjacent, and the rows' strides in entries;
`num_valid` columns that are not padding; `blocks`, how many blocks a part has; `scale` = log2(e) / temperature and
`inverse` = 1 / temperature; BLOCK entries at once; STAGES of pipelined loads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from renio_megatron.losses.kernels.triton_terms import LN2, add_terms, bounded_terms, normalizer

LOWEST = tl.constexpr(-3.4028234663852886e38)  # where a running maximum starts: finite, so that -inf minus it is -inf


@triton.jit(do_not_specialize=["blocks"])
def statistics_kernel(
    student,
    teacher,
    columns,
    out,
    student_stride,
    teacher_stride,
    num_valid,
    blocks,
    scale,
    inverse,
    CROSS: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Both models' maxima and sums, sampled logits and cross term: [N, parts, 7]; in nats where a part is a WHOLE row,
    else in units of the logits for `merge_parts_kernel`. CROSS is `cross_term_sign`."""
    row, first, full, last = _place(num_valid, blocks, BLOCK)
    student += row * student_stride
    teacher += row * teacher_stride
    lanes = tl.arange(0, BLOCK)
    student_max = tl.full([BLOCK], LOWEST, tl.float32)
    teacher_max = tl.full([BLOCK], LOWEST, tl.float32)
    student_sum = tl.zeros([BLOCK], tl.float32)
    teacher_sum = tl.zeros([BLOCK], tl.float32)
    mean = tl.zeros([BLOCK], tl.float32)
    shift = 0.0
    if CROSS != 0:  # the models' logits may be far apart; most of that leaves the sum here
        shift = tl.load(teacher + first).to(tl.float32) - tl.load(student + first).to(tl.float32)
        shift = tl.where(tl.abs(shift) < 1e30, shift, 0.0)
    for start in tl.range(first, full, BLOCK, num_stages=STAGES):
        z = tl.load(student + start + lanes).to(tl.float32)
        u = tl.load(teacher + start + lanes).to(tl.float32)
        student_max, student_sum, teacher_max, teacher_sum, mean = _absorb_both(
            student_max, student_sum, teacher_max, teacher_sum, mean, z, u, scale, shift, CROSS
        )
    if full < last:
        valid = full + lanes < last
        z = tl.load(student + full + lanes, valid, other=float("-inf")).to(tl.float32)
        u = tl.load(teacher + full + lanes, valid, other=float("-inf")).to(tl.float32)
        student_max, student_sum, teacher_max, teacher_sum, mean = _absorb_both(
            student_max, student_sum, teacher_max, teacher_sum, mean, z, u, scale, shift, CROSS
        )
    student_max, student_sum, student_lift = _reduce(student_max, student_sum, scale)
    teacher_max, teacher_sum, teacher_lift = _reduce(teacher_max, teacher_sum, scale)
    cross = 0.0
    if CROSS != 0:
        lift = teacher_lift if CROSS > 0 else student_lift
        weight = teacher_sum if CROSS > 0 else student_sum
        apart = tl.where(teacher_sum > 0, teacher_max, 0.0) - tl.where(student_sum > 0, student_max, 0.0)
        cross = tl.sum(tl.where(lift > 0, lift * mean, 0.0), 0) - CROSS * (apart - shift) * weight
    column = tl.load(columns + row)
    here = (column >= first) & (column < last)
    student_target = tl.load(student + column, here, other=float("-inf")).to(tl.float32)
    teacher_target = tl.load(teacher + column, here, other=float("-inf")).to(tl.float32)
    out += (row * tl.num_programs(1) + tl.program_id(1)) * 7
    _write_model(out, out + 4, student_max, student_sum, student_target, scale, inverse, WHOLE)
    _write_model(out + 2, out + 5, teacher_max, teacher_sum, teacher_target, scale, inverse, WHOLE)
    tl.store(out + 6, cross * inverse if WHOLE else cross)


@triton.jit(do_not_specialize=["num_parts"])
def merge_parts_kernel(parts, out, num_parts, scale, inverse, CROSS: tl.constexpr, PARTS: tl.constexpr):
    """A row's statistics [N, 7] from those of its parts [N, parts, 7], always in the same order."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    parts += (row * num_parts + part) * 7
    valid = part < num_parts
    student_max = tl.load(parts, valid, other=LOWEST)
    student_sum = tl.load(parts + 1, valid, other=0.0)
    teacher_max = tl.load(parts + 2, valid, other=LOWEST)
    teacher_sum = tl.load(parts + 3, valid, other=0.0)
    student_target = tl.max(tl.load(parts + 4, valid, other=float("-inf")), 0)
    teacher_target = tl.max(tl.load(parts + 5, valid, other=float("-inf")), 0)
    cross = tl.load(parts + 6, valid, other=0.0)
    student_top, student_total, student_lift = _reduce(student_max, student_sum, scale)
    teacher_top, teacher_total, teacher_lift = _reduce(teacher_max, teacher_sum, scale)
    total = 0.0
    if CROSS != 0:
        lift = teacher_lift if CROSS > 0 else student_lift
        weight = teacher_sum if CROSS > 0 else student_sum
        below = tl.where(teacher_sum > 0, teacher_max - teacher_top, 0.0)
        below -= tl.where(student_sum > 0, student_max - student_top, 0.0)
        total = tl.sum(tl.where(lift * weight > 0, lift * (cross + CROSS * below * weight), 0.0), 0)
    out += row * 7
    _write_model(out, out + 4, student_top, student_total, student_target, scale, inverse, True)
    _write_model(out + 2, out + 5, teacher_top, teacher_total, teacher_target, scale, inverse, True)
    tl.store(out + 6, total * inverse)


@triton.jit(do_not_specialize=["blocks"])
def token_statistics_kernel(
    logits, columns, out, stride, num_valid, blocks, scale, inverse,
    WHOLE: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One model's maximum, sum and sampled logit, into columns 0, 1 and 4 of [N, parts, 7]; the rest is not written."""
    row, first, full, last = _place(num_valid, blocks, BLOCK)
    logits += row * stride
    lanes = tl.arange(0, BLOCK)
    maximum = tl.full([BLOCK], LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(first, full, BLOCK, num_stages=STAGES):
        z = tl.load(logits + start + lanes).to(tl.float32)
        maximum, total, _, _ = _absorb(maximum, total, z, scale)
    if full < last:
        z = tl.load(logits + full + lanes, full + lanes < last, other=float("-inf")).to(tl.float32)
        maximum, total, _, _ = _absorb(maximum, total, z, scale)
    top, total, _ = _reduce(maximum, total, scale)
    column = tl.load(columns + row)
    target = tl.load(logits + column, (column >= first) & (column < last), other=float("-inf")).to(tl.float32)
    out += (row * tl.num_programs(1) + tl.program_id(1)) * 7
    _write_model(out, out + 4, top, total, target, scale, inverse, WHOLE)


@triton.jit(do_not_specialize=["blocks"])
def sums_kernel(
    student, teacher, student_max, student_log_sum, teacher_max, teacher_log_sum, out,
    student_stride, teacher_stride, num_valid, blocks, scale, inverse, clip, floor, student_part, teacher_part,
    FORM: tl.constexpr, CLIPPED: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Clamped entries and slopes inside the clamp, nats, and the number of entries cut above: [N, parts, 3]. `clip` and
    `floor` in units of ln 2. Rows in falling order: the last ones that pass 1 read may still be in the cache."""
    row, first, full, last = _place(num_valid, blocks, BLOCK)
    row = tl.num_programs(0) - 1 - row
    student += row * student_stride
    teacher += row * teacher_stride
    student_base, student_rest = normalizer(student_max + row, student_log_sum + row, inverse, student_part)
    teacher_base, teacher_rest = normalizer(teacher_max + row, teacher_log_sum + row, inverse, teacher_part)
    lanes = tl.arange(0, BLOCK)
    entries = tl.zeros([BLOCK], tl.float32)
    slopes = tl.zeros([BLOCK], tl.float32)
    cut = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(first, full, BLOCK, num_stages=STAGES):
        z = tl.load(student + start + lanes).to(tl.float32)
        u = tl.load(teacher + start + lanes).to(tl.float32)
        a = (z - student_base) * scale - student_rest
        b = (u - teacher_base) * scale - teacher_rest
        entries, slopes, cut = add_terms(
            entries, slopes, cut, a, b, clip, floor, student_part, teacher_part, FORM, CLIPPED
        )
    if full < last:
        valid = full + lanes < last
        z = tl.load(student + full + lanes, valid, other=float("-inf")).to(tl.float32)
        u = tl.load(teacher + full + lanes, valid, other=float("-inf")).to(tl.float32)
        a = (z - student_base) * scale - student_rest
        b = (u - teacher_base) * scale - teacher_rest
        entries, slopes, cut = add_terms(
            entries, slopes, cut, a, b, clip, floor, student_part, teacher_part, FORM, CLIPPED
        )
    out += (row * tl.num_programs(1) + tl.program_id(1)) * 3
    tl.store(out, tl.sum(entries, 0) * LN2)
    tl.store(out + 1, tl.sum(slopes, 0))
    tl.store(out + 2, tl.sum(cut, 0))


@triton.jit(do_not_specialize=["blocks"])
def gradient_kernel(
    student, teacher, student_max, student_log_sum, teacher_max, teacher_log_sum, slope_total, factor, out,
    student_stride, teacher_stride, out_stride, num_valid, width, blocks,
    scale, inverse, clip, floor, student_part, teacher_part,
    FORM: tl.constexpr, CLIPPED: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """factor x (slope - p_S G) into `out`, which may be `student`; 0 in padding columns, and in a row whose factor is
    0, which is not read."""
    row, first, full, last = _place(num_valid, blocks, BLOCK)
    end = tl.minimum(first + blocks * BLOCK, width)
    student += row * student_stride
    teacher += row * teacher_stride
    out += row * out_stride
    lanes = tl.arange(0, BLOCK)
    times = tl.load(factor + row)
    after = first
    if times != 0.0:
        student_base, student_rest = normalizer(student_max + row, student_log_sum + row, inverse, student_part)
        teacher_base, teacher_rest = normalizer(teacher_max + row, teacher_log_sum + row, inverse, teacher_part)
        total = tl.load(slope_total + row)
        for start in tl.range(first, full, BLOCK, num_stages=STAGES):
            z = tl.load(student + start + lanes).to(tl.float32)
            u = tl.load(teacher + start + lanes, eviction_policy="evict_first").to(tl.float32)
            a = (z - student_base) * scale - student_rest
            b = (u - teacher_base) * scale - teacher_rest
            _, slope, student_p = bounded_terms(a, b, clip, floor, student_part, teacher_part, FORM, CLIPPED)
            gradient = (slope - student_p * total) * times
            tl.store(out + start + lanes, gradient.to(out.dtype.element_ty))
        after = full
        if full < last:
            valid = full + lanes < last
            z = tl.load(student + full + lanes, valid, other=float("-inf")).to(tl.float32)
            u = tl.load(teacher + full + lanes, valid, other=float("-inf")).to(tl.float32)
            a = (z - student_base) * scale - student_rest
            b = (u - teacher_base) * scale - teacher_rest
            _, slope, student_p = bounded_terms(a, b, clip, floor, student_part, teacher_part, FORM, CLIPPED)
            gradient = tl.where(valid, (slope - student_p * total) * times, 0.0)
            tl.store(out + full + lanes, gradient.to(out.dtype.element_ty), full + lanes < end)
            after = full + BLOCK
    for start in tl.range(after, end, BLOCK):
        zeros = tl.zeros([BLOCK], tl.float32)
        tl.store(out + start + lanes, zeros.to(out.dtype.element_ty), start + lanes < end)


@triton.jit(do_not_specialize=["blocks"])
def scale_kernel(gradient, factor, stride, width, blocks, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """`gradient` times the number at `factor`, in place; where that is 1 nothing is read or written."""
    times = tl.load(factor)
    if times != 1.0:
        row, first, full, last = _place(width, blocks, BLOCK)
        gradient += row * stride
        lanes = tl.arange(0, BLOCK)
        for start in tl.range(first, full, BLOCK, num_stages=STAGES):
            value = tl.load(gradient + start + lanes).to(tl.float32) * times
            tl.store(gradient + start + lanes, value.to(gradient.dtype.element_ty))
        if full < last:
            valid = full + lanes < last
            value = tl.load(gradient + full + lanes, valid, other=0.0).to(tl.float32) * times
            tl.store(gradient + full + lanes, value.to(gradient.dtype.element_ty), valid)


@triton.jit
def _place(width, blocks, BLOCK: tl.constexpr):
    """Row of this program, 64 bits; first column of its part, end of its last whole block, end of the part."""
    first = tl.program_id(1) * blocks * BLOCK
    last = tl.maximum(tl.minimum(first + blocks * BLOCK, width), first)
    return tl.program_id(0).to(tl.int64), first, first + (last - first) // BLOCK * BLOCK, last


@triton.jit
def _absorb(maximum, total, logits, scale):
    """Running maximum and sum of every lane after one more logit, at one exponential: that of the smaller of the two
    below the larger, by which either the new term or all the earlier ones are multiplied."""
    exponential = tl.exp2(tl.abs(logits - maximum) * -scale)
    above = logits > maximum
    total = tl.where(above, total, 1.0) * exponential + tl.where(above, 1.0, total)
    return tl.maximum(maximum, logits), total, exponential, above


@triton.jit
def _absorb_both(
    student_max, student_sum, teacher_max, teacher_sum, mean, z, u, scale, shift, CROSS: tl.constexpr
):  # fmt: skip
    """`_absorb` for both models; `mean` sums the exponentials of the model that the mean is over, times its logit less
    the other's."""
    student_max, student_sum, student_e, student_above = _absorb(student_max, student_sum, z, scale)
    teacher_max, teacher_sum, teacher_e, teacher_above = _absorb(teacher_max, teacher_sum, u, scale)
    if CROSS != 0:
        exponential = teacher_e if CROSS > 0 else student_e
        above = teacher_above if CROSS > 0 else student_above
        apart = ((u - z) - shift) * CROSS
        # An exponential of 0 makes 0 also of an infinite or undefined difference.
        product = tl.where(exponential == 0, 0.0, tl.where(above, mean, apart) * exponential)
        mean = product + tl.where(above, apart, mean)
    return student_max, student_sum, teacher_max, teacher_sum, mean


@triton.jit
def _reduce(maximum, total, scale):
    """Maximum over the lanes, sum relative to it, and the factor that each lane was multiplied by."""
    top = tl.max(maximum, 0)
    lift = tl.exp2((maximum - top) * scale)
    return top, tl.sum(total * lift, 0), lift


@triton.jit
def _write_model(out, out_target, top, total, target, scale, inverse, WHOLE: tl.constexpr):
    """Stores one model's maximum and sum, and its sampled logit; those of a WHOLE row in nats."""
    if WHOLE:
        top, total = _in_nats(top, total, scale, inverse)
        target *= inverse
    tl.store(out, top)
    tl.store(out + 1, total)
    tl.store(out_target, target)


@triton.jit
def _in_nats(top, total, scale, inverse):
    """Maximum of logits / temperature, and the sum relative to the value of `normalizer` for the rounded maximum."""
    maximum = top * inverse
    lifted = total * tl.exp2((top - tl.div_rn(maximum, inverse)) * scale)
    return tl.where(total > 0, maximum, float("-inf")), tl.where(total > 0, lifted, 0.0)
