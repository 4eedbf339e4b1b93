"""A tokenizer's chat template: rendering, and warnings about its peculiarities."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from renio_megatron.errors import ConfigError, DataError

_DATE = re.compile(r"""strftime_now\(\s*("[^"\\]*"|'[^'\\]*')\s*\)""")
_PROBLEM, _ANSWER = "What is 2 + 2?", "renio-answer"
_MARKER = re.compile("<[|\uff5c][^|\uff5c<>\\s]{1,40}[|\uff5c]>|<(?:start|end)_of_turn>")  # \uff5c: DeepSeek's bar
"""Marks of turns that are single tokens wherever they are used."""


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template with a fixed date.

    Attributes:
        tokenizer: the Hugging Face tokenizer.
        text: the template, in Jinja; calls that read the clock are replaced by a fixed date.
        has_date: whether it has such a call.
    """

    tokenizer: Any
    text: str
    has_date: bool = False

    @classmethod
    def of(cls, tokenizer: Any, now: datetime | None = None) -> ChatTemplate:
        """The default template of a tokenizer.

        Args:
            tokenizer: a Hugging Face tokenizer.
            now: the time that `strftime_now` formats; None: the clock's time.

        Raises:
            ConfigError: it has none, several without a default, or one whose date cannot be fixed.
        """
        if not tokenizer.chat_template:
            raise ConfigError(
                "data.chat=true needs a tokenizer with a chat template, and this one has none. "
                "Set data.chat=false, or write the turns into data.student_template."
            )
        try:
            text = str(tokenizer.get_chat_template())
        except Exception as error:  # a ValueError about the names of several templates
            raise ConfigError(
                f"{_name(tokenizer)} cannot be used: {_words(error)} Keep one template, or one of the name `default`."
            ) from error
        now = now or datetime.now()
        fixed, count = _DATE.subn(lambda match: _quoted(now.strftime(match[1][1:-1])), text)
        if "strftime_now(" in fixed:
            raise ConfigError(
                f"{_name(tokenizer)} calls strftime_now with something else than a text in quotes, so its date cannot "
                "be held still: a run that is resumed tomorrow would read other prompts. Write the format there, or "
                "the date itself."
            )
        return cls(tokenizer, fixed, has_date=count > 0)

    @property
    def name(self) -> str:
        """Its name in messages."""
        return _name(self.tokenizer)

    def render(self, turns: list[dict[str, str]], where: str, *, prompt: bool = True, **options: Any) -> str:
        """The text of a conversation.

        Args:
            turns: its messages.
            where: the record, for the message.
            prompt: end with the header of the assistant's turn (the generation prompt).
            options: passed to the template.

        Raises:
            DataError: the template fails on it.
        """
        try:
            return self.tokenizer.apply_chat_template(
                turns, chat_template=self.text, add_generation_prompt=prompt, tokenize=False, **options
            )
        except Exception as error:  # Jinja's, and whatever a template's own expressions raise
            raise DataError(
                f"{where}: {self.name} fails on it: {type(error).__name__}: {_words(error)} Fix the template; or set "
                "data.chat=false and write the turns into data.student_template."
            ) from error

    def notices(self) -> list[str]:
        """One sentence per peculiarity that makes prompts differ from what is expected."""
        found = []
        if self.has_date:
            found.append(
                f"{self.name} writes the date. The date of the run's start is kept in its directory, so that it reads "
                "the same prompts when it is resumed another day."
            )
        if cut := self._cut_markers():
            found.append(
                f"{self.name} writes {' and '.join(map(repr, cut))}, which the tokenizer cuts into several tokens: it "
                "is the template of another model, or the tokenizer lacks these special tokens. Take the template that "
                "belongs to the model."
            )
        if header := self._missing_header():
            found.append(
                f"{self.name} does not read add_generation_prompt, so prompts end before {header!r}: the student "
                "writes that itself, and is trained on it. Let the template write it under `if add_generation_prompt`."
            )
        return found

    def _cut_markers(self) -> list[str]:
        """Marks of turns that the template writes and that are no tokens."""
        try:
            text = self.render([{"role": "user", "content": _PROBLEM}], "")
        except DataError:  # reported when records are rendered
            return []
        vocabulary = self.tokenizer.get_vocab()
        return [one for one in dict.fromkeys(_MARKER.findall(text)) if one not in vocabulary]

    def _missing_header(self) -> str | None:
        """Text that the template writes before an answer but not at the end of a generation prompt; None: nothing."""
        turns = [{"role": "user", "content": _PROBLEM}]
        try:
            asked, not_asked = self.render(turns, "", prompt=True), self.render(turns, "", prompt=False)
            answered = self.render([*turns, {"role": "assistant", "content": _ANSWER}], "", prompt=False)
        except DataError:  # reported when records are rendered
            return None
        if asked != not_asked or not answered.startswith(asked):
            return None
        header = answered[len(asked) :].partition(_ANSWER)[0]
        return header if header.strip() else None


def differing_templates(student: Any, teacher: Any, who: str) -> str | None:
    """A sentence about a teacher whose own chat template writes a question otherwise than the student's, in which both
    prompts are written; None where there is none, or nothing can be compared."""
    turns = [{"role": "user", "content": _PROBLEM}]
    try:
        ours, theirs = (ChatTemplate.of(one).render(turns, "") for one in (student, teacher))
    except (ConfigError, DataError):
        return None
    if ours == theirs:
        return None
    return (
        f"{who} reads prompts in the student's chat template, {ours!r}, and its own writes {theirs!r}: it may answer "
        "worse than it can. Give the student's directory the template in which both are at home, or write the turns "
        "into templates with data.chat=false."
    )


def _name(tokenizer: Any) -> str:
    return f"the chat template of {str(getattr(tokenizer, 'name_or_path', '') or type(tokenizer).__name__)!r}"


def _words(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if text.endswith((".", "!")) else f"{text}."


def _quoted(text: str) -> str:
    """A text as a Jinja string literal."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
