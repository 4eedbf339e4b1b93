"""On-policy distillation: sample, score, weigh, update."""

from __future__ import annotations

import array
import functools
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from renio_megatron.data.batching.balance import balance
from renio_megatron.data.batching.collate import flat_completions, flat_logp
from renio_megatron.errors import ConfigError
from renio_megatron.losses.sample_weights import SampleWeights
from renio_megatron.losses.tune_kernels import tuning_reported
from renio_megatron.objective.statistics import auc
from renio_megatron.parallel.layout import ParallelLayout
from renio_megatron.parallel.reductions import gather_batch
from renio_megatron.training.algorithms.multi_teacher import names_metrics
from renio_megatron.training.algorithms.weighing import Verdicts, Weighing
from renio_megatron.training.algorithms.weighted_loss import WeightedLoss
from renio_megatron.training.interfaces import Learner, Sampler, Teacher
from renio_megatron.training.metrics.weights import renio_metrics, token_weight_metrics, weight_metrics
from renio_megatron.training.targets import TeacherTargets
from renio_megatron.types import MicroBatch, Prompt, Rollout, SamplingParams, Verdict


class Distillation:
    """One optimizer step of on-policy distillation with sample weights.

    The weights are computed before the pipeline starts, from the log-probabilities of the sampled tokens, and
    normalized over the whole batch. So they do not depend on the micro-batch size and the layout.
    """

    def __init__(
        self,
        sampler: Sampler,
        teacher: Teacher,
        learner: Learner,
        *,
        layout: ParallelLayout,
        sampling_params: SamplingParams,
        prefix_length: int | None = None,
        weighing: Weighing,
        lr_at: Callable[[int], float],
        grader: Callable[[Sequence[Rollout]], Sequence[Verdict]] | None = None,
        is_balanced: bool = False,
        on_rollouts: Callable[[int, Sequence[Rollout], SampleWeights], None] | None = None,
        look_at_first: Callable[[Sequence[Rollout], Sequence[MicroBatch], Learner, TeacherTargets], object]
        | None = None,
    ) -> None:
        """Sets up a step from its parts.

        Args:
            sampler, teacher, learner: the implementations; several teachers as one `MultiTeacher`.
            layout: this rank's layout; weights are normalized over its data axis.
            sampling_params: how completions are drawn.
            prefix_length: tokens of a completion that are scored and learned from, at most; None: all.
            weighing: computes the weights; also holds the divergence that they multiply.
            lr_at: learning rate of a step.
            grader: verdicts on completions, for metrics and for weightings that need them; None: no grading.
            is_balanced: exchange sequences between data-parallel ranks, so that all have as many tokens.
            on_rollouts: called with (step, this rank's rollouts, their weights) after each step.
            look_at_first: called in the first step before its update, with this rank's rollouts, its micro-batches, the
                learner and the teacher's targets; it raises an error where the run must not go on.
        """
        self.sampler, self.teacher, self.learner = sampler, teacher, learner
        self._layout, self._sampling_params, self._weighing = layout, sampling_params, weighing
        self._prefix_length, self._lr_at, self._grader = prefix_length, lr_at, grader
        self._is_balanced, self._on_rollouts, self._look_at_first = is_balanced, on_rollouts, look_at_first
        self._weighting_state: torch.Tensor | None = None

    def tune(self, num_tokens: int, report: Callable[[str], None] | None = None) -> None:
        """Tunes the kernels of the steps to come, on a GPU. No collectives.

        The kernels for the few rows of `renio/pivot_gradient_frac` are never timed, those of a look at the first step
        where they are called.

        Args:
            num_tokens: the most completion tokens that a micro-batch can have.
            report: receives one line about it; None: the line is logged.
        """
        with tuning_reported(self._layout.device, report):
            self.teacher.tune(num_tokens)
            self.learner.tune(num_tokens, self._weighing.loss, scores=self._weighing.needs_pass)

    def step(self, prompts: Sequence[Prompt], step: int) -> dict[str, float]:
        """One optimizer step on this rank's prompts."""
        clock = [time.perf_counter()]
        rollouts = self._draw(prompts, step)
        clock.append(time.perf_counter())
        batches = self.learner.make_micro_batches(rollouts)
        targets = self.teacher.score(rollouts, batches)
        clock.append(time.perf_counter())
        if step == 1 and self._look_at_first is not None:
            self._look_at_first(rollouts, batches, self.learner, targets)
            clock = [moment + time.perf_counter() - clock[-1] for moment in clock]  # in time/step_s alone
        weighing, verdicts = self._weighing, functools.cache(functools.partial(self._verdicts, rollouts))
        scores = weighing.scores(rollouts, batches, self.learner, targets)
        if weighing.needs_pass:
            clock.append(time.perf_counter())
        sample = self.weigh(rollouts, scores, targets, step=step, verdicts=verdicts)
        sampler_logp = None
        if all(rollout.logp is not None for rollout in rollouts):
            sampler_logp = flat_logp(rollouts).to(self._layout.device)
        loss = WeightedLoss(targets, sample, weighing.loss, weighing.head, sampler_logp=sampler_logp)
        metrics = self.learner.update(batches, loss, step=step, lr=self._lr_at(step))
        is_skipped = metrics.get("train/skipped_frac", 0.0) > 0
        if not is_skipped:
            metrics |= targets.metrics(self._layout)
        self.teacher.after_update(skipped=is_skipped)
        clock.append(time.perf_counter())
        self._weighting_state = sample.state
        if self._on_rollouts is not None:
            self._on_rollouts(step, rollouts, sample)
        found = self._sample_metrics(rollouts, sample, targets, verdicts)
        return metrics | found | _time_metrics(clock, scored=weighing.needs_pass)

    def look(self, prompts: Sequence[Prompt]) -> None:
        """Draws and scores a first step's completions and looks at them; nothing is learned."""
        assert self._look_at_first is not None
        rollouts = self._draw(prompts, 1)
        batches = self.learner.make_micro_batches(rollouts)
        self._look_at_first(rollouts, batches, self.learner, self.teacher.score(rollouts, batches))

    def _draw(self, prompts: Sequence[Prompt], step: int) -> list[Rollout]:
        """This rank's completions of a step, which the teacher may read as they come."""
        drawn = self.sampler.sample(
            prompts,
            self._sampling_params,
            rng_stream=(step,),
            on_group=lambda group: self.teacher.prefetch(self._prefixes(group)),
        )
        return self._balance(self._prefixes(drawn))

    def _verdicts(self, rollouts: Sequence[Rollout]) -> Sequence[Verdict]:
        """The grader's verdict on each rollout."""
        if self._grader is None:
            raise ConfigError(
                "the weighting needs verdicts, and nothing is graded. Set data.grader, or choose another weighting."
            )
        return self._grader(rollouts)

    def _prefixes(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        return [rollout.prefix(self._prefix_length) for rollout in rollouts]

    def _balance(self, rollouts: list[Rollout]) -> list[Rollout]:
        """Rollouts, balanced between data-parallel ranks where they are packed, so that the cost follows the tokens."""
        if not self._is_balanced:
            return rollouts
        costs = [
            len(rollout.prompt.student_ids) + len(rollout.prompt.teacher_ids) + 2 * len(rollout.completion_ids)
            for rollout in rollouts
        ]
        return balance(rollouts, costs, self._layout.data, unit=self._weighing.weighting.group)

    def weigh(
        self,
        rollouts: Sequence[Rollout],
        scores: Mapping[str, torch.Tensor],
        targets: TeacherTargets,
        *,
        step: int,
        verdicts: Verdicts,
    ) -> SampleWeights:
        """Weights of this rank's sequences; see `Weighing.weights`."""
        state = self._weighting_state
        return self._weighing.weights(
            rollouts, scores, targets, self._layout, step=step, state=state, verdicts=verdicts
        )

    def state(self) -> dict[str, Any]:
        """The moving average of the weighting, where there is one."""
        return {"weighting": self._weighting_state}

    def restore(self, state: dict[str, Any]) -> None:
        """Restores the result of `state`."""
        self._weighting_state = state["weighting"]

    def close(self) -> None:
        """Releases the ranks of the teacher."""
        self.teacher.close()

    def _sample_metrics(
        self, rollouts: Sequence[Rollout], sample: SampleWeights, targets: TeacherTargets, verdicts: Verdicts
    ) -> dict[str, float]:
        """Metrics of the whole batch's sequences, from each rank's share."""
        dtype, device = torch.float64, sample.weights.device
        unfinished = torch.tensor([not rollout.finished for rollout in rollouts], dtype=dtype, device=device)
        capped = sample.is_capped.to(dtype)
        drawn = torch.tensor([len(rollout.drawn_ids) for rollout in rollouts], dtype=dtype, device=device)
        columns = {"weight": sample.weights, "capped": capped, "length": sample.lengths, "cut": unfinished}
        columns["drawn"] = drawn
        texts = [_text_number(rollout.drawn_ids) for rollout in rollouts]
        columns["text"] = torch.tensor(texts, dtype=dtype, device=device)
        owner = flat_completions(rollouts)[1].to(device)
        if sample.renio is not None:
            pivotal = torch.zeros_like(unfinished).index_add_(0, owner, sample.renio.is_pivotal.to(dtype))
            columns |= {"raw": sample.renio.raw_weights, "pivotal": pivotal}
        if self._grader is not None:
            found = verdicts()
            for name, value_of in _OF_VERDICTS.items():
                columns[name] = torch.tensor([value_of(one) for one in found], dtype=dtype, device=device)
        if targets.name_of is not None:
            columns["name"] = targets.name_of.to(device)
        columns |= _token_columns(sample, owner)
        table = gather_batch(torch.stack([one.to(dtype) for one in columns.values()], dim=1), self._layout.data.group)
        return _batch_metrics(dict(zip(columns, table.cpu().unbind(1), strict=True)), self._weighing, targets.names)


_OF_VERDICTS: dict[str, Callable[[Verdict], bool]] = {
    "right": lambda verdict: bool(verdict.correct),
    "failed": lambda verdict: verdict.correct is None,
    "unread": lambda verdict: verdict.correct is False and verdict.answer is None,
}


def _text_number(ids: Sequence[int]) -> int:
    """A number of a completion's tokens, 32 bits."""
    return zlib.crc32(array.array("q", ids).tobytes())


def _token_columns(sample: SampleWeights, owner: torch.Tensor) -> dict[str, torch.Tensor]:
    """Inputs of `token_weight_metrics`, where tokens have weights: sums for each sequence, one maximum for all."""
    if sample.token_weights is None:
        return {}
    weights = sample.token_weights.double()
    none = weights.new_zeros(len(sample.weights))
    return {
        "token sum": none.index_add(0, owner, weights),
        "token squares": none.index_add(0, owner, weights.square()),
        "token max": none + (weights.max() if len(weights) else 0.0),
    }


def _batch_metrics(columns: Mapping[str, torch.Tensor], weighing: Weighing, names: Sequence[str]) -> dict[str, float]:
    """Metrics by name, from values of all sequences of the step."""
    lengths, raw, right = columns["length"], columns.get("raw"), columns.get("right")
    metrics = weight_metrics(columns["weight"], columns["capped"])
    if "token sum" in columns:
        sums = torch.stack([lengths.sum(), columns["token sum"].sum(), columns["token squares"].sum()])
        metrics |= token_weight_metrics(sums, columns["token max"].max())
    if raw is not None and weighing.report is not None:
        metrics |= renio_metrics(raw, weighing.report)
        metrics["renio/pivotal_frac"] = float(columns["pivotal"].sum() / lengths.sum())
    metrics["rollout/length"] = float(columns["drawn"].mean())
    metrics["rollout/truncated_frac"] = float(columns["cut"].mean())
    metrics["rollout/distinct"] = float(len(columns["text"].unique()))
    metrics["rollout/tokens"] = float(lengths.sum())
    if right is not None:
        metrics["rollout/accuracy"] = float(right.mean())
        metrics["rollout/no_answer_frac"] = float(columns["unread"].mean())
        metrics["rollout/grader_error_frac"] = float(columns["failed"].mean())
        area = float("nan") if raw is None else auc(raw, right == 0)
        if area == area:  # undefined where all are right, or all wrong
            metrics["renio/auc_wrong"] = area
    if "name" in columns:
        metrics |= names_metrics(names, columns["name"], columns["weight"], raw, right, columns.get("unread"))
    return metrics


def _time_metrics(clock: list[float], *, scored: bool) -> dict[str, float]:
    names = ("time/rollout_s", "time/teacher_s", *(("time/score_s",) if scored else ()), "time/train_s")
    return {name: end - start for name, start, end in zip(names, clock, clock[1:], strict=False)}
