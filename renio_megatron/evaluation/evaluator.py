"""Accuracy of the present student on held-out problems, greedy and sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from renio_megatron.parallel.layout import Layout
from renio_megatron.training.interfaces import Sampler
from renio_megatron.training.metrics.accumulator import Tally, reduce_tally
from renio_megatron.types import Decoding, Prompt, Rollout

# Evaluation draws from a stream of its own, the same every time, so that two evaluations differ by the model alone.
_STREAM = (0, 1)


class Evaluator:
    """Samples one completion of each problem and counts the right ones."""

    def __init__(
        self,
        sampler: Sampler,
        prompts: Sequence[Prompt],
        grader: Callable[[Rollout], bool | None],
        decoding: Decoding,
        layout: Layout,
    ) -> None:
        """`prompts` are all problems, the same on every rank; `decoding` is that of the sampled accuracy."""
        # Interleaved, so that ranks get equally long problems where the set is sorted by length.
        self._mine = list(prompts)[layout.data.rank :: layout.data.size]
        self._sampler, self._grader, self._decoding, self._layout = sampler, grader, decoding, layout

    def __call__(self) -> dict[str, float]:
        """`eval/accuracy_greedy` and `eval/accuracy_sampled`, equal on every rank."""
        tally = Tally()
        for name, decoding in (
            ("eval/accuracy_greedy", replace(self._decoding, temperature=0.0)),
            ("eval/accuracy_sampled", self._decoding),
        ):
            # Also without a problem of its own: a rank may hold experts that the others' passes go through.
            rollouts = self._sampler.sample(self._mine, decoding, stream=_STREAM)
            tally.add(name, sum(bool(self._grader(rollout)) for rollout in rollouts), len(rollouts))
        return reduce_tally(tally, self._layout)
