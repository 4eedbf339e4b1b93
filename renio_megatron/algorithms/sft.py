"""Supervised fine-tuning: cross-entropy on given completions, the paper's SFT baseline."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from renio_megatron.metrics import Tally
from renio_megatron.parallel.vocab import VocabShard
from renio_megatron.records import MicroBatch, Prompt, Rollout
from renio_megatron.roles import Learner
from renio_megatron.token_logp import cross_entropy


class Sft:
    """One optimiser step on the completions that the prompts bring; the loss is the mean over the batch's tokens."""

    def __init__(self, learner: Learner, *, num_ranks: int, lr_at: Callable[[int], float]) -> None:
        """`num_ranks` is the data-parallel size, for the token rate; `lr_at` gives a step's learning rate."""
        self.learner, self._num_ranks, self._lr_at = learner, num_ranks, lr_at

    def step(self, prompts: Sequence[Prompt], step: int) -> dict[str, float]:
        """One optimiser step on this rank's prompts."""
        start = time.perf_counter()
        rollouts = [Rollout(prompt, prompt.completion_ids or ()) for prompt in prompts]
        metrics = self.learner.update(rollouts, token_cross_entropy, step=step, lr=self._lr_at(step))
        tokens = sum(len(rollout.completion_ids) for rollout in rollouts) * self._num_ranks
        return metrics | {"time/train_s": time.perf_counter() - start, "tokens_per_s": float(tokens)}

    def state(self) -> dict[str, Any]:
        """Nothing beyond the learner's."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Nothing to take back."""


def token_cross_entropy(
    index: int, micro_batch: MicroBatch, logits: torch.Tensor, shard: VocabShard
) -> tuple[torch.Tensor, float, Tally]:
    """(sum of -log p over completion tokens, number of tokens, metrics) of a micro-batch."""
    total = cross_entropy(logits, micro_batch.target_ids, shard, overwrite_logits=True)
    tokens = len(micro_batch.target_ids)
    tally = Tally()
    tally.add("loss", float(total.detach()), tokens)
    return total, float(tokens), tally
