"""Training steps of a whole model on one device, from random weights: seconds, tokens a second, memory of each phase.

    python benchmarks/step.py [--student qwen3-1.7b] [--teacher qwen3-4b] [--fp8 none|student|teacher|both] [--steps 3]

The shapes are those of published models, the weights random and the prompts random tokens, so nothing is downloaded and
the losses mean nothing in themselves; two runs that differ in precision alone have losses to compare. A step is the
trainer's own: completions are drawn, the teacher scores them, forward and backward of the weighted loss, optimiser.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from renio_megatron.algorithms.distillation import Distillation
from renio_megatron.cli.launch import become_single_rank
from renio_megatron.megatron.architecture import Architecture
from renio_megatron.megatron.learner import MegatronLearner
from renio_megatron.megatron.model import ModelPart, build_model
from renio_megatron.megatron.sampler import MegatronSampler
from renio_megatron.megatron.start import start, stop
from renio_megatron.megatron.teacher import MegatronTeacher
from renio_megatron.megatron.teacher_weights import TeacherWeights
from renio_megatron.parallel.layout import Layout
from renio_megatron.records import Decoding, Prompt
from renio_megatron.settings import (
    HeadConfig,
    LossConfig,
    ParallelConfig,
    PrecisionConfig,
    TeacherPrecisionConfig,
    TrainConfig,
    WeightingConfig,
)


def qwen3(layers: int, hidden: int, ffn: int, heads: int, groups: int, vocab: int = 151936) -> Architecture:
    """A dense Qwen3 of this shape, tied, with heads of 128 columns."""
    return Architecture(
        family="qwen3",
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=128,
        layernorm_epsilon=1e-6,
        qk_layernorm=True,
        add_qkv_bias=False,
        init_method_std=0.02,
        vocab_size=vocab,
        tied=True,
        rotary_base=1e6,
        rope_scaling_factor=None,
        max_sequence_length=4096,
    )


SHAPES = {
    "tiny": qwen3(2, 64, 192, 2, 1, vocab=512),
    "qwen3-0.6b": qwen3(28, 1024, 3072, 16, 8),
    "qwen3-1.7b": qwen3(28, 2048, 6144, 16, 8),
    "qwen3-4b": qwen3(36, 2560, 9728, 32, 8),
}
PHASES = {"rollout": "time/rollout_s", "teacher": "time/teacher_s", "train": "time/train_s"}


@dataclass(frozen=True)
class Phase:
    """One role's part of a step.

    Attributes:
        seconds: median over the steps after the first.
        tokens: what it computes: drawn tokens of the rollout, tokens read in the other two.
        peak_gib: the device's largest allocation in it, of the last step; None on a CPU.
    """

    seconds: float
    tokens: int
    peak_gib: float | None


class Watched:
    """A role whose calls end with the device idle, so that the step's clock sees what it cost."""

    def __init__(self, role: Any, layout: Layout, peaks: dict[str, float], phase: str) -> None:
        self._role, self._layout, self._peaks, self._phase = role, layout, peaks, phase

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._role, name)
        return self._watched(value) if name in ("sample", "score", "update") else value

    def _watched(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._layout.device.type != "cuda":
                return method(*args, **kwargs)
            torch.cuda.reset_peak_memory_stats()
            result = method(*args, **kwargs)
            torch.cuda.synchronize()
            self._peaks[self._phase] = torch.cuda.max_memory_allocated() / 2**30
            return result

        return call


def random_model(part: ModelPart, seed: int) -> ModelPart:
    """Fills a model that was built without weights, on its device: matrices by their deviation, norms with 1."""
    generator = torch.Generator(part.layout.device).manual_seed(seed)
    with torch.no_grad():
        for _, parameter in part.named_parameters():
            if parameter.dim() > 1:
                drawn = torch.empty(parameter.shape, dtype=parameter.dtype, device=part.layout.device)
                parameter.copy_(drawn.normal_(0.0, part.architecture.init_method_std, generator=generator))
            else:
                parameter.fill_(1.0)
    return part


def cast_roles(options: argparse.Namespace, layout: Layout, peaks: dict[str, float]) -> Distillation:
    """The trainer's step over two random models, its kernels tuned."""
    parallel, head, weighting = ParallelConfig(), HeadConfig(), WeightingConfig()
    bf16 = not options.fp32
    train = TrainConfig(
        bf16=bf16, global_batch_size=options.sequences, max_tokens_per_micro_batch=options.max_tokens, clip_grad=1.0
    )
    fp8 = {"fp8": "hybrid", "fp8_recipe": options.fp8_recipe, "emulate_fp8": options.emulate}
    student_fp8 = fp8 if options.fp8 in ("student", "both") else {}
    teacher_fp8 = fp8 if options.fp8 in ("teacher", "both") else {}
    student, teacher = SHAPES[options.student], SHAPES[options.teacher]
    shared = {"vocab_size": min(student.vocab_size, teacher.vocab_size), "initialise": False}
    part = build_model(student, layout, parallel, train, PrecisionConfig(**student_fp8), **shared)
    teacher_part = build_model(
        teacher, layout, parallel, train, TeacherPrecisionConfig(**teacher_fp8), trained=False, **shared
    )
    learner = MegatronLearner(random_model(part, 1), train, parallel, head, temperature=1.0, pad_id=0)
    scorer = MegatronTeacher(TeacherWeights(random_model(teacher_part, 2)), train, head, temperature=1.0, pad_id=0)
    sampler = MegatronSampler(part, seed=1, temperature=1.0, stop_ids=(), pad_id=0)
    distillation = Distillation(
        Watched(sampler, layout, peaks, "rollout"),
        Watched(scorer, layout, peaks, "teacher"),
        Watched(learner, layout, peaks, "train"),
        layout=layout,
        decoding=Decoding(1.0, None, None, options.completion, None),
        loss=LossConfig(),
        weighting=weighting,
        head=head,
        recompute_student_scores=False,
        lr_at=lambda step: 1e-5,
    )
    distillation.tune(options.max_tokens, say=print)
    return distillation


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Losses, and each phase's figures."""
    layout = start(ParallelConfig(), seed=1)
    peaks: dict[str, float] = {}
    distillation = cast_roles(options, layout, peaks)
    draw = random.Random(0)
    vocab = min(SHAPES[options.student].vocab_size, SHAPES[options.teacher].vocab_size)
    prompts = []
    for index in range(options.sequences):
        ids = tuple(draw.randrange(vocab) for _ in range(options.prompt))
        prompts.append(Prompt(index, ids, ids))
    steps, begin = [], time.perf_counter()
    for step in range(1, options.steps + 1):
        steps.append(distillation.step(prompts, step))
    stop()
    drawn = options.sequences * options.completion
    read = options.sequences * (options.prompt + options.completion - 1)
    counts = {"rollout": drawn, "teacher": read, "train": read}
    timed = steps[1:] or steps
    phases = {
        name: Phase(statistics.median(metrics[key] for metrics in timed), counts[name], peaks.get(name))
        for name, key in PHASES.items()
    }
    return {
        "device": torch.cuda.get_device_name() if layout.device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "options": vars(options) | {"out": str(options.out)},
        "losses": [metrics["loss"] for metrics in steps],
        "grad_norms": [metrics["grad_norm"] for metrics in steps],
        "phases": {
            name: vars(phase) | {"tokens_per_s": phase.tokens / phase.seconds} for name, phase in phases.items()
        },
        "seconds": time.perf_counter() - begin,
    }


def profiled(options: argparse.Namespace) -> str:
    """The costliest operations of a step, by the time that the profiler gives each itself."""
    from torch.profiler import ProfilerActivity, profile

    layout = start(ParallelConfig(), seed=1)
    distillation = cast_roles(options, layout, {})
    ids = tuple(range(1, options.prompt + 1))
    prompts = [Prompt(index, ids, ids) for index in range(options.sequences)]
    distillation.step(prompts, 1)
    is_cuda = layout.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
    with profile(activities=activities) as recorded:
        distillation.step(prompts, 2)
    stop()
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
    parser.add_argument("--out", type=Path, help="JSON file of the figures")
    options = parser.parse_args()
    become_single_rank()
    if options.profile:
        print(profiled(options))
        return
    figures = run(options)
    print(f"{options.student} taught by {options.teacher}, fp8: {options.fp8}, on {figures['device']}")
    for name, phase in figures["phases"].items():
        peak = "" if phase["peak_gib"] is None else f"  peak {phase['peak_gib']:6.2f} GiB"
        print(f"{name:8} {phase['seconds']:9.3f} s  {phase['tokens_per_s']:10.0f} tokens/s{peak}")
    print("loss     " + " ".join(f"{loss:.5f}" for loss in figures["losses"]))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
