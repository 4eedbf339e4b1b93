"""Time, memory and rates of this device, measured in one way for every scheme."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from loss_bench.problem import Cell, Problem
from loss_bench.schemes import Scheme

FLUSH_BYTES = 256 << 20
"""Written before each repetition: larger than any L2 cache, so that nothing of the inputs is left in it."""
COPY_BYTES = {"cuda": 2 << 30, "cpu": 128 << 20}


@dataclass(frozen=True)
class Timing:
    """Medians in seconds. `both` is the median of the sums, not the sum of the medians."""

    forward: float
    backward: float
    both: float
    repeats: int


@dataclass(frozen=True)
class Memory:
    """Bytes that a forward and a backward had allocated at most beyond the inputs, and what of them they return.

    `results`: gradients that do not lie where an input was.
    """

    peak: int
    results: int

    @property
    def extra(self) -> int:
        """Peak apart from the results."""
        return self.peak - self.results


class Clock:
    """Times of consecutive steps: CUDA events on a GPU, `perf_counter` on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.is_cuda = device.type == "cuda"
        self._flush = torch.empty(FLUSH_BYTES if self.is_cuda else 0, dtype=torch.uint8, device=device)

    def seconds(self, first: Callable[[], object], second: Callable[[object], object]) -> tuple[float, float]:
        """Seconds of `first()` and of `second(what first returned)`, straight after each other."""
        if not self.is_cuda:
            begin = time.perf_counter()
            found = first()
            middle = time.perf_counter()
            second(found)
            return middle - begin, time.perf_counter() - middle
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        self._flush.zero_()
        marks[0].record()
        found = first()
        marks[1].record()
        second(found)
        marks[2].record()
        torch.cuda.synchronize()
        return marks[0].elapsed_time(marks[1]) / 1e3, marks[1].elapsed_time(marks[2]) / 1e3


def run_once(scheme: Scheme, problem: Problem) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Loss and gradients of one call."""
    loss = scheme.forward(problem)
    return loss.detach(), torch.autograd.grad(loss, problem.leaves())


def working_copy(scheme: Scheme, problem: Problem) -> Problem:
    """A problem that the scheme may destroy, where it does; else the same."""
    if not scheme.overwrites:
        return problem
    return dataclasses.replace(problem, student_logits=problem.student_logits.detach().clone().requires_grad_())


def restore(scheme: Scheme, copy: Problem, problem: Problem) -> None:
    """What the last call destroyed."""
    if scheme.overwrites:
        with torch.no_grad():
            copy.student_logits.copy_(problem.student_logits)


def time_scheme(scheme: Scheme, problem: Problem, clock: Clock, *, repeats: int, warm_up: int) -> Timing:
    """Medians over `repeats` calls after `warm_up` more; inputs that a call destroys are restored in between."""
    copy, leaves, found = working_copy(scheme, problem), None, []
    leaves = copy.leaves()
    for number in range(warm_up + repeats):
        restore(scheme, copy, problem)
        lap = clock.seconds(lambda: scheme.forward(copy), lambda loss: torch.autograd.grad(loss, leaves))
        if number >= warm_up:
            found.append(lap)
    forward, backward = zip(*found, strict=True)
    return Timing(statistics.median(forward), statistics.median(backward), statistics.median(map(sum, found)), repeats)


def memory_of(scheme: Scheme, problem: Problem) -> Memory:
    """Peak and results of one call."""
    copy, results = working_copy(scheme, problem), 0

    def call() -> None:
        nonlocal results
        given = {leaf.untyped_storage().data_ptr() for leaf in copy.leaves()}
        _, gradients = run_once(scheme, copy)
        for gradient in gradients:
            if gradient.untyped_storage().data_ptr() not in given:
                results += gradient.untyped_storage().nbytes()

    peak = peak_bytes(call, problem.owner.device)
    return Memory(peak, results)


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Largest number of bytes that were allocated at one moment of `call()` beyond those before it.

    By the allocator's own account: its peak on a GPU, its record of allocations in the profiler on a CPU. Memory that
    libraries below torch take for themselves is not in it.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    with _silenced():
        profile.start()
    call()
    with _silenced():
        profile.stop()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Standard error closed for libraries, too: the profiler writes a line there at each start and stop."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def copy_bandwidth(device: torch.device, clock: Clock, repeats: int) -> float:
    """Bytes per second, read and written, of copying one large bf16 tensor into another."""
    source = torch.ones(COPY_BYTES[device.type] // 2, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    laps = [clock.seconds(lambda: target.copy_(source), lambda _: None)[0] for _ in range(repeats + 2)]
    return 2 * source.nbytes / statistics.median(laps[2:])


def bare_gemms(problem: Problem, clock: Clock, repeats: int) -> tuple[float, float]:
    """(seconds, FLOP/s) of nothing but the matrix products of a linear cell, each as one call over all tokens.

    Both models' logits and the gradient of the student's hidden states; with a trained head its gradient, too. All in
    the cell's dtype, into one buffer of logits.
    """
    cell = problem.cell
    hidden, head = problem.student_hidden.detach(), problem.student_head.detach()
    logits = torch.empty(cell.tokens, cell.width, dtype=cell.dtype, device=hidden.device)
    of_hidden, of_head = torch.empty_like(hidden), torch.empty_like(head) if cell.trained else None

    def products() -> None:
        torch.mm(problem.teacher_hidden, problem.teacher_head.T, out=logits)
        torch.mm(hidden, head.T, out=logits)
        torch.mm(logits, head, out=of_hidden)
        if of_head is not None:
            torch.mm(logits.T, hidden, out=of_head)

    with torch.no_grad():
        laps = [clock.seconds(products, lambda _: None)[0] for _ in range(repeats + 2)]
    seconds = statistics.median(laps[2:])
    width = (3 if cell.trained else 2) * cell.hidden + cell.teacher_hidden
    return seconds, 2.0 * cell.entries * width / seconds


def floor_bytes(cell: Cell) -> int:
    """Bytes a vocabulary entry that our passes must move: both models' logits in each, and the gradient once.

    Without bounds a KL needs no second pass.
    """
    size = torch.finfo(cell.dtype).bits // 8
    passes = 2 if cell.clip is None and cell.divergence != "JSD" else 3
    return (2 * passes + 1) * size


def free(device: torch.device) -> None:
    """Hands cached memory back, so that the next scheme starts as the first one did."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
