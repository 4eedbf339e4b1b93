"""On-policy distillation: sample, score, weigh, update."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from renio_megatron.config import HeadConfig, LossConfig, WeightingConfig
from renio_megatron.data.batching.balance import balance
from renio_megatron.data.batching.collate import flat_completions, flat_logp
from renio_megatron.losses.chunked_logits import Logits, logits_dtype_of
from renio_megatron.losses.distillation import distillation_loss
from renio_megatron.losses.linear_distillation import linear_distillation_loss
from renio_megatron.losses.sample_weights import SampleWeights, applied_cap, sample_weights
from renio_megatron.losses.tune_kernels import tuning_reported
from renio_megatron.objective.statistics import auc
from renio_megatron.parallel.layout import Layout
from renio_megatron.parallel.reductions import gather_batch, sum_pieces
from renio_megatron.parallel.vocab import LmHead
from renio_megatron.training.algorithms.multi_teacher import (
    RoutedDivergence,
    RoutedScores,
    RoutedTeachers,
    names_metrics,
)
from renio_megatron.training.interfaces import Learner, Sampler, StepLoss, Teacher
from renio_megatron.training.metrics.accumulator import Tally
from renio_megatron.types import Decoding, MicroBatch, Prompt, Rollout, TeacherScores


class Distillation:
    """One optimiser step of on-policy distillation with sample weights.

    The weights are finished before the pipeline starts, from the log-probabilities of the sampled tokens, and their
    mean is the whole batch's. So the micro-batch size and the layout change nothing.
    """

    def __init__(
        self,
        sampler: Sampler,
        teacher: Teacher | RoutedTeachers,
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
        drawn = self.sampler.sample(prompts, self._decoding, stream=(step,), on_group=self.teacher.hear)
        rollouts = self._balance(drawn)
        clock.append(time.perf_counter())
        batches = self.learner.arrange(rollouts)
        teacher = self.teacher.score(rollouts, batches)
        clock.append(time.perf_counter())
        student_logp = self.learner.score(batches) if self._recompute else flat_logp(rollouts)
        sample = self.weigh(rollouts, student_logp, teacher)
        loss = self._divergence(teacher, sample)
        metrics = self.learner.update(batches, loss, step=step, lr=self._lr_at(step))
        is_skipped = metrics.get("train/skipped_frac", 0.0) > 0
        if isinstance(loss, RoutedDivergence) and not is_skipped:
            metrics |= loss.metrics(self._layout)
        self.teacher.after_update(skipped=is_skipped)
        if "renio/pivot_gradient_frac" in metrics:  # counted in squares, which add up
            metrics["renio/pivot_gradient_frac"] **= 0.5
        clock.append(time.perf_counter())
        self._weighting_state = sample.state
        if self._on_rollouts is not None:
            self._on_rollouts(step, rollouts, sample)
        return metrics | self._sample_metrics(rollouts, sample) | _time_metrics(clock)

    def _balance(self, rollouts: list[Rollout]) -> list[Rollout]:
        """Rollouts exchanged between data-parallel ranks where cost follows tokens, that is where they are packed."""
        if not self._is_balanced:
            return rollouts
        weighting = self._weighting
        is_grouped = weighting.name != "uniform" and weighting.normalise == "group"
        costs = [
            len(rollout.prompt.student_ids) + len(rollout.prompt.teacher_ids) + 2 * len(rollout.completion_ids)
            for rollout in rollouts
        ]
        return balance(rollouts, costs, self._layout.data, unit=(weighting.group_size or 1) if is_grouped else 1)

    def _divergence(self, scores: TeacherScores | RoutedScores, sample: SampleWeights) -> StepLoss:
        settings = (sample, self._loss, self._weighting, self._head)
        if isinstance(self.teacher, RoutedTeachers):
            assert isinstance(scores, RoutedScores)
            return RoutedDivergence(
                scores, self.teacher.names, lambda one, its, look: WeightedDivergence(one, its, *settings, look)
            )
        assert isinstance(scores, TeacherScores)
        return WeightedDivergence(self.teacher, scores, *settings)

    def weigh(
        self, rollouts: Sequence[Rollout], student_logp: torch.Tensor, teacher: TeacherScores | RoutedScores
    ) -> SampleWeights:
        """Weights of this rank's sequences, normalised over the optimiser step's."""
        _, owner, _ = flat_completions(rollouts)
        device = self._layout.device
        return sample_weights(
            student_logp.to(device),
            teacher.logp.to(device),
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

    def _sample_metrics(self, rollouts: Sequence[Rollout], sample: SampleWeights) -> dict[str, float]:
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
        if isinstance(self.teacher, RoutedTeachers):
            names = self.teacher.names
            columns.insert(0, torch.tensor([names.index(r.prompt.teacher) for r in rollouts], device=device))
        table = gather_batch(torch.stack([column.to(dtype) for column in columns], dim=1), self._layout.data.group)
        found = list(table.cpu().unbind(1))
        name_of = found.pop(0) if isinstance(self.teacher, RoutedTeachers) else None
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
        metrics["tokens_per_s"] = float(lengths.sum())  # the trainer divides by the step's time
        if graded:
            metrics["rollout/accuracy"] = float(graded[0].mean())
            metrics["rollout/grader_error_frac"] = float(graded[1].mean())
            area = auc(raw, graded[0] == 0)
            if area == area:  # undefined where all are right, or all wrong
                metrics["renio/auc_wrong"] = area
        if isinstance(self.teacher, RoutedTeachers) and name_of is not None:
            metrics |= names_metrics(self.teacher.names, name_of, raw, graded[0] if graded else None)
        return metrics


class WeightedDivergence:
    """The loss of a micro-batch under weights that are already finished."""

    def __init__(
        self,
        teacher: Teacher,
        scores: TeacherScores,
        sample: SampleWeights,
        loss: LossConfig,
        weighting: WeightingConfig,
        head: HeadConfig,
        on_divergence: Callable[[int, torch.Tensor], None] | None = None,
    ) -> None:
        """`scores` and `sample` are those of all the rank's sequences, in order.

        `on_divergence` is shown each micro-batch's index and the divergence at each of its rows [N], nats.
        """
        self._teacher, self._scores, self._sample = teacher, scores, sample
        self._loss, self._weighting, self._head = loss, weighting, head
        self._on_divergence = on_divergence

    def __call__(
        self, index: int, micro_batch: MicroBatch, hidden: torch.Tensor, head: LmHead
    ) -> tuple[torch.Tensor, float, Tally]:
        """(sum over sequences, number of sequences, metrics); of a rank's pieces where it holds only those."""
        count = micro_batch.num_sequences
        share = count / micro_batch.pieces  # all pieces together are the sequences
        teacher_hidden = self._scores.payload[index]
        tally = Tally()
        if index == 0 and self._loss.entry_clip is not None:
            self._tally_pivots(tally, micro_batch, hidden.detach(), teacher_hidden, head)
        out = linear_distillation_loss(
            hidden,
            head.weight,
            teacher_hidden,
            self._teacher.head.weight,
            micro_batch.target_ids,
            micro_batch.owner,
            count,
            self._loss,
            self._weighting,
            head.shard,
            weights=self._sample.weights[micro_batch.sequence_index],
            sequence_lengths=self._sample.lengths[micro_batch.sequence_index],
            chunk_size=self._head.chunk_size,
            logits_dtype=logits_dtype_of(self._head, hidden.dtype),
            sum_hidden_gradient=False,
            main_grad=head.main_grad,
            check_values=False,
        )
        if self._on_divergence is not None:
            self._on_divergence(index, out.token_divergence.detach())
        tally.add("loss", float(out.loss.detach()) * count, share)
        tally.add("loss/kl", float(out.token_divergence.sum()), len(out.token_divergence))
        tally.add("loss/entry_clip_frac", int((out.clipped_entries > 0).sum()), len(out.clipped_entries))
        tally.add_max("memory/teacher_payload_mb", self._scores.payload_bytes / 2**20)
        if self._scores.sent_bytes is not None:
            tally.add_max("teacher/payload_sent_mb", self._scores.sent_bytes / 2**20)
        return out.loss * count, share, tally

    @torch.no_grad()
    def _tally_pivots(
        self, tally: Tally, micro_batch: MicroBatch, hidden: torch.Tensor, teacher_hidden: torch.Tensor, head: LmHead
    ) -> None:
        """Squared gradient at some pivotal tokens with the entry clip over that without: what the clip leaves of it."""
        rows = self._sample.is_pivotal[micro_batch.token_index].nonzero()[:, 0]
        rows = rows[:: -(-len(rows) // MOST_PIVOTS) or 1]
        dtype = logits_dtype_of(self._head, hidden.dtype)
        logits, teacher_logits = (
            Logits(states[rows], weight, len(rows), dtype).project(slice(None))
            for states, weight in ((hidden, head.weight), (teacher_hidden, self._teacher.head.weight))
        )
        energies = []
        for loss in (self._loss, replace(self._loss, entry_clip=None)):
            leaf = logits.clone().requires_grad_()
            with torch.enable_grad():
                out = distillation_loss(
                    leaf,
                    teacher_logits,
                    micro_batch.target_ids[rows],
                    torch.zeros_like(rows),
                    1,
                    loss,
                    self._weighting,
                    head.shard,
                    weights=torch.ones(1, device=logits.device),
                )
                out.loss.backward()
            assert leaf.grad is not None
            energies.append(leaf.grad.double().square().sum())
        kept, whole = sum_pieces(torch.stack(energies), head.shard.group).tolist()
        if whole > 0:
            tally.add("renio/pivot_gradient_frac", kept, whole)


MOST_PIVOTS = 64
"""Tokens at which `renio/pivot_gradient_frac` is measured, so that their whole logits take little memory."""


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
