"""Conversations in records: lists of turns, as data sets of chats have them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from renio_megatron.errors import DataError
from renio_megatron.types import Turn

_OTHER_NAMES = {"human": "user", "gpt": "assistant"}
"""Roles of the format with `from` and `value`."""
_NOT_READ = (
    *("tool_calls", "tool_call_id", "function_call", "tools", "name", "reasoning_content", "reasoning", "thinking"),
    *("images", "audio", "video"),
)
"""Parts of a turn that chat templates know, beside its role and its text."""


@dataclass(frozen=True)
class Conversation:
    """A conversation that asks for an answer.

    Attributes:
        before: the turns before the last question.
        question: the user's last turn.
        answer: the assistant's turn behind it; None where the conversation ends with the question.
    """

    before: tuple[Turn, ...]
    question: str
    answer: str | None


def conversation_of(value: Sequence[Any], column: str, where: str) -> Conversation:
    """The conversation of a list of turns: objects with `role` and `content`, or with `from` and `value`.

    >>> turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
    >>> conversation_of(turns, "messages", "here").before
    (('system', 'Be brief.'),)

    Raises:
        DataError: it is none, holds something else than text, or does not end with a question or its answer.
    """
    turns = [_turn(one, f"{where}: column {column!r}, turn {number}") for number, one in enumerate(value, 1)]
    answer = None
    if turns and turns[-1][0] == "assistant":
        answer = turns.pop()[1]
    if not turns or turns[-1][0] != "user":
        last = f"a turn of {turns[-1][0]!r}" if turns else "nothing"
        raise DataError(
            f"{where}: column {column!r} must end with a turn of the user, or with one and the assistant's answer; "
            f"got {last} there. Fix the record, or leave it out."
        )
    return Conversation(tuple(turns[:-1]), turns[-1][1], answer)


def answer_of(value: Sequence[Any], column: str, where: str) -> str:
    """The text of a list that holds the assistant's turn alone, as TRL's columns `completion` do.

    >>> answer_of([{"role": "assistant", "content": "4"}], "completion", "here")
    '4'

    Raises:
        DataError: it holds anything else.
    """
    turns = [_turn(one, f"{where}: column {column!r}, turn {number}") for number, one in enumerate(value, 1)]
    if len(turns) != 1 or turns[0][0] != "assistant":
        roles = ", ".join(role for role, _ in turns) or "nothing"
        raise DataError(f"{where}: column {column!r} must hold text, or one turn of the assistant; got {roles}.")
    return turns[0][1]


def _turn(turn: Any, where: str) -> Turn:
    if isinstance(turn, Mapping):
        if more := [name for name in _NOT_READ if turn.get(name)]:
            raise DataError(
                f"{where}: it has {', '.join(more)}, which a chat template may write and this product does not read. "
                "Leave the record out, or write what the model shall see into its text."
            )
        for role_key, text_key in (("role", "content"), ("from", "value")):
            if role_key in turn and text_key in turn:
                role, text = turn[role_key], _text(turn[text_key])
                if isinstance(role, str) and text is not None:
                    return _OTHER_NAMES.get(role, role), text
                what = f"the role {role!r}" if text is not None else f"{type(turn[text_key]).__name__} as its contents"
                raise DataError(f"{where}: it must hold text; got {what}. Images and calls of tools are not read.")
    raise DataError(
        f"{where}: a turn is an object with `role` and `content` (or `from` and `value`); got {str(turn)[:80]!r}."
    )


def _text(content: Any) -> str | None:
    """The contents of a turn: text, or a list of parts that are all text; None for anything else."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return None
    parts = [part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None for part in content]
    return "".join(parts) if parts and all(isinstance(part, str) for part in parts) else None  # type: ignore[arg-type]
