"""The graders of generated problems: modchain's last character, and the scoring of reasoning-gym's tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from renio_megatron.evaluation.graders.final_answer import after_thinking, boxed
from renio_megatron.evaluation.graders.grader import CUT, NO_ANSWER, UNCLOSED_THINKING, Completion, Grade
from renio_megatron.evaluation.graders.number import find_number
from renio_megatron.evaluation.graders.quantities import parse_number
from renio_megatron.types import Record, Verdict

Score = Callable[[str, str, Mapping[str, Any]], float]
"""(given answer, right answer, metadata) -> 1.0 for right."""


def grade_modchain(completion: Completion, record: Record) -> Verdict:
    """Whether a finished completion's last character is the answer.

    >>> grade_modchain(Completion("+52*36-88"), Record("", answer="8"))
    Verdict(correct=True, answer='8', reason='')
    >>> grade_modchain(Completion("+52*36-88", finished=False), Record("", answer="8")).correct
    False
    """
    if not completion.finished:
        return Verdict(False, None, CUT)
    answer = completion.text[-1:]
    return Verdict(answer == record.answer, answer or None, "" if answer else NO_ANSWER)


def reasoning_gym_grade(score: Score) -> Grade:
    """A grade by a task's own scoring: a box, else the last number or line, as its answer is one or the other."""

    def grade(completion: Completion, record: Record) -> Verdict:
        text, answer = after_thinking(completion), record.answer or ""
        if text is None:
            return Verdict(False, None, UNCLOSED_THINKING)
        box = boxed(text)
        if not completion.finished and box is None:
            return Verdict(False, None, CUT)
        given: str | None
        if parse_number(answer) is not None:
            given = find_number(text if box is None else box)
        else:
            given = box if box is not None else (text.strip().splitlines() or [""])[-1].strip()
        if given is None:
            return Verdict(False, None, NO_ANSWER)
        return Verdict(score(given, answer, record.metadata) == 1.0, given)

    return grade
