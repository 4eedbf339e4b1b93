"""Accuracy of the current student on held-out problems, greedy and sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from renio_megatron.parallel.layout import ParallelLayout
from renio_megatron.training.interfaces import Sampler
from renio_megatron.training.metrics.accumulator import MetricAccumulator, reduce_metrics
from renio_megatron.types import Prompt, Rollout, SamplingParams, Verdict

# Evaluation has its own random stream, the same every time, so that two evaluations differ only by the model.
_RNG_STREAM = (0, 1)


class Evaluator:
    """Samples one completion per problem and counts the right ones."""

    def __init__(
        self,
        sampler: Sampler,
        prompts: Sequence[Prompt],
        grader: Callable[[Sequence[Rollout]], Sequence[Verdict]],
        sampling_params: SamplingParams,
        layout: ParallelLayout,
    ) -> None:
        """Takes all problems, the same on every rank, and the `sampling_params` of the sampled accuracy."""
        # Interleaved, so that ranks get equally long problems where the set is sorted by length.
        self._mine = list(prompts)[layout.data.rank :: layout.data.size]
        self._sampler, self._grader, self._sampling_params, self._layout = sampler, grader, sampling_params, layout

    def __call__(self, step: int) -> dict[str, float]:
        """`eval/accuracy_greedy` and `eval/accuracy_sampled` after a step, equal on every rank."""
        accumulator = MetricAccumulator()
        for name, sampling_params in (
            ("eval/accuracy_greedy", replace(self._sampling_params, temperature=0.0)),
            ("eval/accuracy_sampled", self._sampling_params),
        ):
            # Also without problems of its own: a rank may hold experts that other ranks' forward passes need.
            rollouts = self._sampler.sample(self._mine, sampling_params, rng_stream=_RNG_STREAM)
            accumulator.add(name, sum(bool(verdict.correct) for verdict in self._grader(rollouts)), len(rollouts))
        return reduce_metrics(accumulator, self._layout)
