"""Verdicts on rollouts: one of the ranks that share a sequence grades it, and the others hear the verdict."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Protocol

from renio_megatron.evaluation.graders.final_answer import opens_thinking
from renio_megatron.evaluation.graders.grader import Completion, Grader, GuardedGrader
from renio_megatron.parallel.collectives import on_first_model_rank
from renio_megatron.parallel.layout import ParallelLayout
from renio_megatron.parallel.stopping import StopRequest, give_up_together
from renio_megatron.types import Rollout, Verdict

logger = logging.getLogger(__name__)

_LAST_TOKENS = 8
"""Tokens at the end of a prompt that show whether it leaves a thought open."""


class Decoder(Protocol):
    """The part of a tokenizer that grading needs."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> Any:
        """Text of the tokens."""


class RolloutGrader:
    """Grades rollouts with a grader of texts.

    Args:
        grader: the grader.
        tokenizer: decodes completions, without their end token.
        errors: what an exception of the grader does: `raise`, or `count_wrong`.
        layout: the ranks that share sequences.
        setting: name of the setting that says so, for messages.
        stop: a request upon which grading is given up between two rollouts; None: it never is.
    """

    def __init__(
        self,
        grader: Grader,
        tokenizer: Decoder,
        *,
        errors: str,
        layout: ParallelLayout,
        setting: str = "data.grader_errors",
        stop: StopRequest | None = None,
    ) -> None:
        self.grader = grader
        self._guarded = GuardedGrader(grader, errors=errors, setting=setting, report=logger.warning)
        self._tokenizer, self._layout, self._stop = tokenizer, layout, stop

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Verdict]:
        """The verdict on each of the rank's rollouts, the same on all ranks that share them. A collective of these.

        A grader need not give the same verdict twice: it may have a time limit. So one rank asks it.

        Raises:
            DataError: the grader raised, and `errors` is `raise`.
            Abandoned: on every rank of the world, where the run is to stop; such a grader is a collective of all.
        """
        verdicts = on_first_model_rank(self._layout, lambda: self._graded(rollouts))
        if self._stop is not None:
            give_up_together(self._layout, len(verdicts) < len(rollouts))
        return verdicts

    def _graded(self, rollouts: Sequence[Rollout]) -> list[Verdict]:
        """Verdicts; none where they are given up, because the signal may have reached a program that was judged."""
        verdicts: list[Verdict] = []
        for rollout in rollouts:
            verdicts.append(self._grade(rollout))
            if self._stop is not None and self._stop.number is not None:
                return []
        return verdicts

    def _grade(self, rollout: Rollout) -> Verdict:
        return self._guarded(self._completion(rollout), rollout.prompt.record, f"prompt {rollout.prompt.index}")

    def _completion(self, rollout: Rollout) -> Completion:
        def text_of(token_ids: Sequence[int]) -> str:
            return self._tokenizer.decode(list(token_ids), skip_special_tokens=False)

        # Special tokens stay visible: a padding token that the student sampled is a mistake and must not vanish.
        prompt_end = text_of(rollout.prompt.student_ids[-_LAST_TOKENS:])
        return Completion(text_of(rollout.answer_ids), rollout.finished, opens_thinking(prompt_end))
