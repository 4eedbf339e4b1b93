"""The product as a person runs it: a first step beside the same on the CPU, and `renio train`."""

from __future__ import annotations

import json
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from gpu_check.program import output_of
from gpu_check.record import Record
from gpu_check.unit import Setting, Unit, Wrong, require

MODELS = ("modchain", "smollm2")
LIMITS = {
    "fp32": {"loss": 1e-3, "grad_norm": 1e-3, "weights": 1e-3},
    "bf16": {"loss": 5e-2, "grad_norm": 5e-2, "weights": 0.2},
}
"""Relative difference from the CPU's fp32: of fp32 the bound of the reference layouts with room for another device's
sums, of bf16 what docs/design/layouts.md grants it. A token near the threshold may change sides in bf16, and moves its
sequence's mean of a few pivotal tokens by tenths of a nat."""


def units(setting: Setting) -> list[Unit]:
    """First what is compared, then what is run."""
    return [Unit("first step", first_step), Unit("renio train", train)]


def first_step(record: Record, setting: Setting) -> None:
    """Loss, gradient norm, weights and log-probabilities on committed rollouts, against the CPU's in fp32."""
    command = [sys.executable, "-m", "gpu_check.scores", *MODELS, *(["--toy"] if setting.toy else [])]
    with ThreadPoolExecutor() as together:
        found = [together.submit(output_of, setting, command, **env) for env in ({}, {"CUDA_VISIBLE_DEVICES": ""})]
    here, there = (json.loads(one.result().splitlines()[-1]) for one in found)
    wrong = []
    for model in MODELS:
        truth = there[model]["fp32"]
        assert truth["device"] == "cpu"
        for device, dtype, answer in (
            (setting.device.type, "fp32", here[model]["fp32"]),
            (setting.device.type, "bf16", here[model]["bf16"]),
            ("CPU alone", "bf16", there[model]["bf16"]),
        ):
            label = f"{model}, {dtype} on {device}"
            wrong += _beside(record, label, answer, truth, LIMITS[dtype])
    if wrong:
        raise Wrong("; ".join(wrong))


def _beside(record: Record, label: str, found: Any, truth: Any, limits: dict[str, float]) -> list[str]:
    """Writes how far an answer is from the truth; what is beyond its limit, in words."""
    wrong = []
    for name, limit in limits.items():
        try:
            require(record, f"{label}, {name}, relative difference", _relative(found[name], truth[name]), limit)
        except Wrong as error:  # the other comparisons still say something
            wrong.append(str(error))
    for name in ("student_logp", "teacher_logp"):
        difference = torch.tensor(found[name]).double() - torch.tensor(truth[name]).double()
        record.add(f"{label}, {name}, RMS difference", float(difference.square().mean().sqrt()), "nats")
    return wrong


def _relative(found: Any, truth: Any) -> float:
    """The largest difference over the largest value."""
    found, truth = torch.tensor(found).double(), torch.tensor(truth).double()
    return float((found - truth).abs().max() / truth.abs().max())


def train(record: Record, setting: Setting) -> None:
    """`renio train` on the modular chain in bf16: what it reaches and what a step takes."""
    steps, samples = (2, 16) if setting.toy else (20, 512)
    folder = setting.folder / "modchain"
    settings = (
        *("parallel.tensor_model_parallel_size=1", "train.bf16=true", f"train.train_iters={steps}"),
        *(f"evaluate.every={steps}", f"evaluate.samples={samples}", f"checkpoint.save_interval={steps}"),
        f"output_dir={folder.resolve()}",
    )
    command = [sys.executable, "-m", "renio_megatron.cli.main", "train", "examples/modchain.yaml", *settings]
    output_of(setting, command)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    accuracy = [row["eval/accuracy_greedy"] for row in rows if "eval/accuracy_greedy" in row]
    record.add("renio train, greedy accuracy before", accuracy[0], "1")
    record.add(f"renio train, greedy accuracy after {steps} steps", accuracy[-1], "1")
    for name, key in {"a step": "step", "rollout": "rollout", "teacher": "teacher", "train": "train"}.items():
        times = [row[f"time/{key}_s"] for row in rows if f"time/{key}_s" in row]
        record.add(f"renio train, {name}", statistics.median(times[1:]), "s", first=times[0])
