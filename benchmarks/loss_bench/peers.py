"""The schemes of other projects, from the mathematics that their sources describe, and calls into Liger-Kernel.

Shards: z are the student's logits of this rank's columns; m = max z and S = sum exp(z - m) are over all ranks;
log p_S = (z - m) - log S. A rank's gradient needs the other ranks' share of d loss / d S, hence the collective in the
backward of autograd's schemes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import kl_div

from loss_bench.problem import Problem, row_chunks

NEMO_CHUNK = 1024
DEEPSPEED_ENTRIES = 1 << 24


def divergence_entries(student: torch.Tensor, teacher: torch.Tensor, beta: float) -> torch.Tensor:
    """Entries of the divergence from log-probabilities, elementwise, by `kl_div(log_target=True)`."""
    if beta == 0.0:
        return kl_div(student, teacher, reduction="none", log_target=True)
    if beta == 1.0:
        return kl_div(teacher, student, reduction="none", log_target=True)
    mixture = torch.logsumexp(torch.stack((student + math.log1p(-beta), teacher + math.log(beta))), 0)
    from_teacher = kl_div(mixture, teacher, reduction="none", log_target=True)
    from_student = kl_div(mixture, student, reduction="none", log_target=True)
    return beta * from_teacher + (1.0 - beta) * from_student


def _reduced(tensor: torch.Tensor, group: dist.ProcessGroup | None, maximum: bool = False) -> torch.Tensor:
    """`tensor` over the ranks of the group, in place; as it is where there is no group."""
    if group is not None:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX if maximum else dist.ReduceOp.SUM, group=group)
    return tensor


class _Summed(torch.autograd.Function):
    """Sum over the ranks of what each of them uses: the gradient is summed over the ranks, too."""

    @staticmethod
    def forward(ctx: Any, local: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
        ctx.group = group
        return _reduced(local.clone(), group)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _reduced(upstream.clone(), ctx.group), None


class _Total(torch.autograd.Function):
    """Sum over the ranks of what only the loss uses, and every rank's loss is the same one: the gradient passes."""

    @staticmethod
    def forward(ctx: Any, local: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
        return _reduced(local.clone(), group)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None]:
        return upstream, None


def megatron_kd(problem: Problem) -> torch.Tensor:
    """fp32 copies of both logits, shifted, their log-probabilities and the entries, all kept by autograd.

    Collectives: two maxima, two sums and the total forward; one sum backward.
    """
    group, beta = problem.group, problem.cell.beta
    student, teacher = problem.student_logits.float(), problem.teacher_logits.float()
    with torch.no_grad():
        teacher = teacher - _reduced(teacher.amax(-1), group, maximum=True)[:, None]
        student_max = _reduced(student.amax(-1), group, maximum=True)
        teacher_logp = teacher - _reduced(teacher.exp().sum(-1), group).log()[:, None]
    student = student - student_max[:, None]
    student_logp = student - _Summed.apply(student.exp().sum(-1), group).log()[:, None]
    token = _Total.apply(divergence_entries(student_logp, teacher_logp, beta).sum(-1), group)
    return (problem.scale(weighted=True) * token).sum()


def _log_softmax(logits: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """fp32 log-probabilities of some rows; two collectives."""
    logits = logits.float()
    logits = logits - _reduced(logits.amax(-1), group, maximum=True)[:, None]
    return logits - _reduced(logits.exp().sum(-1), group).log()[:, None]


class _ChunkedReverseKL(torch.autograd.Function):
    """Reverse KL of each token, some tokens at a time; backward computes everything again, collectives included."""

    @staticmethod
    def _chunk(
        student: torch.Tensor, teacher: torch.Tensor, group: dist.ProcessGroup | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """p_S, log p_S - log p_T and the KL of some rows; five collectives."""
        student_logp = _log_softmax(student, group)
        ratio = student_logp - _log_softmax(teacher, group)
        student_p = student_logp.exp()
        return student_p, ratio, _reduced((student_p * ratio).sum(-1), group)

    @staticmethod
    def forward(
        ctx: Any, student: torch.Tensor, teacher: torch.Tensor, group: dist.ProcessGroup | None
    ) -> torch.Tensor:
        ctx.save_for_backward(student, teacher)
        ctx.group = group
        chunks = zip(student.split(NEMO_CHUNK), teacher.split(NEMO_CHUNK), strict=True)
        return torch.cat([_ChunkedReverseKL._chunk(s, t, group)[2] for s, t in chunks])

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        student, teacher = ctx.saved_tensors
        gradient = torch.empty(student.shape, dtype=torch.float32, device=student.device)
        for start in range(0, len(student), NEMO_CHUNK):
            rows = slice(start, start + NEMO_CHUNK)
            student_p, ratio, total = _ChunkedReverseKL._chunk(student[rows], teacher[rows], ctx.group)
            gradient[rows] = student_p * (ratio - total[:, None]) * upstream[rows, None]
        return gradient.to(student.dtype), None, None


def nemo_rl(problem: Problem) -> torch.Tensor:
    """Chunks of 1024 tokens, five collectives each forward and five backward; the gradient is built in fp32."""
    token = _ChunkedReverseKL.apply(problem.student_logits, problem.teacher_logits, problem.group)
    return (problem.scale(weighted=True) * token).sum()


class _StackedForwardKL(torch.autograd.Function):
    """Forward KL of each token; maxima and sums of both models travel together, backward needs no collective."""

    @staticmethod
    def forward(
        ctx: Any, student: torch.Tensor, teacher: torch.Tensor, group: dist.ProcessGroup | None
    ) -> torch.Tensor:
        rows, width = student.shape
        chunks = list(row_chunks(rows, width, DEEPSPEED_ENTRIES))
        both = (student, teacher)
        maxima = torch.stack([model.amax(-1).float() for model in both])
        _reduced(maxima, group, maximum=True)
        sums = torch.empty_like(maxima)
        for chunk in chunks:
            for model, largest, total in zip(both, maxima, sums, strict=True):
                total[chunk] = (model[chunk].float() - largest[chunk, None]).exp().sum(-1)
        log_sums = _reduced(sums, group).log()
        token = torch.empty_like(log_sums[0])
        for chunk in chunks:
            student_logp, teacher_logp = _StackedForwardKL._logp(both, maxima, log_sums, chunk)
            token[chunk] = (teacher_logp.exp() * (teacher_logp - student_logp)).sum(-1)
        ctx.save_for_backward(student, teacher, maxima, log_sums)
        return _reduced(token, group)

    @staticmethod
    def _logp(
        both: tuple[torch.Tensor, torch.Tensor], maxima: torch.Tensor, log_sums: torch.Tensor, rows: slice
    ) -> list[torch.Tensor]:
        return [(model[rows].float() - maxima[i, rows, None]) - log_sums[i, rows, None] for i, model in enumerate(both)]

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        student, teacher, maxima, log_sums = ctx.saved_tensors
        gradient = torch.empty_like(student)
        for rows in row_chunks(*student.shape, DEEPSPEED_ENTRIES):
            student_logp, teacher_logp = _StackedForwardKL._logp((student, teacher), maxima, log_sums, rows)
            gradient[rows] = (student_logp.exp() - teacher_logp.exp()) * upstream[rows, None]
        return gradient, None, None


def deepspeed(problem: Problem) -> torch.Tensor:
    """Rows of 2^24 entries, three collectives forward, none backward; the gradient is written in the logits' dtype."""
    token = _StackedForwardKL.apply(problem.student_logits, problem.teacher_logits, problem.group)
    return (problem.scale(weighted=True) * token).sum()


def liger_jsd(problem: Problem, *, upcast: bool) -> torch.Tensor:
    """Liger's own `LigerJSD` on log-probabilities, in fp32 with `upcast`, else in the logits' dtype."""
    from liger_kernel.transformers.jsd import LigerJSD

    dtype = torch.float32 if upcast else problem.student_logits.dtype
    student = problem.student_logits.log_softmax(-1, dtype=dtype)
    teacher = problem.teacher_logits.log_softmax(-1, dtype=dtype)
    return LigerJSD(beta=problem.cell.beta)(student, teacher)


def liger_fused_linear_jsd(problem: Problem) -> torch.Tensor:
    """Liger's own `LigerFusedLinearJSD`; it rounds or keeps logits as it likes."""
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    loss = LigerFusedLinearJSD(jsd_beta=problem.cell.beta)
    heads = problem.student_head, problem.teacher_hidden, problem.teacher_head
    return loss(problem.student_hidden, *heads, None)
