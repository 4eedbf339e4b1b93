"""The trainer's step over two models of random weights on one device, timed phase by phase."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from renio_megatron.cli.launch import become_single_rank
from renio_megatron.config import (
    HeadConfig,
    LossConfig,
    ParallelConfig,
    PrecisionConfig,
    TeacherPrecisionConfig,
    TrainConfig,
)
from renio_megatron.config.sections.weighting import RenioWeighting
from renio_megatron.data.batching.collate import flat_completions
from renio_megatron.losses.sample_weights import sample_weights
from renio_megatron.megatron.model.build import ModelPart, build_model
from renio_megatron.megatron.runtime.initialize import start, stop
from renio_megatron.megatron.student.learner import MegatronLearner
from renio_megatron.megatron.student.sampler import MegatronSampler
from renio_megatron.megatron.teacher.shared_layout import SharedLayoutTeacher
from renio_megatron.megatron.teacher.weights import TeacherWeights
from renio_megatron.models.architecture import Architecture
from renio_megatron.parallel.layout import ParallelLayout
from renio_megatron.tools.precision.errors import Scores
from renio_megatron.training.algorithms.distillation import Distillation
from renio_megatron.training.algorithms.weighing import Weighing
from renio_megatron.training.algorithms.weighted_loss import WeightedLoss
from renio_megatron.types import Prompt, Rollout, SamplingParams
from step_bench.models import random_model

PHASES = {"sample": "rollout", "score": "teacher", "update": "train"}
"""A role's method -> the phase of the step that it is."""


@dataclass(frozen=True)
class Workload:
    """What a step has to do.

    Attributes:
        sequences, prompt, completion: how many, and tokens of each; no completion ends early.
        max_tokens: of a packed row.
    """

    sequences: int
    prompt: int
    completion: int
    max_tokens: int = 8192

    @property
    def drawn(self) -> int:
        """Tokens that a step draws."""
        return self.sequences * self.completion

    @property
    def read(self) -> int:
        """Tokens that each model reads; nothing is predicted from a sequence's last."""
        return self.sequences * (self.prompt + self.completion - 1)


@dataclass(frozen=True)
class Precision:
    """What the models compute in.

    Attributes:
        fp8: `none`, `student`, `teacher` or `both`.
        recipe: of the FP8 products.
        emulate: round as FP8 does, without it.
        bf16: of the parameters; else fp32.
    """

    fp8: str = "none"
    recipe: str = "tensorwise"
    emulate: bool = False
    bf16: bool = True

    def settings(self, role: str) -> dict[str, Any]:
        """Of `student` or `teacher`, for its section."""
        if self.fp8 not in (role, "both"):
            return {}
        return {"fp8": "hybrid", "fp8_recipe": self.recipe, "emulate_fp8": self.emulate}


@dataclass(frozen=True)
class Phase:
    """One role's part of a step: seconds with the device idle before and after, and the device's largest allocation in
    it, bytes; None on a CPU."""

    seconds: float
    peak_bytes: int | None


@dataclass(frozen=True)
class Taken:
    """A step that was taken: the trainer's metrics, and the phases by their names."""

    metrics: dict[str, float]
    phases: dict[str, Phase]


@dataclass
class Watch:
    """Phases of the present step; `around` is called in place of each role's method with (phase, method)."""

    device: torch.device
    phases: dict[str, Phase] = field(default_factory=dict)
    around: Callable[[str, Callable[[], Any]], Any] = lambda phase, run: run()

    def call(self, phase: str, run: Callable[[], Any]) -> Any:
        """Runs and notes it."""
        is_cuda = self.device.type == "cuda"
        if is_cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        result = self.around(phase, run)
        if is_cuda:
            torch.cuda.synchronize()
        took = time.perf_counter() - began
        self.phases[phase] = Phase(took, torch.cuda.max_memory_allocated() if is_cuda else None)
        return result


class Watched:
    """A role whose calls end with the device idle, so that the step's clock sees what it cost."""

    def __init__(self, role: Any, watch: Watch) -> None:
        self._role, self._watch = role, watch

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._role, name)
        if name not in PHASES:
            return value
        return lambda *args, **kwargs: self._watch.call(PHASES[name], lambda: value(*args, **kwargs))


def draw_weights(part: ModelPart, role: str) -> None:
    """Random ones, of another seed for each role."""
    random_model(part, {"student": 1, "teacher": 2}[role])


class Step:
    """Student, teacher and what the trainer makes of them, with weights drawn from a seed.

    With a learning rate of 0 the weights stay as they were drawn: then a step does not depend on those before it.
    """

    def __init__(
        self,
        student: Architecture,
        teacher: Architecture,
        work: Workload,
        precision: Precision | None = None,
        *,
        loss: LossConfig | None = None,
        lr: float = 0.0,
        fill: Callable[[ModelPart, str], object] = draw_weights,
    ) -> None:
        """Builds both on this process's device; `fill` gives weights to a part of `student` or `teacher`."""
        self.work, precision = work, precision or Precision()
        self._loss, self._weighting, self._head = loss or LossConfig(), RenioWeighting(), HeadConfig()
        self.shapes, temperature = {"student": student, "teacher": teacher}, self._loss.temperature
        become_single_rank()
        parallel = ParallelConfig()
        self.layout: ParallelLayout = start(parallel, seed=1)
        self.watch = Watch(self.layout.device)
        train = TrainConfig(
            bf16=precision.bf16, global_batch_size=work.sequences, max_tokens_per_micro_batch=work.max_tokens
        )
        self.vocab = min(shape.vocab_size for shape in self.shapes.values())
        shared = {"vocab_size": self.vocab, "initialize": False}
        mine = PrecisionConfig(**precision.settings("student"))
        theirs = TeacherPrecisionConfig(**precision.settings("teacher"))
        part = build_model(student, self.layout, parallel, train, mine, **shared)
        its = build_model(teacher, self.layout, parallel, train, theirs, trained=False, **shared)
        fill(part, "student")
        fill(its, "teacher")
        self.learner = MegatronLearner(part, train, parallel, self._head, temperature=temperature, pad_id=0)
        self.teacher = SharedLayoutTeacher(TeacherWeights(its), train, self._head, temperature=temperature, pad_id=0)
        self.sampler = MegatronSampler(part, seed=1, temperature=temperature, stop_ids=(), pad_id=0)
        self.backends = {"student": part.backend, "teacher": its.backend}
        self._distillation = Distillation(
            *(Watched(role, self.watch) for role in (self.sampler, self.teacher, self.learner)),
            layout=self.layout,
            sampling_params=self.sampling_params(work.completion),
            weighing=Weighing(self._weighting, self._weighting, self._loss, self._head, recompute=False, seed=1),
            lr_at=lambda step: lr,
        )
        began = time.perf_counter()
        self._distillation.tune(work.max_tokens)
        self.tuning_seconds = time.perf_counter() - began

    @staticmethod
    def sampling_params(completion: int) -> SamplingParams:
        """Plain draws of so many tokens."""
        return SamplingParams(1.0, None, None, completion, None)

    def prompts(self, sequences: int | None = None) -> list[Prompt]:
        """Random tokens, the same each time."""
        draw, work = random.Random(0), self.work
        found = []
        for index in range(sequences or work.sequences):
            ids = tuple(draw.randrange(self.vocab) for _ in range(work.prompt))
            found.append(Prompt(index, ids, ids))
        return found

    def rollouts(self) -> list[Rollout]:
        """The prompts with completions that nobody drew: the same tokens for every precision."""
        draw = random.Random(1)
        return [
            Rollout(prompt, tuple(draw.randrange(self.vocab) for _ in range(self.work.completion)))
            for prompt in self.prompts()
        ]

    def run(self, number: int) -> Taken:
        """Step `number` of the trainer."""
        self.watch.phases = {}
        metrics = self._distillation.step(self.prompts(), number)
        return Taken(metrics, self.watch.phases)

    def scores(self, rollouts: Sequence[Rollout], *, update: bool = True) -> tuple[Scores, Taken]:
        """What both models say about given rollouts, and the update's metrics (the learning rate is 0); without
        `update` only the scores."""
        self.watch.phases = {}
        device, watch = self.layout.device, self.watch
        batches = self.learner.make_micro_batches(rollouts)
        theirs = watch.call("teacher", lambda: self.teacher.score(rollouts, batches))
        mine = watch.call("student scores", lambda: self.learner.score(batches)["student_logp"])
        _, owner, _ = flat_completions(rollouts)
        sample = sample_weights(mine, theirs.logp, owner.to(device), len(rollouts), self._weighting)
        divergence, metrics = torch.zeros_like(mine), {}

        def place(index: int, found: torch.Tensor) -> None:
            divergence[batches[index].token_index] = found.to(divergence)

        loss = WeightedLoss(theirs, sample, self._loss, self._head, on_divergence=place)
        if update:
            metrics = watch.call("train", lambda: self.learner.update(batches, loss, step=1, lr=0.0))
        assert sample.renio is not None
        scores = Scores(
            mine, theirs.logp, divergence, sample.renio.is_pivotal, sample.renio.raw_weights, sample.weights
        )
        on_host = Scores(**{name: value.detach().cpu() for name, value in vars(scores).items()})
        return on_host, Taken(metrics, watch.phases)

    def close(self) -> None:
        """Leaves the world and lets go of the models."""
        for model in self.learner.models:
            # Megatron's hooks hold the model, and torch the hooks, where Python's collector does not look.
            getattr(model, "grad_accs", []).clear()
        self._distillation = self.learner = self.teacher = self.sampler = None  # type: ignore[assignment]
        stop()
        gc.collect()  # modules and Megatron's hooks hold each other
        if self.layout.device.type == "cuda":
            torch.cuda.empty_cache()
