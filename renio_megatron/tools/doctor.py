"""Checks of a machine or cluster before a run; each check yields verdicts that are the same on every rank."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from renio_megatron.config import LossConfig, WeightingConfig
from renio_megatron.losses.distillation import DistillationOutput, distillation_loss
from renio_megatron.losses.linear_distillation import linear_distillation_loss
from renio_megatron.objective.reference import reference_objective
from renio_megatron.parallel.collectives import gather_objects
from renio_megatron.parallel.devices import device_identity
from renio_megatron.parallel.layout import Axis, ParallelLayout
from renio_megatron.parallel.vocab import VocabShard
from renio_megatron.runner.environment import differences, rank_report, versions

SIZES = {"gloo": (1 << 16, 1 << 20, 1 << 23), "nccl": (1 << 20, 1 << 24, 1 << 28)}
"""Bytes of the all-reduces that are timed, by backend."""

REPEATS = 5
SLOWEST_SHARE = 0.5
"""Least share of the fastest group's bandwidth that every group of its axis must have over NCCL. Gloo's ranks share
cores and memory, so theirs is not judged."""

TOLERANCES = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (1e-5, 2.0**-7)}
"""Allowed errors of the loss and of its gradients, relative to the largest entry. Gradients of bf16 tensors are rounded
to bf16, those of the hidden states on every tensor rank before they are summed."""

BETAS = {"forward KL": 0.0, "JSD": 0.5, "reverse KL": 1.0}
_VOCABULARY, _SEQUENCES, _TOKENS = 101, 3, 12
_WIDTH, _TEACHER_WIDTH = 16, 24
_TEMPERATURE = 1.1
_WEIGHTING = WeightingConfig(name="renio", threshold=0.3, ceiling=2.0)
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Verdict:
    """One line of the report of `renio doctor`.

    Attributes:
        is_good: whether a run may rely on it.
        what: the thing that was checked.
        found: the observation, and the fix where it is not good.
    """

    is_good: bool
    what: str
    found: str

    def __str__(self) -> str:
        """The verdict as one line.

        >>> print(Verdict(True, "devices", "1 x cpu"))
        ok    devices                  1 x cpu
        """
        return f"{'ok' if self.is_good else 'FAIL':6}{self.what:25}{self.found}"


def examine(layout: ParallelLayout, *, dtype: torch.dtype, warnings: Sequence[str] = ()) -> Iterator[Verdict]:
    """All verdicts, one after the other; every rank must take them all, because the checks are collective.

    Args:
        layout: this rank's layout; process groups are initialized.
        dtype: of logits, hidden states and heads in the loss's check, fp32 or bf16.
        warnings: this rank's warnings about its environment variables.
    """
    said = [warning for found in gather_objects(list(warnings)) for warning in found]
    yield Verdict(not said, "environment", said[0] if said else "no variable contradicts the layout")
    yield from check_world(layout)
    groups = list(check_groups(layout))
    yield from groups
    if all(verdict.is_good for verdict in groups):
        yield from measure_groups(layout)
        for name, beta in BETAS.items():
            yield check_loss(layout, name, beta, dtype)
            yield check_linear_loss(layout, name, beta, dtype)


def check_world(layout: ParallelLayout) -> Iterator[Verdict]:
    """Checks that versions and devices are alike on all ranks, and that no two ranks share a GPU."""
    mine = (*rank_report(layout), device_identity(layout.device))
    reports = gather_objects(mine)
    odd = differences([report[:3] for report in reports])
    unlike = [line for line in odd if "install the same" in line]
    yield Verdict(not unlike, "versions", " ".join(unlike) or versions())
    found = f"{layout.world_size} x {mine[2]}, {len({report[0] for report in reports})} node(s)"
    places = [(node, identity) for node, _, _, identity in reports if identity]
    shared = [rank for rank, place in enumerate(places) if places.index(place) != rank]
    if shared:
        first = places.index(places[shared[0]])
        found = (
            f"ranks {first} and {shared[0]} share a GPU: there are more ranks on {reports[first][0]} than GPUs, or "
            "LOCAL_RANK is wrong. Start one rank a GPU."
        )
    slow = [line for line in odd if line not in unlike]
    yield Verdict(not (shared or slow), "devices", " ".join([found, *slow]))


def check_groups(layout: ParallelLayout) -> Iterator[Verdict]:
    """Checks that an all-reduce over each axis sums exactly the ranks that belong to it."""
    for name, axis in _axes(layout).items():
        numbers = torch.tensor([1.0, layout.rank], device=layout.device)
        if axis.size > 1:
            dist.all_reduce(numbers, group=axis.group)
        wrong = numbers.tolist() != [len(axis.ranks), sum(axis.ranks)]
        is_good = not any(gather_objects(wrong))
        ranks = f"{layout.world_size // axis.size} group(s) of {axis.size}"
        hint = (
            "" if is_good else "; the sum over the group is wrong. See NCCL_DEBUG=INFO for the transport that it took."
        )
        yield Verdict(is_good, f"{name} group", f"{ranks}{hint}")


def measure_groups(layout: ParallelLayout) -> Iterator[Verdict]:
    """All-reduce bandwidth of each axis with more than one rank: that of its slowest group."""
    backend = dist.get_backend() if dist.is_initialized() else "gloo"
    for name, axis in _axes(layout).items():
        if axis.size > 1:
            shown = []
            rates: list[float] = []
            for size in SIZES[backend]:
                seconds = _seconds_of_all_reduce(layout, axis, size)
                rates = gather_objects(bus_bandwidth(size, axis.size, seconds))
                shown.append(f"{_bytes(size)} {min(rates):.3g} GB/s")
            yield bandwidth_verdict(name, ", ".join(shown), rates, backend)


def bandwidth_verdict(name: str, shown: str, rates: list[float], backend: str) -> Verdict:
    """The verdict on an axis: not good where, over NCCL, one of its groups is much slower than another.

    Args:
        name: of the axis.
        shown: the measurements as text.
        rates: bandwidth of each rank in the largest all-reduce, GB/s.
        backend: `nccl` or `gloo`.

    >>> bandwidth_verdict("data", "256 MiB 40 GB/s", [200.0, 40.0], "nccl").is_good
    False
    """
    slowest = min(rates)
    if backend == "nccl" and slowest < SLOWEST_SHARE * max(rates):
        rank = rates.index(slowest)
        hint = f"the group of rank {rank} is slower than another ({max(rates):.3g} GB/s): look at that node's links"
        return Verdict(False, f"{name} all-reduce", f"{shown}; {hint} (nvidia-smi nvlink -s, ibstat).")
    return Verdict(True, f"{name} all-reduce", shown)


def bus_bandwidth(size: int, ranks: int, seconds: float) -> float:
    """GB/s that each link carries in a ring all-reduce of `size` bytes.

    >>> bus_bandwidth(10**9, 2, 1.0), bus_bandwidth(10**9, 4, 1.0)
    (1.0, 1.5)
    """
    return 2 * (ranks - 1) / ranks * size / seconds / 1e9


def check_loss(layout: ParallelLayout, name: str, beta: float, dtype: torch.dtype) -> Verdict:
    """Compares the sharded loss of a small problem with the dense one in fp64: value, gradient and weights.

    Args:
        layout: its tensor ranks share the vocabulary, its context ranks each sequence, its data ranks the batch.
        name, beta: of the divergence.
        dtype: of the logits; both losses read the same rounded ones.
    """
    problem = _Problem.make(layout, dtype)
    student, teacher = problem.logits()
    whole = student.double().requires_grad_()
    expected = _expected(problem, whole, teacher.double(), beta)
    local = problem.columns(student[problem.rows]).requires_grad_()
    out = distillation_loss(
        local,
        problem.columns(teacher[problem.rows]),
        *problem.tokens(),
        LossConfig(beta=beta, temperature=_TEMPERATURE),
        _WEIGHTING,
        problem.shard,
        batch_group=layout.data.group,
        sequence_group=layout.context.group,
    )
    out.loss.backward()
    assert whole.grad is not None and local.grad is not None
    gradients = [(local.grad.cpu() / layout.data.size, problem.columns(whole.grad[problem.rows]).cpu())]
    return loss_verdict(f"loss, {name}", dtype, _errors(problem, out, expected, gradients))


def check_linear_loss(layout: ParallelLayout, name: str, beta: float, dtype: torch.dtype) -> Verdict:
    """Compares the loss from hidden states and LM heads, as the trainer computes it, with the dense one: value, both
    gradients and weights."""
    problem = _Problem.make(layout, dtype)
    hidden, head = problem.hidden.double().requires_grad_(), problem.head.double().requires_grad_()
    teacher = problem.teacher_hidden.double() @ problem.teacher_head.double().T
    expected = _expected(problem, hidden @ head.T, teacher, beta)
    states = problem.hidden[problem.rows].to(layout.device).requires_grad_()
    shard = problem.columns(problem.head.T).T.contiguous().requires_grad_()
    out = linear_distillation_loss(
        states,
        shard,
        problem.teacher_hidden[problem.rows].to(layout.device),
        problem.columns(problem.teacher_head.T).T.contiguous(),
        *problem.tokens(),
        LossConfig(beta=beta, temperature=_TEMPERATURE),
        _WEIGHTING,
        problem.shard,
        batch_group=layout.data.group,
        sequence_group=layout.context.group,
    )
    out.loss.backward()
    assert hidden.grad is not None and head.grad is not None and states.grad is not None and shard.grad is not None
    of_head = _summed(layout, shard.grad.double())
    gradients = [
        (states.grad.cpu() / layout.data.size, hidden.grad[problem.rows]),
        (of_head.cpu() / layout.data.size, problem.columns(head.grad.T).T.cpu()),
    ]
    return loss_verdict(f"linear loss, {name}", dtype, _errors(problem, out, expected, gradients))


def _expected(problem: _Problem, student: torch.Tensor, teacher: torch.Tensor, beta: float) -> dict[str, torch.Tensor]:
    """The dense objective of the whole batch's logits; its gradient is in `.grad` of the leaves."""
    expected = reference_objective(
        student,
        teacher,
        problem.token_ids,
        problem.owner,
        problem.num_sequences,
        beta=beta,
        temperature=_TEMPERATURE,
        threshold=_WEIGHTING.threshold,
        ceiling=_WEIGHTING.ceiling,
        cap=_WEIGHTING.cap,
    )
    expected["loss"].backward()
    return expected


def _errors(
    problem: _Problem,
    out: DistillationOutput,
    expected: dict[str, torch.Tensor],
    gradients: list[tuple[torch.Tensor, torch.Tensor]],
) -> list[float]:
    """The largest errors over all ranks of the value, the gradients (found, expected) and the weights."""
    layout = problem.layout
    value = _summed(layout, out.loss.detach().double()).cpu() / layout.data.size
    weights = expected["weights"][problem.first : problem.first + _SEQUENCES]
    errors = (
        _error(value, expected["loss"].detach()),
        max(_error(found.double(), wanted) for found, wanted in gradients),
        _error(out.weights.double().cpu(), weights),
    )
    return [max(column) for column in zip(*gather_objects(errors), strict=True)]


def _summed(layout: ParallelLayout, values: torch.Tensor) -> torch.Tensor:
    """The values summed over context-parallel and data-parallel ranks."""
    for axis in (layout.context, layout.data):
        if axis.size > 1:
            dist.all_reduce(values, group=axis.group)
    return values


def loss_verdict(name: str, dtype: torch.dtype, errors: list[float]) -> Verdict:
    """The verdict on a loss.

    Args:
        name: of the loss and its divergence.
        dtype: of the logits.
        errors: errors of the value, the gradient and the weights, each relative to the largest expected entry.

    >>> loss_verdict("loss, JSD", torch.float32, [1e-7, 1e-3, 0.0]).is_good
    False
    """
    value, gradient = TOLERANCES[dtype]
    is_good = all(error <= bound for error, bound in zip(errors, (value, gradient, value), strict=True))  # NaN is not
    found = (
        f"{str(dtype).removeprefix('torch.')}, relative errors: value {errors[0]:.1e} (allowed {value:.0e}), gradient "
        f"{errors[1]:.1e} ({gradient:.0e}), weights {errors[2]:.1e} ({value:.0e})"
    )
    hint = (
        "" if is_good else ". Try RENIO_KERNELS=torch; if that is good, report the kernels' failure with these lines."
    )
    return Verdict(is_good, name, found + hint)


@dataclass(frozen=True)
class _Problem:
    """A batch that every rank holds whole, on the CPU, and the rank's share of it.

    Attributes:
        layout: this rank's layout.
        hidden, head: the student's final hidden states [N, H] and LM head [V, H] in the dtype of the check.
        teacher_hidden, teacher_head: those of the teacher, with another H.
        token_ids, owner: int64 [N].
        rows: indices of this rank's tokens: its data rank's sequences, strided over context ranks.
        first: the first of its sequences.
        shard: its columns; those of the last rank end in padding where the ranks do not divide V.
    """

    layout: ParallelLayout
    hidden: torch.Tensor
    head: torch.Tensor
    teacher_hidden: torch.Tensor
    teacher_head: torch.Tensor
    token_ids: torch.Tensor
    owner: torch.Tensor
    rows: torch.Tensor
    first: int
    shard: VocabShard

    @classmethod
    def make(cls, layout: ParallelLayout, dtype: torch.dtype) -> _Problem:
        """The same batch on every rank, and this rank's share."""
        generator = torch.Generator().manual_seed(1)
        owner = torch.arange(_SEQUENCES * layout.data.size).repeat_interleave(_TOKENS)

        def drawn(rows: int, width: int) -> torch.Tensor:
            values = torch.randn(rows, width, generator=generator, dtype=torch.float64)
            return (values * width**-0.25).to(dtype)  # logits of deviation 1

        student = drawn(len(owner), _WIDTH), drawn(_VOCABULARY, _WIDTH)
        teacher = drawn(len(owner), _TEACHER_WIDTH), drawn(_VOCABULARY, _TEACHER_WIDTH)
        token_ids = torch.randint(_VOCABULARY, owner.shape, generator=generator)
        first, tensor = _SEQUENCES * layout.data.rank, layout.tensor
        mine = (owner >= first) & (owner < first + _SEQUENCES)
        rows = mine.nonzero()[:, 0][layout.context.rank :: layout.context.size]
        width = -(-_VOCABULARY // tensor.size)
        group = tensor.group if tensor.size > 1 else None
        shard = VocabShard(width * tensor.rank, width * (tensor.rank + 1), _VOCABULARY, group)
        return cls(layout, *student, *teacher, token_ids, owner, rows, first, shard)

    @property
    def num_sequences(self) -> int:
        """Sequences of the whole batch."""
        return _SEQUENCES * self.layout.data.size

    def logits(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The student's and the teacher's logits of the whole batch, [N, V] in the dtype of the check."""
        return self.hidden @ self.head.T, self.teacher_hidden @ self.teacher_head.T

    def tokens(self) -> tuple[torch.Tensor, torch.Tensor, int]:
        """(token_ids, owner, number of sequences) of this rank's tokens, on its device."""
        device = self.layout.device
        return self.token_ids[self.rows].to(device), (self.owner[self.rows] - self.first).to(device), _SEQUENCES

    def columns(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's columns of [..., V] on its device, padding filled with 0."""
        valid = whole.detach()[:, self.shard.start : self.shard.start + self.shard.num_valid]
        padding = valid.new_zeros(len(valid), self.shard.width - self.shard.num_valid)
        return torch.cat((valid, padding), 1).to(self.layout.device)


def _axes(layout: ParallelLayout) -> dict[str, Axis]:
    return {"tensor": layout.tensor, "pipeline": layout.pipeline, "context": layout.context, "data": layout.data}


def _seconds_of_all_reduce(layout: ParallelLayout, axis: Axis, size: int) -> float:
    """Median time of several all-reduces after a warm-up; reading an element synchronizes with a GPU."""
    values = torch.ones(size // 4, device=layout.device)
    times = []
    for _ in range(REPEATS + 1):
        values.fill_(1.0)
        values[0].item()
        dist.barrier(group=axis.group)
        begin = time.perf_counter()
        dist.all_reduce(values, group=axis.group)
        values[0].item()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference relative to the largest expected entry; 0 where there is none."""
    if not expected.numel():
        return 0.0
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12))


def _bytes(size: int) -> str:
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"
