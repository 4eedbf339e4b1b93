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

EvaluationObserver = Callable[[int, str, int, int], None]
"""(step, what is evaluated, completions that are drawn, completions in all) -> nothing."""


class Evaluator:
    """Samples one completion per problem and counts the right ones."""

    def __init__(
        self,
        sampler: Sampler,
        prompts: Sequence[Prompt],
        grader: Callable[[Sequence[Rollout]], Sequence[Verdict]],
        sampling_params: SamplingParams,
        layout: ParallelLayout,
        observer: EvaluationObserver | None = None,
    ) -> None:
        """Takes all problems, the same on every rank, and the `sampling_params` of the sampled accuracy.

        `observer` is called whenever completions are drawn together on this rank, with an estimate for all ranks.
        """
        # Interleaved, so that ranks get equally long problems where the set is sorted by length.
        self._mine = list(prompts)[layout.data.rank :: layout.data.size]
        self._count, self._observer = len(prompts), observer
        self._sampler, self._grader, self._sampling_params, self._layout = sampler, grader, sampling_params, layout

    def __call__(self, step: int) -> dict[str, float]:
        """`eval/accuracy_greedy` and `eval/accuracy_sampled` after a step, equal on every rank."""
        accumulator = MetricAccumulator()
        for name, sampling_params in (
            ("eval/accuracy_greedy", replace(self._sampling_params, temperature=0.0)),
            ("eval/accuracy_sampled", self._sampling_params),
        ):
            # Also without problems of its own: a rank may hold experts that other ranks' forward passes need.
            rollouts = self._sampler.sample(
                self._mine, sampling_params, rng_stream=_RNG_STREAM, on_group=self._observed(step, name)
            )
            accumulator.add(name, sum(bool(verdict.correct) for verdict in self._grader(rollouts)), len(rollouts))
        return reduce_metrics(accumulator, self._layout)

    def _observed(self, step: int, name: str) -> Callable[[Sequence[Rollout]], None] | None:
        """What counts the completions of one draw for the observer."""
        if (observer := self._observer) is None:
            return None
        what, done = name.removeprefix("eval/").replace("_", ", "), 0

        def on_group(rollouts: Sequence[Rollout]) -> None:
            nonlocal done
            done += len(rollouts)
            observer(step, what, min(done * self._layout.data.size, self._count), self._count)

        return on_group
