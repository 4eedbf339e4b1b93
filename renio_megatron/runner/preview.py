"""The first prompts of a recipe as its models see them, without the models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from renio_megatron.config.schema import JobConfig
from renio_megatron.config.teachers import ONLY
from renio_megatron.data.prompts import PromptStream
from renio_megatron.data.sources import build_source
from renio_megatron.models.architecture import Architecture
from renio_megatron.models.ends import Ends, ends_of
from renio_megatron.models.shipped import model_directory
from renio_megatron.models.tokenizer import check_same_tokenizer, load_tokenizer
from renio_megatron.runner.inputs import check_self_teachers, length_limits, notices_of_prompts, stops_of, teacher_views
from renio_megatron.types import Prompt

_SHOWN = 1500
"""Characters shown of a text at a run's start; longer texts are shortened in the middle."""


@dataclass(frozen=True)
class Preview:
    """The first prompts of a run, and the ends of its completions.

    Attributes:
        prompts: the prompts in training order.
        tokenizer: the student's tokenizer.
        student_ends, teacher_ends: ends of completions, and of each teacher's own, by its name.
        notices: sentences about valid inputs that may not be intended.
    """

    prompts: Sequence[Prompt]
    tokenizer: Any
    student_ends: Ends
    teacher_ends: dict[str, Ends]
    notices: Sequence[str] = ()

    def as_json(self) -> dict[str, Any]:
        """JSON-serializable values: texts with special tokens, token ids; ends as a list of token ids and texts."""
        teachers = {name: [*ends.token_ids, *ends.strings] for name, ends in self.teacher_ends.items()}
        return {
            "prompts": [self._prompt(prompt) for prompt in self.prompts],
            "student_ends": [*self.student_ends.token_ids, *self.student_ends.strings],
            "teacher_ends": teachers.get(ONLY, teachers or None),
            "notices": list(self.notices),
        }

    def _prompt(self, prompt: Prompt) -> dict[str, Any]:
        is_taught = bool(self.teacher_ends)
        found = {
            "student_text": decoded(prompt.student_ids, self.tokenizer),
            "student_ids": list(prompt.student_ids),
            "teacher_text": decoded(prompt.teacher_ids, self.tokenizer) if is_taught else None,
            "teacher_ids": list(prompt.teacher_ids) if is_taught else None,
            "answer": prompt.record.answer,
        }
        if prompt.teacher:
            found["teacher"] = prompt.teacher
        if prompt.completion_ids is not None:
            found["completion_text"] = decoded(prompt.completion_ids, self.tokenizer)
            found["completion_ids"] = list(prompt.completion_ids)
        return found

    def lines(self) -> list[str]:
        """The preview as lines of text."""
        found = []
        for prompt in self.prompts:
            found += [*prompt_lines(prompt, self.tokenizer, is_taught=bool(self.teacher_ends), limit=None), ""]
        found.append(f"completions end at {self.student_ends.describe(self.tokenizer)}")
        for name, ends in self.teacher_ends.items():
            found.append(f"the teacher{name and f' {name}'} ends its own at {ends.describe(self.tokenizer)}")
        return found + [f"note: {notice}" for notice in self.notices]


def preview(config: JobConfig, count: int) -> Preview:
    """The first `count` prompts of a recipe, and the ends of its completions; reads only the models' tokenizers.

    Raises:
        ConfigError, DataError: as at the start of a run.
    """
    model = model_directory(config.model, "model")
    tokenizer = load_tokenizer(model)
    architecture = Architecture.from_directory(model)
    teachers, architectures = {}, {}
    for one in config.teachers:
        directory, its_tokenizer, architectures[one.name] = model, tokenizer, architecture
        if one.settings.model is not None:
            directory = model_directory(one.settings.model, one.setting("model"))
            its_tokenizer = load_tokenizer(directory)
            check_same_tokenizer(tokenizer, its_tokenizer)
            architectures[one.name] = Architecture.from_directory(directory)
        teachers[one.name] = (ends_of(directory, its_tokenizer), its_tokenizer)
    stream = PromptStream(
        build_source(config.data, "train"),
        tokenizer,
        config.data,
        teacher_views=teacher_views(config, tokenizer),
        with_completions=config.longest_completion is None,
        max_length=config.longest_given,
        completions_per_prompt=config.completions_per_prompt,
        length_limits=length_limits(config, architecture, architectures),
    )
    prompts, ends = stream.distinct(count), ends_of(model, tokenizer, *stops_of(config))
    check_self_teachers(config, prompts)
    notices = notices_of_prompts(stream, prompts, ends, tokenizer, teachers)
    return Preview(prompts, tokenizer, ends, {name: ends for name, (ends, _) in teachers.items()}, notices)


def prompt_lines(prompt: Prompt, tokenizer: Any, *, is_taught: bool, limit: int | None = _SHOWN) -> list[str]:
    """A prompt as lines of text: both views with special tokens, lengths, the answer.

    Args:
        prompt: a prompt of the stream.
        tokenizer: the student's tokenizer.
        is_taught: whether a teacher reads it.
        limit: characters shown of a text; None: all.
    """
    views = [("student", prompt.student_ids)]
    if is_taught:
        who = f"teacher {prompt.teacher}" if prompt.teacher else "teacher"
        views.append((who, prompt.teacher_ids))
    if prompt.completion_ids is not None:
        views.append(("completion", prompt.completion_ids))
    found = [f"prompt {prompt.index}, answer {prompt.record.answer!r}"]
    for who, ids in views:
        if who.startswith("teacher") and ids == prompt.student_ids:
            found.append(f"  {who} sees the same")
            continue
        text = _shortened(decoded(ids, tokenizer), limit)
        found += [f"  {who}, {len(ids)} tokens:", *(f"    {line}" for line in text.split("\n"))]
    return found


def decoded(token_ids: Sequence[int], tokenizer: Any) -> str:
    """The text of tokens unchanged: with special tokens, and without cleanup of spaces."""
    return tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _shortened(text: str, limit: int | None) -> str:
    if limit is None or len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half} characters ...]\n{text[-half:]}"
