"""On-policy distillation: sample, score, weigh, update."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from renio_megatron.config import HeadConfig, LossConfig, WeightingConfig
from renio_megatron.data.batching.balance import balance
from renio_megatron.data.batching.collate import flat_completions, flat_logp
from renio_megatron.losses.sample_weights import SampleWeights, applied_cap, sample_weights
from renio_megatron.losses.tune_kernels import tuning_reported
from renio_megatron.objective.statistics import auc
from renio_megatron.parallel.layout import Layout
from renio_megatron.parallel.reductions import gather_batch
from renio_megatron.training.algorithms.multi_teacher import names_metrics
from renio_megatron.training.algorithms.weighted_loss import WeightedLoss
from renio_megatron.training.interfaces import Learner, Sampler, Teacher
from renio_megatron.training.targets import TeacherTargets
from renio_megatron.types import Decoding, Prompt, Rollout


class Distillation:
    """One optimiser step of on-policy distillation with sample weights.

    The weights are finished before the pipeline starts, from the log-probabilities of the sampled tokens, and their
    mean is the whole batch's. So the micro-batch size and the layout change nothing.
    """

    def __init__(
        self,
        sampler: Sampler,
        teacher: Teacher,
        learner: Learner,
        *,
        layout: Layout,
        decoding: Decoding,
        loss: LossConfig,
        weighting: WeightingConfig,
        head: HeadConfig,
        recompute_student_scores: bool,
        lr_at: Callable[[int], float],
        grader: Callable[[Rollout], bool | None] | None = None,
        is_balanced: bool = False,
        on_rollouts: Callable[[int, Sequence[Rollout], SampleWeights], None] | None = None,
    ) -> None:
        """Casts the roles.

        Args:
            sampler, teacher, learner: who plays them; several teachers as one.
            layout: this rank's place; weights are normalised over its data axis.
            decoding: how completions are drawn.
            loss, weighting: the objective.
            head: how its logits are made.
            recompute_student_scores: take log p_S from a forward-only pass instead of the sampler.
            lr_at: learning rate of a step.
            grader: says whether a completion is right, for the metrics only; None where nothing can be graded.
            is_balanced: exchange sequences between data-parallel ranks, so that all have as many tokens.
            on_rollouts: is shown (step, this rank's rollouts, their weights) after each step.
        """
        self.sampler, self.teacher, self.learner = sampler, teacher, learner
        self._layout, self._decoding, self._loss, self._weighting = layout, decoding, loss, weighting
        self._head = head
        self._recompute, self._lr_at, self._grader = recompute_student_scores, lr_at, grader
        self._is_balanced, self._on_rollouts = is_balanced, on_rollouts
        self._weighting_state: torch.Tensor | None = None

    def tune(self, num_tokens: int, say: Callable[[str], None] | None = None) -> None:
        """Tunes the kernels of the steps to come, on a GPU. No collectives.

        The few rows of `renio/pivot_gradient_frac` are never timed.

        Args:
            num_tokens: the most completion tokens that a micro-batch can have.
            say: takes a line about it; None: the log does.
        """
        with tuning_reported(self._layout.device, say):
            self.teacher.tune(num_tokens)
            self.learner.tune(num_tokens, self._loss, scores=self._recompute)

    def step(self, prompts: Sequence[Prompt], step: int) -> dict[str, float]:
        """One optimiser step on this rank's prompts."""
        clock = [time.perf_counter()]
        drawn = self.sampler.sample(prompts, self._decoding, stream=(step,), on_group=self.teacher.prefetch)
        rollouts = self._balance(drawn)
        clock.append(time.perf_counter())
        batches = self.learner.arrange(rollouts)
        targets = self.teacher.score(rollouts, batches)
        clock.append(time.perf_counter())
        sampler_logp = None
        if not self._recompute or all(rollout.logp is not None for rollout in rollouts):
            sampler_logp = flat_logp(rollouts).to(self._layout.device)
        student_logp = sampler_logp if sampler_logp is not None and not self._recompute else self.learner.score(batches)
        sample = self.weigh(rollouts, student_logp, targets)
        loss = WeightedLoss(targets, sample, self._loss, self._head, sampler_logp=sampler_logp)
        metrics = self.learner.update(batches, loss, step=step, lr=self._lr_at(step))
        is_skipped = metrics.get("train/skipped_frac", 0.0) > 0
        if not is_skipped:
            metrics |= targets.metrics(self._layout)
        self.teacher.after_update(skipped=is_skipped)
        clock.append(time.perf_counter())
        self._weighting_state = sample.state
        if self._on_rollouts is not None:
            self._on_rollouts(step, rollouts, sample)
        return metrics | self._sample_metrics(rollouts, sample, targets) | _time_metrics(clock)

    def _balance(self, rollouts: list[Rollout]) -> list[Rollout]:
        """Rollouts exchanged between data-parallel ranks where cost follows tokens, that is where they are packed."""
        if not self._is_balanced:
            return rollouts
        weighting = self._weighting
        is_grouped = weighting.is_normalized and weighting.normalize == "group"
        costs = [
            len(rollout.prompt.student_ids) + len(rollout.prompt.teacher_ids) + 2 * len(rollout.completion_ids)
            for rollout in rollouts
        ]
        return balance(rollouts, costs, self._layout.data, unit=(weighting.group_size or 1) if is_grouped else 1)

    def weigh(self, rollouts: Sequence[Rollout], student_logp: torch.Tensor, targets: TeacherTargets) -> SampleWeights:
        """Weights of this rank's sequences, normalised over the optimiser step's."""
        _, owner, _ = flat_completions(rollouts)
        device = self._layout.device
        student_logp, teacher_logp = student_logp.to(device), targets.logp.to(device)
        if targets.has_logp is not None:
            teacher_logp = torch.where(targets.has_logp.to(device), teacher_logp, student_logp)
        return sample_weights(
            student_logp,
            teacher_logp,
            owner.to(device),
            len(rollouts),
            self._weighting,
            batch_group=self._layout.data.group,
            state=self._weighting_state,
        )

    def state(self) -> dict[str, Any]:
        """The moving average of the weighting, where there is one."""
        return {"weighting": self._weighting_state}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes back what `state` gave."""
        self._weighting_state = state["weighting"]

    def close(self) -> None:
        """Lets go of the teacher."""
        self.teacher.close()

    def _sample_metrics(
        self, rollouts: Sequence[Rollout], sample: SampleWeights, targets: TeacherTargets
    ) -> dict[str, float]:
        """Metrics of the whole batch's sequences, from each rank's share."""
        dtype, device = torch.float64, sample.weights.device
        unfinished = torch.tensor([not rollout.finished for rollout in rollouts], dtype=dtype, device=device)
        columns = [sample.weights, sample.raw_weights, sample.lengths, unfinished]
        pivots = torch.zeros_like(unfinished)
        _, owner, _ = flat_completions(rollouts)
        columns.append(pivots.index_add_(0, owner.to(device), sample.is_pivotal.to(dtype)))
        if self._grader is not None:
            verdicts = [self._grader(rollout) for rollout in rollouts]  # None where the grader failed
            columns.append(torch.tensor([bool(verdict) for verdict in verdicts], dtype=dtype, device=device))
            columns.append(torch.tensor([verdict is None for verdict in verdicts], dtype=dtype, device=device))
        if targets.name_of is not None:
            columns.insert(0, targets.name_of.to(device))
        table = gather_batch(torch.stack([column.to(dtype) for column in columns], dim=1), self._layout.data.group)
        found = list(table.cpu().unbind(1))
        name_of = found.pop(0) if targets.name_of is not None else None
        weights, raw, lengths, cut, pivotal, *graded = found
        metrics = weight_metrics(
            weights,
            raw,
            applied_cap(self._weighting),
            ceiling=self._weighting.ceiling,
            temperature=self._weighting.temperature,
        )
        metrics["renio/pivotal_frac"] = float(pivotal.sum() / lengths.sum())
        metrics["rollout/length"] = float(lengths.mean())
        metrics["rollout/truncated_frac"] = float(cut.mean())
        metrics["rollout/tokens"] = float(lengths.sum())
        if graded:
            metrics["rollout/accuracy"] = float(graded[0].mean())
            metrics["rollout/grader_error_frac"] = float(graded[1].mean())
            area = auc(raw, graded[0] == 0)
            if area == area:  # undefined where all are right, or all wrong
                metrics["renio/auc_wrong"] = area
        if name_of is not None:
            metrics |= names_metrics(targets.names, name_of, raw, graded[0] if graded else None)
        return metrics


def weight_metrics(
    weights: torch.Tensor, raw: torch.Tensor, cap: float | None, *, ceiling: float, temperature: float
) -> dict[str, float]:
    """What betrays weights that do nothing, or too much, from the whole batch's weights and raw weights [B].

    A raw weight counts as at the ceiling where its mean log ratio is within 1e-4 nats of it, which rounding may cost.

    >>> raw = torch.tensor([1.0, 3.0])
    >>> metrics = weight_metrics(raw / 2, raw, cap=10.0, ceiling=2.5, temperature=1.0)
    >>> metrics["renio/weight_max"], metrics["renio/unit_weight_frac"], metrics["renio/ess_frac"]
    (1.5, 0.5, 0.800000011920929)
    """
    at_ceiling = (raw != 1) & (raw.log() * temperature >= ceiling - 1e-4)
    return {
        "renio/weight_mean": float(weights.mean()),
        "renio/weight_max": float(weights.max()),
        "renio/raw_weight_mean": float(raw.mean()),
        "renio/unit_weight_frac": float((raw == 1).double().mean()),
        "renio/ess_frac": float(weights.sum() ** 2 / (len(weights) * (weights**2).sum())),
        "renio/cap_frac": 0.0 if cap is None else float((weights >= cap).double().mean()),
        "renio/ceiling_frac": float(at_ceiling.double().mean()),
    }


def _time_metrics(clock: list[float]) -> dict[str, float]:
    names = ("time/rollout_s", "time/teacher_s", "time/train_s")
    return {name: end - start for name, start, end in zip(names, clock, clock[1:], strict=False)}
