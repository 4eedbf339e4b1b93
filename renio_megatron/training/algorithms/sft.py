"""Supervised fine-tuning: cross-entropy on given completions, the paper's SFT baseline."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from renio_megatron.losses.token_logp import cross_entropy
from renio_megatron.losses.tune_kernels import tuning_reported
from renio_megatron.parallel.layout import ParallelLayout
from renio_megatron.parallel.reductions import gather_batch
from renio_megatron.parallel.vocab import LmHead
from renio_megatron.training.interfaces import Learner
from renio_megatron.training.metrics.accumulator import MetricAccumulator
from renio_megatron.types import MicroBatch, Prompt, Rollout


class Sft:
    """One optimizer step on the completions given with the prompts; the loss is the mean over the batch's tokens."""

    def __init__(
        self,
        learner: Learner,
        *,
        layout: ParallelLayout,
        lr_at: Callable[[int], float],
        learns_prompts: bool = False,
    ) -> None:
        """Sets up a step.

        Args:
            learner: the student.
            layout: this rank's layout.
            lr_at: learning rate of a step.
            learns_prompts: learn all tokens of the prompts but the first, too.
        """
        self.learner, self._layout, self._lr_at = learner, layout, lr_at
        self._learns_prompts = learns_prompts

    def tune(self, num_tokens: int, report: Callable[[str], None] | None = None) -> None:
        """Tunes the kernels of the steps to come; as in `Distillation.tune`."""
        with tuning_reported(self._layout.device, report):
            self.learner.tune(num_tokens, None)

    def step(self, prompts: Sequence[Prompt], step: int) -> dict[str, float]:
        """One optimizer step on this rank's prompts."""
        start = time.perf_counter()
        rollouts = [self._given(prompt) for prompt in prompts]
        metrics = self.learner.update(
            self.learner.make_micro_batches(rollouts), token_cross_entropy, step=step, lr=self._lr_at(step)
        )
        seconds = time.perf_counter() - start
        lengths = torch.tensor([len(rollout.completion_ids) for rollout in rollouts], device=self._layout.device)
        tokens = gather_batch(lengths, self._layout.data.group).sum()
        return metrics | {"time/train_s": seconds, "rollout/tokens": float(tokens)}

    def _given(self, prompt: Prompt) -> Rollout:
        """A prompt with the completion given with it; where prompts are learned, of the prompt's first token alone."""
        completion, asked = prompt.completion_ids or (), prompt.student_ids
        if not self._learns_prompts:
            return Rollout(prompt, completion)
        return Rollout(replace(prompt, student_ids=asked[:1]), asked[1:] + completion)

    def state(self) -> dict[str, Any]:
        """An empty state: the learner saves its own."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Does nothing: there is no state."""

    def close(self) -> None:
        """Does nothing: no ranks wait."""


def token_cross_entropy(
    index: int, micro_batch: MicroBatch, hidden: torch.Tensor, head: LmHead
) -> tuple[torch.Tensor, float, MetricAccumulator]:
    """(sum of -log p over completion tokens, number of tokens, metrics) of a micro-batch."""
    logits = torch.nn.functional.linear(hidden, head.weight)
    total = cross_entropy(logits, micro_batch.target_ids, head.shard, overwrite_logits=True)
    tokens = len(micro_batch.target_ids)
    accumulator = MetricAccumulator()
    accumulator.add("loss", total, tokens)
    return total, float(tokens), accumulator
