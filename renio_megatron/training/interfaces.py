"""The parts of a training step, as protocols: what an algorithm may ask of whoever plays them.

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
    """Draws completions from the present student."""

    def sample(
        self,
        prompts: Sequence[Prompt],
        sampling_params: SamplingParams,
        *,
        rng_stream: tuple[int, ...],
        on_group: Callable[[Sequence[Rollout]], None] | None = None,
    ) -> list[Rollout]:
        """One completion of each prompt, in order; a pure function of the weights, the prompts and `rng_stream`.

        `on_group` is shown parts of them as soon as they are there.
        """
        ...


class Teacher(Protocol):
    """Scores completions."""

    def prefetch(self, rollouts: Sequence[Rollout]) -> None:
        """Told of a part of a step's rollouts, which may be read at once; `score` is asked about all of them later."""
        ...

    def score(self, rollouts: Sequence[Rollout], student_batches: Sequence[MicroBatch]) -> TeacherTargets:
        """Log-probabilities of the sampled tokens, and the loss of each of the student's micro-batches."""
        ...

    def close(self) -> None:
        """Lets go ranks that only score: nothing more will be asked."""
        ...

    @property
    def averages(self) -> tuple[tuple[Any, torch.Tensor], ...]:
        """What a checkpoint must hold of it: values in fp32, each with the parameter that it is of."""
        ...

    def after_update(self, *, skipped: bool) -> None:
        """Told after each of the student's steps, which a teacher may follow; `skipped` where it was left out."""
        ...

    def tune(self, num_tokens: int) -> None:
        """Tunes the kernels of `score`, for micro-batches of at most `num_tokens` completion tokens."""
        ...


@dataclass(frozen=True)
class ScoreMore:
    """What is wanted of a scoring pass in the place of log-probabilities.

    Attributes:
        names: of the values.
        values_of: (number of the micro-batch, itself, the final hidden states at its completion rows [N, H], the
            student's LM head) -> the values of its completion tokens by name, [N] each; called where the head is.
    """

    names: tuple[str, ...]
    values_of: Callable[[int, MicroBatch, torch.Tensor, LmHead], Mapping[str, torch.Tensor]]


class StepLoss(Protocol):
    """The loss of one micro-batch; called where the student's LM head is."""

    def __call__(
        self, index: int, micro_batch: MicroBatch, hidden: torch.Tensor, head: LmHead
    ) -> tuple[torch.Tensor, float, MetricAccumulator]:
        """(sum of the loss, its share of the step's denominator, metrics) of micro-batch `index`.

        `hidden` are the final hidden states at its completion rows [N, H]; their gradient is summed over the tensor
        group by whoever made them.

        The gradient of the step is that of (all sums) / (all denominators), over every micro-batch and rank.
        """
        ...


class Learner(Protocol):
    """Holds the student's weights and optimizer."""

    def make_micro_batches(self, rollouts: Sequence[Rollout]) -> list[MicroBatch]:
        """The rollouts as micro-batches of this rank."""
        ...

    def score(self, micro_batches: Sequence[MicroBatch], more: ScoreMore | None = None) -> dict[str, torch.Tensor]:
        """`student_logp` of each sampled token at the loss temperature, forward-only, nats fp32 [N]; and by name what
        `more` finds beside it."""
        ...

    def update(self, micro_batches: Sequence[MicroBatch], loss: StepLoss, *, step: int, lr: float) -> dict[str, float]:
        """One optimizer step; returns the step's loss metrics, equal on every rank."""
        ...

    def tune(self, num_tokens: int, loss: LossConfig | None, *, scores: bool = False) -> None:
        """Tunes the kernels of `update` with this loss (None: cross-entropy), and with `scores` of `score`, for
        micro-batches of at most `num_tokens` completion tokens."""
        ...


class Checkpointer(Protocol):
    """Saves and restores everything a run needs to go on."""

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Writes weights, optimizer, random numbers and `state` as the checkpoint of `step`, or begins to.

        Does nothing where that checkpoint is in force already.
        """
        ...

    def poll(self) -> None:
        """Puts a checkpoint in force that was written meanwhile; never waits."""
        ...

    def finish(self) -> None:
        """Waits until every checkpoint that was begun is in force."""
        ...

    def load(self) -> tuple[int, dict[str, Any]] | None:
        """Restores the newest whole checkpoint; its step and state, or None where there is none."""
        ...
