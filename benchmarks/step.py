"""Training steps of a whole model on one device, from random weights: seconds, tokens a second, memory of each phase.

    python benchmarks/step.py [--student qwen3-1.7b] [--teacher qwen3-4b] [--fp8 none|student|teacher|both] [--steps 3]

The shapes are those of published models, the weights random and the prompts random tokens, so nothing is downloaded and
the losses mean nothing in themselves; two runs that differ in precision alone have losses to compare. A step is the
trainer's own: completions are drawn, the teacher scores them, forward and backward of the weighted loss, optimizer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from step_bench.models import SHAPES
from step_bench.roles import PHASES, Precision, Step, Taken, Workload


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Losses, and each phase's figures: medians over the steps after the first. The file is written after each step."""
    work = Workload(options.sequences, options.prompt, options.completion, options.max_tokens)
    precision = Precision(options.fp8, options.fp8_recipe, options.emulate, bf16=not options.fp32)
    begin = time.perf_counter()
    step = Step(SHAPES[options.student], SHAPES[options.teacher], work, precision, lr=1e-5)
    taken: list[Taken] = []
    figures: dict[str, Any] = {}
    for number in range(1, options.steps + 1):
        taken.append(step.run(number))
        figures = figures_of(taken, work) | {
            "device": torch.cuda.get_device_name() if step.layout.device.type == "cuda" else "CPU",
            "torch": torch.__version__,
            "options": vars(options) | {"out": str(options.out)},
            "seconds": time.perf_counter() - begin,
        }
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(figures, indent=2) + "\n")
    step.close()
    return figures


def figures_of(taken: list[Taken], work: Workload) -> dict[str, Any]:
    """Of the steps so far: drawn tokens of the rollout, tokens read in the other two phases."""
    timed, counts = taken[1:] or taken, {"rollout": work.drawn, "teacher": work.read, "train": work.read}
    phases = {}
    for name in PHASES.values():
        seconds = statistics.median(one.phases[name].seconds for one in timed)
        peak = taken[-1].phases[name].peak_bytes
        phases[name] = {
            "seconds": seconds,
            "tokens": counts[name],
            "tokens_per_s": counts[name] / seconds,
            "peak_gib": None if peak is None else peak / 2**30,
        }
    return {
        "losses": [one.metrics["loss"] for one in taken],
        "grad_norms": [one.metrics["grad_norm"] for one in taken],
        "phases": phases,
    }


def profiled(options: argparse.Namespace) -> str:
    """The costliest operations of a step, by the time that the profiler gives each itself."""
    from torch.profiler import ProfilerActivity, profile

    work = Workload(options.sequences, options.prompt, options.completion, options.max_tokens)
    precision = Precision(options.fp8, options.fp8_recipe, options.emulate, bf16=not options.fp32)
    step = Step(SHAPES[options.student], SHAPES[options.teacher], work, precision, lr=1e-5)
    step.run(1)
    is_cuda = step.layout.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
    with profile(activities=activities) as recorded:
        step.run(2)
    step.close()
    key = "self_device_time_total" if is_cuda else "self_cpu_time_total"
    events = sorted(recorded.key_averages(), key=lambda event: -getattr(event, key))
    whole = sum(getattr(event, key) for event in events)
    lines = [f"{getattr(event, key) / whole:6.1%}  {event.count:7} calls  {event.key[:90]}" for event in events[:12]]
    return "\n".join(lines)


def main() -> None:
    """Prints the table and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", choices=SHAPES, default="qwen3-1.7b")
    parser.add_argument("--teacher", choices=SHAPES, default="qwen3-4b")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=256, help="tokens of each prompt")
    parser.add_argument("--completion", type=int, default=256, help="tokens of each completion")
    parser.add_argument("--max-tokens", type=int, default=8192, help="of a packed row")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--fp8", choices=("none", "student", "teacher", "both"), default="none")
    parser.add_argument("--fp8-recipe", default="tensorwise")
    parser.add_argument("--emulate", action="store_true", help="emulated FP8: precision.emulate_fp8")
    parser.add_argument("--fp32", action="store_true", help="fp32 instead of bf16 parameters")
    parser.add_argument("--profile", action="store_true", help="the costliest operations of one step instead")
    parser.add_argument("--out", type=Path, help="JSON file of the figures, written after each step")
    options = parser.parse_args()
    if options.profile:
        print(profiled(options))
        return
    figures = run(options)
    print(f"{options.student} taught by {options.teacher}, fp8: {options.fp8}, on {figures['device']}")
    for name, phase in figures["phases"].items():
        peak = "" if phase["peak_gib"] is None else f"  peak {phase['peak_gib']:6.2f} GiB"
        print(f"{name:8} {phase['seconds']:9.3f} s  {phase['tokens_per_s']:10.0f} tokens/s{peak}")
    print("loss     " + " ".join(f"{loss:.5f}" for loss in figures["losses"]))


if __name__ == "__main__":
    main()
