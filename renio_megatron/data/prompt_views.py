"""The text of a prompt as the student and as the teacher see it, and its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from renio_megatron.config import DataConfig
from renio_megatron.config.templates import check_fields, fields_of, filled
from renio_megatron.data.sources.source import solution_of
from renio_megatron.errors import ConfigError, DataError
from renio_megatron.models.chat_template import ChatTemplate
from renio_megatron.types import Record, Turn


@dataclass(frozen=True)
class PromptView:
    """How one of the two models sees a problem.

    Example: ``PromptView("Problem: {problem}", chat=True, enable_thinking=False, setting="data.student_template")``.

    Attributes:
        template: text with the fields {problem} and {solution}; a double brace stands for a single one, and a brace
            that encloses no name, as in ``\\boxed{}``, for itself.
        chat: wrap the text in the tokenizer's chat template, as the user's turn.
        enable_thinking: passed to the chat template; None leaves it out.
        setting: the setting that holds the template, for error messages.
        system: system turn before the others; None: none.
        system_setting: the setting that holds it.
    Raises:
        ConfigError: an unknown field in the template.
    """

    template: str
    chat: bool
    enable_thinking: bool | None
    setting: str
    system: str | None = None
    system_setting: str = "data.student_system"

    def __post_init__(self) -> None:
        check_fields(self.setting, self.template)

    @property
    def uses_solution(self) -> bool:
        """Whether the template shows the worked solution."""
        return "solution" in fields_of(self.template)

    def fill(self, record: Record) -> str:
        """The template filled with the record's texts; braces inside these texts stay as they are.

        >>> PromptView("{problem} {{x}}", False, None, "template").fill(Record("{solution}?"))
        '{solution}? {x}'
        """
        values = {"problem": record.problem}
        if self.uses_solution:
            values["solution"] = solution_of(record, f"{self.setting} uses {{solution}}")
        return filled(self.template, values.__getitem__)

    def turns(self, record: Record) -> tuple[Turn, ...]:
        """The prompt's conversation: the system turn, those before the problem, and the template.

        Raises:
            DataError: the record has a system turn, too.
        """
        return self.conversation((*record.before, ("user", self.fill(record))), record)

    def conversation(self, turns: Sequence[Turn], record: Record) -> tuple[Turn, ...]:
        """A record's turns with the system turn before them; raises as `turns`."""
        if self.system is None:
            return tuple(turns)
        if turns and turns[0][0] == "system":
            raise DataError(
                f"{record.where}: the record has a system turn of its own, and {self.system_setting} is set. Leave one "
                "of them out."
            )
        return (("system", self.system), *turns)


def student_view(config: DataConfig) -> PromptView:
    """The student's view of a problem."""
    return PromptView(
        config.student_template, config.chat, config.enable_thinking, "data.student_template", config.student_system
    )


def teacher_view(config: DataConfig, setting: str = "data.teacher_template") -> PromptView:
    """The teacher's view of a problem, with the student's for unset values; `setting` is the key of its template."""
    thinking = config.enable_thinking if config.teacher_enable_thinking is None else config.teacher_enable_thinking
    own, of_own = config.teacher_system, setting.replace("template", "system")
    if config.teacher_template is not None:
        return PromptView(config.teacher_template, config.chat, thinking, setting, own, of_own)
    view = PromptView(config.student_template, config.chat, thinking, "data.student_template", config.student_system)
    return view if own is None else replace(view, system=own, system_setting=of_own)


def chat_template_of(tokenizer: Any, config: DataConfig, now: datetime | None = None) -> ChatTemplate | None:
    """The chat template of `data.chat`; None where none is applied.

    Args:
        tokenizer: a Hugging Face tokenizer.
        config: the settings.
        now: the time that the template may insert; None: the clock's.

    Raises:
        ConfigError: the settings of the chat template and the tokenizer do not fit.
    """
    thinking = [name for name in ("enable_thinking", "teacher_enable_thinking") if getattr(config, name) is not None]
    if not config.chat:
        if thinking:
            raise ConfigError(f"data.{thinking[0]} needs data.chat=true: only a chat template reads it.")
        return None
    template = ChatTemplate.of(tokenizer, now)
    if thinking and "enable_thinking" not in template.text:
        raise ConfigError(f"data.{thinking[0]} is set, but the chat template does not read enable_thinking.")
    return template


def encode_view(
    view: PromptView, record: Record, tokenizer: Any, chat_template: ChatTemplate | None = None
) -> tuple[int, ...]:
    """Token ids of the prompt, without any completion.

    With `chat` the chat template adds all special tokens. Without it the ids are those of the text, after the
    beginning-of-text token where the tokenizer adds one (Llama does; Qwen and modchain do not); an end token is never
    added.

    Args:
        view: a model's view.
        record: the problem.
        tokenizer: the student's.
        chat_template: chat template for a view with `chat`; None: the tokenizer's.

    Raises:
        DataError: the record lacks a solution that the template uses, the chat template fails on it, or the tokenizer
            cannot encode the text.
    """
    return encode_turns(view, view.turns(record), record, tokenizer, chat_template)


def encode_turns(
    view: PromptView,
    turns: Sequence[Turn],
    record: Record,
    tokenizer: Any,
    chat_template: ChatTemplate | None = None,
) -> tuple[int, ...]:
    """Token ids of a conversation as `encode_view` makes them, in place of the text of the view's template.

    Raises:
        DataError: as `encode_view`; or a conversation of several turns, which only a chat template can write.
    """
    if view.chat:
        options = {} if view.enable_thinking is None else {"enable_thinking": view.enable_thinking}
        asked = [{"role": role, "content": text} for role, text in turns]
        text = (chat_template or ChatTemplate.of(tokenizer)).render(asked, record.where, **options)
        return encode_text(text, tokenizer, record.where)
    if len(turns) > 1:
        roles = ", ".join(role for role, _ in turns)
        raise DataError(
            f"{record.where}: the prompt is a conversation of {len(turns)} turns ({roles}), which only a chat template "
            "can write. Set data.chat=true."
        )
    text = turns[0][1]
    token_ids = encode_text(text, tokenizer, record.where)
    bos = tokenizer.bos_token_id
    starts_with_bos = bos is not None and tokenizer("").input_ids[:1] == [bos]
    return (bos, *token_ids) if starts_with_bos and token_ids[:1] != (bos,) else token_ids


def encode_text(text: str, tokenizer: Any, where: str) -> tuple[int, ...]:
    """Token ids of the text without special tokens; raises `DataError` naming `where` if it cannot be encoded."""
    try:
        return tuple(tokenizer(text, add_special_tokens=False).input_ids)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise DataError(f"{where}: the tokenizer cannot encode {text[:80]!r} ({error}).") from error
