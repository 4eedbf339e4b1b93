"""Graders of completions. A new grader is a function and an entry in `GRADERS`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from renio_megatron.config import DataConfig
from renio_megatron.config.validators import require_choice
from renio_megatron.data.sources import modchain
from renio_megatron.errors import ConfigError, DataError, Scope
from renio_megatron.evaluation.graders import math
from renio_megatron.types import Prompt, Rollout

logger = logging.getLogger(__name__)

Grader = Callable[[Rollout], bool | None]
"""Whether a rollout's completion is right; None where the grader failed and `data.grader_errors` is count_wrong."""


class Decoder(Protocol):
    """The part of a tokenizer that grading needs."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> Any:
        """Text of the tokens."""


class Graded(Protocol):
    """The part of a source of problems that grading needs."""

    @property
    def name(self) -> str:
        """Its name in `data.source`."""

    @property
    def grader(self) -> str:
        """Name of its default grader."""

    @property
    def has_answers(self) -> bool:
        """Whether its records hold answers."""

    @property
    def score(self) -> Callable[[str, str, Mapping[str, Any]], float] | None:
        """Its own scoring of (given answer, right answer, metadata), 1.0 for right; None where it has none."""


def _modchain(text: str, prompt: Prompt, finished: bool, source: Graded) -> bool:
    return modchain.grade(text, prompt.answer or "", finished)


def _number(text: str, prompt: Prompt, finished: bool, source: Graded) -> bool:
    # A truncated completion ends in some number of its working; only a box marks the final answer.
    return (finished or math.boxed(text) is not None) and math.grade_number(text, prompt.answer or "")


def _reasoning_gym(text: str, prompt: Prompt, finished: bool, source: Graded) -> bool:
    box, answer = math.boxed(text), prompt.answer or ""
    if not finished and box is None:
        return False
    given: str | None
    if math.parse_number(answer) is not None:
        given = math.find_number(text if box is None else box)
    else:
        given = box if box is not None else (text.strip().splitlines() or [""])[-1].strip()
    assert source.score is not None  # build_grader has checked it
    return given is not None and source.score(given, answer, prompt.metadata) == 1.0


GRADERS: dict[str, Callable[[str, Prompt, bool, Graded], bool]] = {
    "modchain": _modchain,
    "number": _number,
    "reasoning_gym": _reasoning_gym,
}


def build_grader(config: DataConfig, source: Graded, tokenizer: Decoder) -> Grader | None:
    """Builds the function that grades a rollout's completion.

    The completion is decoded without its end token. A completion that was cut is wrong, unless it holds a boxed answer
    and the grader reads those.

    Returns:
        None where `data.grader` is `none`, or null and the source has no answers. The function raises `DataError` where
        the grader raises anything, or returns None with `data.grader_errors=count_wrong`.
    Raises:
        ConfigError: an unknown grader, or one that the source cannot serve.
    """
    name = config.grader or (source.grader if source.has_answers else "none")
    require_choice("data.grader", name, (*GRADERS, "none"))
    if name == "none":
        return None
    if not source.has_answers:
        raise ConfigError(
            f"data.grader={name} needs answers, but the records of source {source.name!r} have none. "
            f"Set data.answer_key (now {config.answer_key!r}) to their column, or data.grader=none."
        )
    if name == "reasoning_gym" and source.score is None:
        raise ConfigError(f"data.grader=reasoning_gym needs data.source=reasoning_gym; got {source.name!r}.")
    judge = GRADERS[name]
    warned = False

    def grade(rollout: Rollout) -> bool | None:
        nonlocal warned
        # Special tokens stay visible: a padding token that the student sampled is a mistake and must not vanish.
        text = tokenizer.decode(list(rollout.answer_ids), skip_special_tokens=False)
        try:
            return judge(text, rollout.prompt, rollout.finished, source)
        except Exception as error:  # any error of a grader, which may be user code
            problem = f"prompt {rollout.prompt.index}: the grader {name!r} raised {type(error).__name__}: {error}."
            if config.grader_errors == "raise":
                raise _grader_error(problem) from error
        if not warned:
            logger.warning("%s It counts as wrong, as later ones will without a word.", problem)
            warned = True
        return None

    return grade


def _grader_error(problem: str) -> DataError:
    return DataError(
        f"{problem} Fix the record or the grader, or set data.grader_errors=count_wrong to count such completions as "
        "wrong.",
        scope=Scope.ALL_RANKS,  # every rank that shares the sequence grades it
    )


def accuracy(rollouts: Iterable[Rollout], grader: Grader) -> float:
    """Fraction of the rollouts that the grader counts as right, in [0, 1]; NaN without rollouts."""
    verdicts = [bool(grader(rollout)) for rollout in rollouts]
    return sum(verdicts) / len(verdicts) if verdicts else float("nan")
