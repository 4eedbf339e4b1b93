"""Protocols of the parts of a training step: sampler, teacher, learner, loss, checkpointer.

Sequences are a rank's own (its data-parallel share); every rank that shares them calls the same methods in the same
order and gets the same values, whichever stage computed them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from renio_megatron.config import LossConfig
from renio_megatron.parallel.vocab import LmHead
from renio_megatron.training.metrics.accumulator import MetricAccumulator
from renio_megatron.training.targets import TeacherTargets
from renio_megatron.types import MicroBatch, Prompt, Rollout, SamplingParams


class Sampler(Protocol):
    """Draws completions from the current student."""

    def sample(
        self,
        prompts: Sequence[Prompt],
        sampling_params: SamplingParams,
        *,
        rng_stream: tuple[int, ...],
        on_group: Callable[[Sequence[Rollout]], None] | None = None,
    ) -> list[Rollout]:
        """One completion of each prompt, in order; a pure function of the weights, the prompts and `rng_stream`.

        `on_group` is called with parts of them as soon as they are drawn.
        """
        ...


class Teacher(Protocol):
    """Scores completions."""

    def prefetch(self, rollouts: Sequence[Rollout]) -> None:
        """Receives a part of a step's rollouts, which may be read at once; `score` is called with all of them later."""
        ...

    def score(self, rollouts: Sequence[Rollout], student_batches: Sequence[MicroBatch]) -> TeacherTargets:
        """Log-probabilities of the sampled tokens, and the loss of each of the student's micro-batches."""
        ...

    def close(self) -> None:
        """Releases ranks that only score: no more requests follow."""
        ...

    @property
    def averages(self) -> tuple[tuple[Any, torch.Tensor], ...]:
        """State for a checkpoint: fp32 averages, each with the parameter that it belongs to."""
        ...

    def after_update(self, *, skipped: bool) -> None:
        """Called after each of the student's steps, which a teacher may follow; `skipped` where the step was
        skipped."""
        ...

    def tune(self, num_tokens: int) -> None:
        """Tunes the kernels of `score`, for micro-batches of at most `num_tokens` completion tokens."""
        ...


@dataclass(frozen=True)
class ScoreMore:
    """Values that a scoring pass computes instead of log-probabilities.

    Attributes:
        names: names of the values.
        values_of: (index of the micro-batch, the micro-batch, the final hidden states at its completion rows [N, H],
            the student's LM head) -> the values of its completion tokens by name, [N] each; called on the stage that
            has the head.
    """

    names: tuple[str, ...]
    values_of: Callable[[int, MicroBatch, torch.Tensor, LmHead], Mapping[str, torch.Tensor]]


class StepLoss(Protocol):
    """The loss of one micro-batch; called on the stage that has the student's LM head."""

    def __call__(
        self, index: int, micro_batch: MicroBatch, hidden: torch.Tensor, head: LmHead
    ) -> tuple[torch.Tensor, float, MetricAccumulator]:
        """(sum of the loss, its share of the step's denominator, metrics) of micro-batch `index`.

        `hidden` are the final hidden states at its completion rows [N, H]; the caller sums their gradient over
        the tensor group.

        The gradient of the step is that of (all sums) / (all denominators), over every micro-batch and rank.
        """
        ...


class Learner(Protocol):
    """Holds the student's weights and optimizer."""

    def make_micro_batches(self, rollouts: Sequence[Rollout]) -> list[MicroBatch]:
        """The rollouts as micro-batches of this rank."""
        ...

    def score(self, micro_batches: Sequence[MicroBatch], more: ScoreMore | None = None) -> dict[str, torch.Tensor]:
        """`student_logp` of each sampled token at the loss temperature, forward-only, nats fp32 [N]; and by name the
        values of `more`."""
        ...

    def update(self, micro_batches: Sequence[MicroBatch], loss: StepLoss, *, step: int, lr: float) -> dict[str, float]:
        """One optimizer step; returns the step's loss metrics, equal on every rank."""
        ...

    def tune(self, num_tokens: int, loss: LossConfig | None, *, scores: bool = False) -> None:
        """Tunes the kernels of `update` with this loss (None: cross-entropy), and with `scores` of `score`, for
        micro-batches of at most `num_tokens` completion tokens."""
        ...


class Checkpointer(Protocol):
    """Saves and restores everything that a run needs to resume."""

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Writes weights, optimizer, random numbers and `state` as the checkpoint of `step`, or begins to.

        Does nothing where that checkpoint is already the current one.
        """
        ...

    def poll(self) -> None:
        """Publishes an asynchronous checkpoint that is completely written; never waits."""
        ...

    def finish(self) -> None:
        """Waits until every checkpoint that was begun is published."""
        ...

    def load(self) -> tuple[int, dict[str, Any]] | None:
        """Restores the newest complete checkpoint; returns its step and state, or None where there is none."""
        ...
