"""Steps of a 1.7B-shaped student taught by a 4B-shaped teacher: time and memory of each phase, beside what the
operations and bytes alone would take and what `renio plan` counts; how long the GPU waits for the host."""

from __future__ import annotations

import atexit
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from gpu_check.program import output_of
from gpu_check.record import Record
from gpu_check.unit import Setting, Unit, seconds

STEPS = 4
"""The first of them compiles and chooses kernels, and allocates."""


def units(setting: Setting) -> list[Unit]:
    """The models are built when a unit first asks for them."""
    ready = Ready(setting)
    count = 2 if setting.toy else STEPS
    return [
        Unit("rates", rates),
        Unit("attention", attention),
        Unit("targets", partial(targets, ready=ready)),
        *(Unit(f"step {number}", partial(one_step, ready=ready, number=number)) for number in range(1, count + 1)),
        Unit("waits", partial(waits, ready=ready)),
        Unit("decoding", partial(decoding, ready=ready)),
    ]


class Ready:
    """The step, made once."""

    def __init__(self, setting: Setting) -> None:
        from step_bench.roles import Workload

        self.models = ("tiny", "tiny") if setting.toy else ("qwen3-1.7b", "qwen3-4b")
        self.work = Workload(4, 16, 8) if setting.toy else Workload(16, 480, 32)
        self._step: Any = None

    def step(self) -> Any:
        """Weights stay as they are drawn (a learning rate of 0), so that a step needs none before it."""
        if self._step is None:
            from step_bench.models import SHAPES
            from step_bench.roles import Step

            self._step = Step(*(SHAPES[name] for name in self.models), self.work)
            atexit.register(self._step.close)
        return self._step


def rates(record: Record, setting: Setting) -> None:
    """Of this device in this process: what shares of the peak are shares of."""
    device, toy = setting.device, setting.toy
    size = 64 if toy else 8192
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    record.add("bf16 product", 2 * size**3 / seconds(lambda: a @ b, device), "FLOP/s")
    source = torch.randn(1 << (16 if toy else 30), device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    record.add("copy", 2 * source.nbytes / seconds(lambda: target.copy_(source), device), "B/s")


def attention(record: Record, setting: Setting) -> None:
    """What attention of a packed row takes by each way there is, and what Transformer Engine says of its choice."""
    if not setting.is_cuda:
        record.add("attention of a packed row", None, "s", why="needs a GPU")
        return
    debug = {"NVTE_DEBUG": "1", "NVTE_DEBUG_LEVEL": "2"}
    said = output_of(setting, [sys.executable, "-m", "gpu_check.attention"], with_errors=True, **debug)
    lines = said.splitlines()
    found = json.loads(next(line for line in lines if line.startswith('{"Transformer Engine')))
    words = ("Disabling FusedAttention", "Available backends", "Selected backend", "Running with")
    chosen = list(dict.fromkeys(line[:600] for line in lines if any(word in line for word in words)))
    record.add("attention, Transformer Engine's choice", None, "1", why="see the detail", said=chosen[:12])
    for name, figures in found.items():
        for key, value in figures.items():
            if key == "error" and isinstance(value, str):
                record.add(f"attention, {name}", None, "s", why=value)
            else:
                unit = {"bytes": "B", "error": "1"}.get(key, "s")
                record.add(f"attention, {name}, {key}", value, unit)


def targets(record: Record, setting: Setting, ready: Ready) -> None:
    """Model operations and planned memory of each phase."""
    from step_bench.figures import phase_flops, planned_bytes
    from step_bench.models import SHAPES

    shapes = [SHAPES[name] for name in ready.models]
    for phase, flops in phase_flops(*shapes, ready.work).items():
        record.add(f"{phase}, model operations", flops, "FLOP", models=ready.models, work=vars(ready.work))
    for phase, planned in planned_bytes(*shapes, ready.work).items():
        record.add(f"{phase}, planned memory", planned, "B")


def one_step(record: Record, setting: Setting, ready: Ready, number: int) -> None:
    """The trainer's step `number`."""
    step = ready.step()
    if number == 1:
        record.add("models built", torch.cuda.memory_allocated() if setting.is_cuda else None, "B", **step.backends)
        record.add("kernels tuned before the first step", step.tuning_seconds, "s")
    taken = step.run(number)
    for phase, found in taken.phases.items():
        record.add(f"step {number}, {phase}, time", found.seconds, "s")
        record.add(f"step {number}, {phase}, memory", found.peak_bytes, "B")
    for key in ("loss", "grad_norm", "renio/pivotal_frac", "weight/max"):
        record.add(f"step {number}, {key}", taken.metrics[key], "1")


def waits(record: Record, setting: Setting, ready: Ready) -> None:
    """The share of each phase's time in which no kernel runs, and the kernels that it launches."""
    if not setting.is_cuda:
        record.add("rollout, GPU idle", None, "1", why="needs a GPU")
        return
    step, found = ready.step(), {}

    def watched(phase: str, run: Callable[[], Any]) -> Any:
        from torch.profiler import ProfilerActivity, profile

        # Kernels only: the host's own events would slow it, and it is the host that the GPU waits for.
        with profile(activities=[ProfilerActivity.CUDA]) as recorded:
            began = time.perf_counter()
            result = run()
            torch.cuda.synchronize()
            took = time.perf_counter() - began
        found[phase] = (took, *busy(recorded))
        return result

    step.watch.around = watched
    try:
        step.run(STEPS + 1)
    finally:
        step.watch.around = lambda phase, run: run()
    for phase, (took, on_device, kernels, costliest) in found.items():
        record.add(f"{phase}, GPU idle", 1 - on_device / took, "1", seconds=took, costliest=costliest)
        record.add(f"{phase}, kernels", kernels, "1")


def busy(recorded: Any) -> tuple[float, int, list[list[Any]]]:
    """(seconds in which at least one kernel or copy ran, how many there were, [name, seconds] of the costliest)."""
    from torch.autograd import DeviceType

    spans, by_name = [], {}
    for event in recorded.profiler.kineto_results.events():
        if event.device_type() == DeviceType.CUDA and event.duration_ns() > 0:
            spans.append((event.start_ns(), event.start_ns() + event.duration_ns()))
            by_name[event.name()] = by_name.get(event.name(), 0) + event.duration_ns()
    total, end = 0, 0
    for start, stop in sorted(spans):
        total += max(0, stop - max(start, end))
        end = max(end, stop)
    costliest = sorted(by_name.items(), key=lambda one: -one[1])[:8]
    return total / 1e9, len(spans), [[name[:100], took / 1e9] for name, took in costliest]


def decoding(record: Record, setting: Setting, ready: Ready) -> None:
    """Seconds of a decoding pass by the number of rows, and the least that its bytes take at the copy's rate."""
    from step_bench.figures import decode_bytes

    step, few, many = ready.step(), 4, 4 + (4 if setting.toy else 12)
    for rows in (2, 4) if setting.toy else (16, 128):
        prompts = step.prompts(rows)
        laps = []
        for tokens in (few, few, many):  # the first is thrown away
            if setting.is_cuda:
                torch.cuda.synchronize()
            began = time.perf_counter()
            step.sampler.sample(prompts, step.sampling_params(tokens), rng_stream=(1,))
            laps.append(time.perf_counter() - began)
        # The draws of a longer completion begin with those of the shorter one: the difference is passes alone.
        record.add(f"decoding pass, {rows} rows", (laps[2] - laps[1]) / (many - few), "s")
        least = decode_bytes(step.shapes["student"], rows, ready.work.prompt) / record.value("copy")
        record.add(f"decoding pass, {rows} rows, its bytes at the copy's rate", least, "s")
