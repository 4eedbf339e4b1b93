"""The endless stream of tokenized prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any

from renio_megatron.config import DataConfig
from renio_megatron.data.prompt_views import (
    PromptView,
    chat_template_of,
    encode_text,
    encode_turns,
    encode_view,
    student_view,
    teacher_view,
)
from renio_megatron.data.selection import OverlongError, Selection
from renio_megatron.data.sources import build_source
from renio_megatron.data.sources.source import Source, solution_of
from renio_megatron.errors import ConfigError, DataError
from renio_megatron.types import Prompt, Record


@dataclass(frozen=True)
class LengthLimits:
    """Maximum positions of the models, and the positions that completions need.

    Attributes:
        student: positions of the student.
        teachers: positions of each teacher, by its name in the recipe.
        completion: tokens of the longest completion; None: the length of each record's own.
        answer: tokens of the longest answer in an evaluation.
    """

    student: int
    teachers: Mapping[str, int] = field(default_factory=dict)
    completion: int | None = None
    answer: int | None = None


class PromptStream:
    """The run's prompts: position p is the same prompt in every run with the same settings, on every rank.

    Args:
        source: the training problems.
        tokenizer: the student's tokenizer; the teacher reads the same ids.
        config: templates, chat and the length limit; also names the evaluation problems.
        teacher_views: how each of several teachers sees a problem, by the names used in records; None: there is one
            teacher, with the view set in `config`.
        with_completions: fill in `Prompt.completion_ids`, the record's solution and the end token, for fine-tuning.
        max_length: tokens of prompt and given completion together, at most; None: no limit.
        completions_per_prompt: positions in a row that have the same problem.
        length_limits: limits of the models; None: not checked.
        now: the time that a chat template may insert; None: the clock's.
    Attributes:
        chat_template: the chat template that is applied; None where none is.
    Raises:
        ConfigError: templates or chat settings that cannot work with this tokenizer.
        DataError: a solution is needed, and a record has none.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Any,
        config: DataConfig,
        *,
        teacher_views: Mapping[str, PromptView] | None = None,
        with_completions: bool = False,
        max_length: int | None = None,
        completions_per_prompt: int = 1,
        length_limits: LengthLimits | None = None,
        now: datetime | None = None,
    ) -> None:
        self.chat_template = chat_template_of(tokenizer, config, now)
        self._length_limits = length_limits
        self.source = source
        self._tokenizer = tokenizer
        self._config = config
        self._with_completions, self._max_length = with_completions, max_length
        self._repeats = completions_per_prompt
        self._student_view = student_view(config)
        self._teacher_views = {"": teacher_view(config)} if teacher_views is None else teacher_views
        self._is_routed = teacher_views is not None
        if with_completions:
            source.require_solutions("fine-tuning uses it as the completion")
        self._selections: list[Selection] = []
        if config.overlong == "skip":
            self._selections = [Selection(source, lambda record: self._prompt(record, 0), "training")]
        everyones = (self._student_view, *(() if self._is_routed else self._teacher_views.values()))
        for view in everyones:  # with several teachers, each one's records are checked when their prompts are built
            if view.uses_solution:
                source.require_solutions(f"{view.setting} uses {{solution}}")

    def batch(self, start: int, count: int) -> list[Prompt]:
        """Prompts `start` to `start + count - 1` of the endless training order."""
        return [self._train_prompt(position) for position in range(start, start + count)]

    def distinct(self, count: int) -> list[Prompt]:
        """The prompts of the first `count` problems of the training order, or of all where there are fewer."""
        count = count if self.source.size is None else min(count, self.source.size)
        if self._selections:
            count = self._selections[0].num_distinct(count)
        return [self._train_prompt(number * self._repeats) for number in range(count)]

    def notices(self) -> list[str]:
        """Sentences about records that were left out so far, of training and of evaluation."""
        return [one.notice() for one in self._selections if one.left_out]

    def evaluation(self, count: int) -> list[Prompt]:
        """The first `count` evaluation prompts, or all where there are fewer; no teacher reads them."""
        source = self.evaluation_source
        count = count if source.size is None else min(count, source.size)
        if self._config.overlong == "refuse":
            return [self._prompt(source.record(index), index, is_taught=False) for index in range(count)]
        selection = Selection(source, lambda record: self._prompt(record, 0, is_taught=False), "evaluation")
        self._selections[1:] = [selection]
        numbers = range(selection.num_distinct(count))
        return [self._prompt(selection.record(number), number, is_taught=False) for number in numbers]

    @cached_property
    def evaluation_source(self) -> Source:
        """The evaluation problems, opened at the first use."""
        return build_source(self._config, "eval")

    def _train_prompt(self, position: int) -> Prompt:
        number = position // self._repeats
        return self._prompt((self._selections[0] if self._selections else self.source).record(number), position)

    def _prompt(self, record: Record, position: int, *, is_taught: bool = True) -> Prompt:
        student_ids = encode_view(self._student_view, record, self._tokenizer, self.chat_template)
        teacher, teacher_ids = "", student_ids
        if is_taught and not self._with_completions:
            teacher = self._teacher_of(record)
            view = self._teacher_views[teacher]
            if record.teacher_turns is not None and view.setting == self._student_view.setting:
                turns = view.conversation(record.teacher_turns, record)
                teacher_ids = encode_turns(view, turns, record, self._tokenizer, self.chat_template)
            elif view != self._student_view:
                teacher_ids = encode_view(view, record, self._tokenizer, self.chat_template)
        for who, token_ids in (("student", student_ids), ("teacher", teacher_ids)):
            self._check_length(who, len(token_ids), record)
        completion_ids = self._completion(record) if self._with_completions else None
        if completion_ids is not None:
            self._check_whole(len(student_ids) + len(completion_ids), record)
        if self._length_limits is not None:
            longest = self._length_limits.completion if is_taught else self._length_limits.answer
            longest = len(completion_ids or ()) if longest is None else longest
            _check_length("student", self._length_limits.student, len(student_ids), longest, record)
            if is_taught and teacher in self._length_limits.teachers:  # none in fine-tuning
                _check_length("teacher", self._length_limits.teachers[teacher], len(teacher_ids), longest, record)
        return Prompt(position, student_ids, teacher_ids, record, completion_ids, teacher)

    def _teacher_of(self, record: Record) -> str:
        """The name of the teacher that scores the completions of a record."""
        if not self._is_routed:
            return ""
        if record.teacher is None:
            raise DataError(
                f"{record.where}: there is no column {self._config.teacher_key!r}, which names one of teacher.routes. "
                "Set data.teacher_key to the right column, or leave such records out."
            )
        if record.teacher not in self._teacher_views:
            raise DataError(
                f"{record.where}: column {self._config.teacher_key!r} names the teacher {record.teacher!r}; "
                f"teacher.routes has {', '.join(self._teacher_views)}. Fix the record, or add the teacher."
            )
        return record.teacher

    def _check_length(self, who: str, length: int, record: Record) -> None:
        if length == 0:
            raise DataError(f"{record.where}: the {who}'s prompt has no tokens, so nothing predicts the first token.")
        if length > self._config.max_prompt_length:
            raise OverlongError(
                record.where,
                f"the {who}'s prompt has {length} tokens, more than "
                f"data.max_prompt_length={self._config.max_prompt_length}.",
                "Raise it, or leave the record out, as data.overlong=skip does.",
            )

    def _check_whole(self, length: int, record: Record) -> None:
        if self._max_length is not None and length > self._max_length:
            raise OverlongError(
                record.where,
                f"prompt and completion have {length} tokens, more than the {self._max_length} that max_length or "
                "train.max_tokens_per_micro_batch allows.",
                "Raise it, or leave the record out, as data.overlong=skip does.",
            )

    def _completion(self, record: Record) -> tuple[int, ...]:
        solution = solution_of(record, "fine-tuning uses it as the completion")
        return (*encode_text(solution, self._tokenizer, record.where), self._tokenizer.eos_token_id)


def _check_length(who: str, positions: int, prompt: int, completion: int, record: Record) -> None:
    """Raises `DataError` where a sequence exceeds its model's positions; the last token is not read."""
    needed = prompt + completion - 1
    if needed > positions:
        raise OverlongError(
            record.where,
            f"the {who}'s prompt of {prompt} tokens and a completion of up to {completion} need {needed} positions; "
            f"the {who} was made for {positions} (max_position_embeddings).",
            "Allow shorter completions (rollout.max_completion_length, evaluate.max_completion_length), leave the "
            "record out, as data.overlong=skip does, or choose another model. If the model is known to work beyond, "
            "say so in its config.json.",
        )


_LARGEST = 1e300  # excludes infinity, and integers that overflow a float


def number_in(prompt: Prompt, column: str) -> float:
    """The value of a column in a prompt's record; raises `DataError` where it is not a number."""
    value = prompt.record.metadata.get(column)
    if isinstance(value, bool) or not isinstance(value, int | float) or not -_LARGEST < value < _LARGEST:
        raise DataError(
            f"prompt {prompt.index}: its record has {value!r} in the column {column!r}, where the weighting reads a "
            "number. Fix the record, or leave it out."
        )
    return float(value)


def check_views_differ(prompts: list[Prompt], kind: str) -> None:
    """Raises `ConfigError` where a self-teacher, of `teacher.kind`, would see the same prompts as the student.

    Teacher and student would be the same distribution: every divergence and every log ratio would start at 0.
    """
    if prompts and all(prompt.student_ids == prompt.teacher_ids for prompt in prompts):
        raise ConfigError(
            f"teacher.kind={kind}, but the teacher's view of the first {len(prompts)} prompts is the student's: there "
            "is nothing to learn. Give data.teacher_template the {solution}, or set data.teacher_enable_thinking."
        )
