"""What is asked of a server."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from renio_megatron.errors import ConfigError

_TAKEN = frozenset(("model", "messages", "seed", "temperature", "top_p", "top_k", "max_tokens", "stop", "n", "stream"))


@dataclass(frozen=True)
class ServerRequest:
    """What is asked for one completion.

    Attributes:
        key: the caller's own identity of it, which comes back with the result; it is not sent.
        messages: the chat, as OpenAI's API has it.
        seed: seed of the draw; None: not sent.
    """

    key: Any
    messages: tuple[dict[str, str], ...]
    seed: int | None


@dataclass(frozen=True)
class ServerSampling:
    """How completions are drawn.

    Attributes:
        temperature: 0 for greedy.
        top_p, top_k: None: not sent. OpenAI's own API has no `top_k`.
        max_tokens: longest completion, in tokens.
        stop: texts that end a completion.
        extra: more parameters, sent as given. `max_completion_tokens` among them takes the place of `max_tokens`.
    Raises:
        ConfigError: `extra` holds what has a place of its own, or something is no JSON.
    """

    temperature: float
    top_p: float | None
    top_k: int | None
    max_tokens: int
    stop: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if taken := sorted(_TAKEN & set(self.extra)):
            raise ConfigError(
                f"extra parameters for the server must not hold {', '.join(taken)}: other settings say these, and a "
                "request draws one completion, as a whole."
            )
        try:
            json.dumps(self.parameters(), allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigError(f"sampling parameters for the server must be JSON: {error}.") from error

    def parameters(self) -> dict[str, Any]:
        """What is sent beside model, messages and seed; nothing for what is None.

        >>> ServerSampling(0.7, 0.9, None, 64).parameters()
        {'temperature': 0.7, 'max_tokens': 64, 'top_p': 0.9}
        """
        sent: dict[str, Any] = {"temperature": self.temperature}
        if "max_completion_tokens" not in self.extra:
            sent["max_tokens"] = self.max_tokens
        optional = {"top_p": self.top_p, "top_k": self.top_k, "stop": list(self.stop) or None}
        return {**sent, **{name: value for name, value in optional.items() if value is not None}, **self.extra}
