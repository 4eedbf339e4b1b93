"""FP8 by Transformer Engine: what it costs in time and memory, and what it does to losses, log ratios, verdicts and
weights. A 1.7B-shaped student and a 4B-shaped teacher with random weights on rollouts that nobody drew, so that every
precision reads the same tokens; and the modular chain's trained models by `renio compare-precision`."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gpu_check.machine import ROOT
from gpu_check.record import Record
from gpu_check.unit import Setting, Unit

VARIANTS = (("both", "tensorwise"), ("teacher", "tensorwise"), ("student", "tensorwise"), ("both", "blockwise"))
FIGURES = (
    *(
        "student_logp/absolute_rms",
        "student_logp/absolute_max",
        "teacher_logp/absolute_rms",
        "teacher_logp/absolute_max",
    ),
    *("pivotal/flipped", "pivotal/lost", "pivotal/gained", "weight/relative_rms", "weight/relative_max"),
)
"""Of `diagnose.precision.score_errors`: what needs no divergence."""
OF_A_STEP = ("divergence/token_relative", "divergence/mean_relative")
LEAVES_AT_MOST = 4 << 30
"""Bytes of the device's memory after a unit; above, the next one gets a process of its own."""


def obstacle(setting: Setting) -> str | None:
    """Why the stage does not run here; at toy size FP8 is emulated."""
    from renio_megatron.megatron.model.backend import te_problem

    return None if setting.toy or te_problem() is None else f"Transformer Engine does not import: {te_problem()}"


def units(setting: Setting) -> list[Unit]:
    """The baseline first: everything else is compared with it."""
    chains = [Unit(f"modular chain, {recipe}", partial(chain, recipe=recipe)) for recipe in ("tensorwise", "blockwise")]
    variants = [Unit(f"{fp8} in FP8, {recipe}", partial(variant, fp8=fp8, recipe=recipe)) for fp8, recipe in VARIANTS]
    return [Unit("bf16", baseline), *variants[:3], chains[0], Unit("fp32", fp32), variants[3], chains[1]]


def _step(setting: Setting, precision: Any) -> Any:
    from step_bench.models import SHAPES
    from step_bench.roles import Step, Workload

    names = ("tiny", "tiny") if setting.toy else ("qwen3-1.7b", "qwen3-4b")
    work = Workload(4, 24, 8) if setting.toy else Workload(16, 256, 256)
    return Step(*(SHAPES[name] for name in names), work, precision)


def _measured(record: Record, setting: Setting, name: str, precision: Any, *, update: bool = True) -> tuple[Any, Any]:
    """Scores and metrics of one precision; time and memory of each phase, the first pass thrown away."""
    step = _step(setting, precision)
    try:
        rollouts = step.rollouts()
        step.scores(rollouts, update=update)
        scores, taken = step.scores(rollouts, update=update)
        for phase, found in taken.phases.items():
            record.add(f"{name}, {phase}, time", found.seconds, "s")
            record.add(f"{name}, {phase}, memory", found.peak_bytes, "B")
        record.add(f"{name}, loss", taken.metrics.get("loss"), "nats/token", **step.backends)
        record.add(f"{name}, grad_norm", taken.metrics.get("grad_norm"), "1")
        return scores, taken
    finally:
        step.close()


def _baseline_file(setting: Setting) -> Path:
    return setting.folder / "fp8_baseline.pt"


def baseline(record: Record, setting: Setting) -> None:
    """Without FP8; what it says is kept for the others."""
    from step_bench.roles import Precision

    scores, _ = _measured(record, setting, "bf16", Precision())
    record.add("bf16, tokens", len(scores.student_logp), "1")
    record.add("bf16, pivotal", float(scores.is_pivotal.double().mean()), "1")
    record.add("bf16, largest weight", float(scores.weights.max()), "1")
    temporary = _baseline_file(setting).with_suffix(".part")
    torch.save(vars(scores), temporary)
    temporary.replace(_baseline_file(setting))


def _compare(record: Record, setting: Setting, name: str, scores: Any, figures: tuple[str, ...]) -> None:
    from renio_megatron.tools.precision.errors import Scores, score_errors

    truth = Scores(**torch.load(_baseline_file(setting)))
    for key, value in score_errors(scores, truth).items():
        if key in figures:
            record.add(f"{name}, {key}", value if value == value else None, "nats" if "absolute" in key else "1")


def variant(record: Record, setting: Setting, fp8: str, recipe: str) -> None:
    """Student, teacher or both in FP8."""
    from step_bench.roles import Precision

    name = f"{fp8}, {recipe}"
    scores, taken = _measured(record, setting, name, Precision(fp8, recipe, emulate=not setting.is_cuda))
    _compare(record, setting, name, scores, (*FIGURES, *OF_A_STEP))
    for key in ("loss", "grad_norm"):
        record.add(f"{name}, {key}, relative", taken.metrics[key] / record.value(f"bf16, {key}") - 1, "1")


def fp32(record: Record, setting: Setting) -> None:
    """How far bf16 itself is from fp32: below it, nobody would notice FP8."""
    from step_bench.roles import Precision

    scores, _ = _measured(record, setting, "fp32", Precision(bf16=False), update=False)
    _compare(record, setting, "fp32", scores, FIGURES)


def chain(record: Record, setting: Setting, recipe: str) -> None:
    """Every figure of `renio compare-precision` for the modular chain; in this process, which saves the imports."""
    from renio_megatron.cli.launch import become_single_rank
    from renio_megatron.tools.precision.experiment import compare_precision

    become_single_rank()
    folder = setting.folder / f"precision-{recipe}"
    emulated = "false" if setting.is_cuda else "true"
    overrides = [
        f"{section}.{key}"
        for section in ("precision", "teacher_precision")
        for key in ("fp8=hybrid", f"fp8_recipe={recipe}", f"emulate_fp8={emulated}")
    ]
    size = 16 if setting.toy else 64
    overrides += ["parallel.tensor_model_parallel_size=1", "train.bf16=true", f"train.global_batch_size={size}"]
    compare_precision(str(ROOT / "examples" / "modchain.yaml"), overrides, str(folder))
    found = json.loads((folder / "precision.json").read_text())
    facts = {key: value for key, value in found.items() if key not in ("variants", "settings", "recipe")}
    record.add(f"modular chain, {recipe}, tokens", found["tokens"], "1", **facts)
    for name, figures in found["variants"].items():
        for key, value in figures.items():
            if key != "worst":
                record.add(f"modular chain, {recipe}, {name}, {key}", value, "nats" if "absolute" in key else "1")
