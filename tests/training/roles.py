"""Sampler, teacher and learner on fakes, and a batch whose weights are known by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch

from renio_megatron import VocabShard
from renio_megatron.config import HeadConfig, LossConfig, WeightingConfig
from renio_megatron.config.sections.weighting import renio_in
from renio_megatron.data.batching.collate import BatchLayout, collate
from renio_megatron.parallel.layout import ParallelLayout
from renio_megatron.parallel.vocab import LmHead
from renio_megatron.training.algorithms.distillation import Distillation
from renio_megatron.training.algorithms.weighing import Weighing
from renio_megatron.training.metrics.accumulator import MetricAccumulator
from renio_megatron.training.targets import HiddenStateTargets
from renio_megatron.types import MicroBatch, Prompt, Rollout, SamplingParams


def prompts(start: int, count: int) -> list[Prompt]:
    return [Prompt(index, (1,), (1,)) for index in range(start, start + count)]


# Four sequences. With threshold 0.8 and ceiling 2.5 the pivotal tokens are 1.0; none; 5.0 (cut to 2.5) and 1.5; none.
RATIOS = ((1.0, 0.2), (0.1,), (5.0, 1.5, -3.0), (0.75, -1.0))
RAW = (math.e, 1.0, math.e**2, 1.0)
MEAN = sum(RAW) / 4
CAP = 2.0
WEIGHTS = tuple(min(raw / MEAN, CAP) for raw in RAW)  # only the third is cut
TOKENS = ((0, 1), (2,), (1, 1, 0), (2, 0))
FINISHED = (True, True, True, False)
RIGHT = (True, True, False, False)
VOCABULARY = 3
IDENTITY = LmHead(torch.eye(VOCABULARY, dtype=torch.float64), VocabShard(0, VOCABULARY, VOCABULARY))
"""Hidden states are logits."""


class Roles:
    """Sampler, teacher and learner in one; keeps what they were asked, and plays the update as Megatron does."""

    def __init__(self, micro_batch_size: int = 2, ratios: Any = RATIOS) -> None:
        generator = torch.Generator().manual_seed(3)
        count = sum(map(len, TOKENS))
        self.student = torch.randn(count, VOCABULARY, generator=generator, dtype=torch.float64, requires_grad=True)
        self.teacher_rows = torch.randn(count, VOCABULARY, generator=generator, dtype=torch.float64)
        self.asked: list[Any] = []
        self.sampled_logp = -0.5  # of every token
        self.recomputed_logp: torch.Tensor | None = None
        self.teacher_logp = self.sampled_logp - torch.tensor([ratio for row in ratios for ratio in row])
        self.micro_batch_size = micro_batch_size
        self.parts: list[tuple[float, float]] = []

    def distillation(
        self,
        *,
        recompute: bool = False,
        grader: Any = None,
        loss: Any = None,
        report: Any = None,
        **weighting: Any,
    ) -> Any:
        cap = {} if weighting.get("name") in ("uniform", "permuted") else {"cap": CAP}
        config = WeightingConfig(**(cap | weighting))
        report = renio_in(config) or report
        return Distillation(
            SimpleNamespace(sample=self.sample),
            SimpleNamespace(
                prefetch=None, score=self.score_teacher, after_update=lambda **told: self.asked.append(told)
            ),
            SimpleNamespace(make_micro_batches=self.make_micro_batches, score=self.score_student, update=self.update),
            layout=ParallelLayout(),
            sampling_params=DECODING,
            weighing=Weighing(config, report, loss or LossConfig(), HeadConfig(), recompute=recompute, seed=1),
            lr_at=lambda step: step / 100,
            grader=grader,
        )

    def sample(
        self, prompts: Any, sampling_params: SamplingParams, *, rng_stream: tuple[int, ...], on_group: Any
    ) -> list[Rollout]:
        self.asked.append(("sample", [prompt.index for prompt in prompts], sampling_params, rng_stream))
        return [
            Rollout(prompt, tokens, torch.full((len(tokens),), self.sampled_logp), finished)
            for prompt, tokens, finished in zip(prompts, TOKENS, FINISHED, strict=True)
        ]

    def make_micro_batches(self, rollouts: list[Rollout]) -> list[MicroBatch]:
        return collate(rollouts, audience="student", batch_layout=BatchLayout(0, self.micro_batch_size))

    def score_teacher(self, rollouts: list[Rollout], batches: list[MicroBatch]) -> HiddenStateTargets:
        self.asked.append(("teacher", [rollout.completion_ids for rollout in rollouts]))
        payload = [self.teacher_rows[batch.token_index] for batch in batches]
        return HiddenStateTargets(self.teacher_logp, payload, lambda: IDENTITY)

    def score_student(self, batches: list[MicroBatch], more: Any = None) -> dict[str, torch.Tensor]:
        self.asked.append(("student",))
        assert self.recomputed_logp is not None
        return {"student_logp": self.recomputed_logp}

    def update(self, batches: list[MicroBatch], loss: Any, *, step: int, lr: float) -> dict[str, float]:
        self.asked.append(("update", step, lr))
        total, accumulator = torch.zeros((), dtype=torch.float64), MetricAccumulator()
        for index, batch in enumerate(batches):
            value, count, counted = loss(index, batch, self.student[batch.token_index], IDENTITY)
            self.parts.append((float(value.detach()), count))
            total, _ = total + value, accumulator.merge(counted)
        denominator = sum(count for _, count in self.parts)
        (total / denominator).backward()
        return accumulator.result()


DECODING = SamplingParams(temperature=1.1, top_p=0.95, top_k=None, max_completion_length=3)
PROMPTS = prompts(8, 4)


def divergences(roles: Roles) -> list[float]:
    """Mean of KL(T||S) over the tokens of each sequence, by torch."""
    student, teacher = (rows.detach().log_softmax(-1) for rows in (roles.student, roles.teacher_rows))
    tokens = torch.nn.functional.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    return [float(piece.mean()) for piece in tokens.split([len(row) for row in TOKENS])]
