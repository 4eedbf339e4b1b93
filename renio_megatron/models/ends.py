"""Tokens and texts that end a completion, from a model's files and from the recipe."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from renio_megatron.errors import ConfigError

_TOKENS_AROUND = 8
"""Extra tokens decoded before those that may form a stop string: at the start of a decoded span text may be lost."""


@dataclass(frozen=True)
class Ends:
    """Tokens and texts that end a completion.

    Attributes:
        token_ids: end tokens, ascending.
        strings: stop strings inside the completion, with special tokens decoded.
    """

    token_ids: tuple[int, ...]
    strings: tuple[str, ...] = ()

    def describe(self, tokenizer: Any) -> str:
        """The ends as readable text."""
        tokens = [f"{tokenizer.convert_ids_to_tokens(token)!r} ({token})" for token in self.token_ids]
        return ", ".join([*tokens, *(f"the text {text!r}" for text in self.strings)])

    def in_text(self, tokenizer: Any) -> Callable[[Sequence[int]], bool] | None:
        """A function that tells whether a completion's last tokens hold one of `strings`; None where there are none.

        It is called after each token, so it decodes only the last tokens: a token that decodes to any text gives at
        least one byte.
        """
        if not self.strings:
            return None
        window = max(len(text.encode()) for text in self.strings) + _TOKENS_AROUND

        def found(token_ids: Sequence[int]) -> bool:
            text = tokenizer.decode(list(token_ids[-window:]), skip_special_tokens=False)
            return any(one in text for one in self.strings)

        return found


def ends_of(
    directory: Path,
    tokenizer: Any,
    stop_token_ids: Sequence[int] | None = None,
    stop_strings: Sequence[str] | None = None,
) -> Ends:
    """The ends that transformers' `generate` uses for a model, the tokenizer's end token, and the recipe's stops.

    `generate` reads generation_config.json, and config.json only where there is no such file; never the tokenizer.

    Args:
        directory: the model's directory.
        tokenizer: the model's tokenizer.
        stop_token_ids, stop_strings: those of the section `rollout`.

    Raises:
        ConfigError: a file that cannot be read, or an id without a token.
    """
    tokens, strings = {int(tokenizer.eos_token_id), *(stop_token_ids or ())}, list(stop_strings or ())
    for token in stop_token_ids or ():
        if token >= len(tokenizer):
            raise ConfigError(
                f"rollout.stop_token_ids: the tokenizer has {len(tokenizer)} tokens, and none of id {token}."
            )
    path = next(
        (path for name in ("generation_config.json", "config.json") if (path := directory / name).is_file()), None
    )
    if path is not None:
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            tokens.update(_listed(values.get("eos_token_id"), int))
            strings += [text for text in _listed(values.get("stop_strings"), str) if text]
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError(
                f"{path} cannot be read: {error}. It should hold a JSON object whose eos_token_id, if it has one, is a "
                "token or a list of them, and whose stop_strings are texts. Fix it, or remove it: the tokenizer's end "
                "token then ends completions."
            ) from error
    return Ends(tuple(sorted(tokens)), tuple(dict.fromkeys(strings)))


def differing_ends(student: Ends, teacher: Ends, tokenizer: Any, who: str) -> str | None:
    """A sentence about end tokens of a teacher that do not end the student's completions; None where there are none."""
    its_own = (token for token in teacher.token_ids if token < len(tokenizer))  # others the student cannot write
    missing = Ends(tuple(token for token in its_own if token not in student.token_ids))
    if not missing.token_ids:
        return None
    return (
        f"the student's completions end at {student.describe(tokenizer)}, and {who} also ends its own at "
        f"{missing.describe(tokenizer)}: it teaches the student an end after which the student writes on, until it is "
        f"cut. Set rollout.stop_token_ids=[{','.join(map(str, missing.token_ids))}]."
    )


def _listed(value: Any, kind: type) -> list[Any]:
    """A value that may be a list, as a list of values of one type."""
    values = [] if value is None else value if isinstance(value, list) else [value]
    for one in values:
        if not isinstance(one, kind) or isinstance(one, bool):
            raise TypeError(f"{one!r} is not {'a token id' if kind is int else 'a text'}")
    return values
