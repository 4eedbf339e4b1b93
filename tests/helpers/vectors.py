"""The reference vectors as cases, and how far a result may be from them.

fp64: 1e-9. fp32: 1e-5 of the largest reference value; a gradient is not compared at entries that lie within fp32
rounding of a bound of the entry clip, because the gradient jumps there (`exempt_entries` says which these are).
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from renio_megatron.config import LossConfig, WeightingConfig
from renio_megatron.config.sections.weighting import RenioWeighting

FILE = Path(__file__).parents[1] / "reference_data" / "objective.safetensors"
DTYPES = (torch.float64, torch.float32)


@dataclass(frozen=True)
class Case:
    """One problem: its settings, its inputs and the values to be found, all fp64."""

    number: int
    settings: dict
    tensors: dict[str, torch.Tensor]

    def __getattr__(self, name: str) -> torch.Tensor:
        try:
            return self.__dict__["tensors"][name]
        except KeyError:
            raise AttributeError(name) from None

    @property
    def batch(self) -> int:
        return self.settings["batch"]

    @property
    def vocab(self) -> int:
        return self.settings["vocab"]

    @property
    def loss_config(self) -> LossConfig:
        keys = ("beta", "temperature", "entry_clip")
        return LossConfig(**{key: self.settings[key] for key in keys})

    @property
    def weighting_config(self) -> WeightingConfig:
        if not self.settings["weighted"]:
            return WeightingConfig(name="uniform")
        return self.renio_config

    @property
    def renio_config(self) -> RenioWeighting:
        """Bounds of the pivotal tokens and the rest of ReNIO, also where sequences are not weighed."""
        return RenioWeighting(
            threshold=self.settings["threshold"],
            ceiling=self.settings["ratio_clip"],
            temperature=self.settings["weight_temperature"],
            normalize={"batch_mean": "batch", "none": "none"}[self.settings["normalize"]],
        )


@functools.cache
def load_cases() -> tuple[Case, ...]:
    """The 27 cases."""
    with safe_open(FILE, "pt") as file:
        names = list(file.keys())
        return tuple(
            Case(i, settings, {n.partition(".")[2]: file.get_tensor(n) for n in names if n.startswith(f"{i:02d}.")})
            for i, settings in enumerate(json.loads(file.metadata()["cases"]))
        )


def limit(expected: torch.Tensor, dtype: torch.dtype) -> float:
    """Largest absolute error that a result in `dtype` may have."""
    return 1e-9 if dtype == torch.float64 else 1e-5 * float(expected.abs().max())


def worst(found: torch.Tensor, expected: torch.Tensor, ignore: torch.Tensor | None = None) -> float:
    """Largest absolute difference; NaN where there is one, infinity for different shapes, 0 for nothing to compare."""
    if found.shape != expected.shape:
        return float("inf")
    difference = (found.detach().double() - expected.detach().double()).abs()
    if ignore is not None:
        difference = difference[~ignore]
    return float(difference.max()) if difference.numel() else 0.0


def entries(case: Case) -> torch.Tensor:
    """Every vocabulary entry of the divergence before the clip, fp64 [N, V], written out from probabilities."""
    beta, temperature = case.settings["beta"], case.settings["temperature"]
    student = (case.student_logits / temperature).softmax(-1)
    teacher = (case.teacher_logits / temperature).softmax(-1)
    if beta == 0:
        return teacher * (teacher / student).log()
    if beta == 1:
        return student * (student / teacher).log()
    mixture = (1 - beta) * student + beta * teacher
    return beta * teacher * (teacher / mixture).log() + (1 - beta) * student * (student / mixture).log()


def exempt_entries(case: Case, dtype: torch.dtype) -> torch.Tensor:
    """Entries whose clip fp32 may decide differently than fp64: within 8 roundings of a bound, bool [N, V]."""
    entry = entries(case)
    clip = case.settings["entry_clip"]
    if clip is None or dtype == torch.float64:
        return torch.zeros_like(entry, dtype=torch.bool)
    student = (case.student_logits / case.settings["temperature"]).log_softmax(-1)
    teacher = (case.teacher_logits / case.settings["temperature"]).log_softmax(-1)
    rounding = torch.finfo(torch.float32).eps * (1 + student.abs() + teacher.abs()) * (student.exp() + teacher.exp())
    return torch.minimum(entry.abs(), (entry - clip).abs()) <= 8 * rounding
