"""The client of a server: whether it serves the model, and completions."""

from __future__ import annotations

import difflib
import json
import ssl
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

from renio_megatron.errors import ConfigError, RenioError
from renio_megatron.evaluation.server.address import Key, address_of
from renio_megatron.evaluation.server.answers import Drawn, completion_of, fault_of, models_of, shown
from renio_megatron.evaluation.server.draw import Draw
from renio_megatron.evaluation.server.requests import ServerRequest, ServerSampling
from renio_megatron.evaluation.server.transport import Connection, Fault, Reply, Sockets
from renio_megatron.evaluation.server.tries import Clock, Failure, Notices, tried

CHECK_TRIES = 3
"""Tries of `check`: whoever gave a wrong address should not wait long."""
CHECK_S = 30.0
"""Seconds for an answer to `check`."""
_NAMED = 10  # models in a message


class ServerError(RenioError):
    """A server that does not answer as it should. Names its URL, what it answered, the tries and a remedy."""


class CompletionServer:
    """A model on a server.

    Args:
        url: base URL, as in `http://localhost:8000/v1`.
        model: name under which the server has the model.
        key: the server's key; None: none is sent. It is in no message.
        concurrency: requests at a time; each has a thread, and a connection that stays open during a draw.
        timeout_s: seconds for one answer.
        tries: how often a request is sent, at the most, where trying again may help.
        report: takes a line where requests wait for another try, at most one in 10 s, in the calling thread.
        key_variable: the environment variable that the key is from, for messages.
        clock: of the pauses; tests have their own.
    Raises:
        ConfigError: no base URL, one with credentials, a key that no header can hold, or a number below 1.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key: str | None = None,
        concurrency: int = 16,
        timeout_s: float = 600.0,
        tries: int = 6,
        report: Callable[[str], None] | None = None,
        key_variable: str = "OPENAI_API_KEY",
        clock: Clock | None = None,
    ) -> None:
        for name, value in (("concurrency", concurrency), ("tries", tries)):
            if value < 1:
                raise ConfigError(f"{name} of a server must be at least 1; got {value}.")
        if not 0 < timeout_s < threading.TIMEOUT_MAX:
            raise ConfigError(f"timeout_s of a server must be a positive number of seconds; got {timeout_s}.")
        self.address, self.model = address_of(url), model
        self._key = Key(key, key_variable)
        self._concurrency, self._timeout_s, self._tries = concurrency, timeout_s, tries
        self._clock = clock or Clock()
        self._notices = Notices(report, self._clock)
        self._tls = ssl.create_default_context() if self.address.scheme == "https" else None

    def __repr__(self) -> str:
        return f"CompletionServer({str(self.address)!r}, {self.model!r})"

    def check(self) -> None:
        """Asks the server which models it has; returns where ours is among them.

        Raises:
            ServerError: the server cannot be reached, refuses, is no such server, or does not serve the model.
        """
        connection = self._connection(Sockets())
        try:
            found = tried(
                lambda: self._models(connection),
                min(self._tries, CHECK_TRIES),
                clock=self._clock,
                stop=threading.Event(),
                on_wait=lambda cause: self._notices.waiting(1, cause),
                on_retry=lambda: None,
            )
        finally:
            connection.close()
        if isinstance(found, Failure):
            raise ServerError(found.message(f"{self.address}/models"))
        if self.model not in found:
            raise ServerError(self._other_models(found))

    def draw(
        self,
        requests: Sequence[ServerRequest],
        sampling: ServerSampling,
        on_drawn: Callable[[ServerRequest, Drawn], None],
    ) -> None:
        """Draws a completion for each request, and gives each to `on_drawn` as soon as it is there.

        `on_drawn` is called in the calling thread, once for each completion, in the order of their arrival. After a
        request that failed for good no other is begun; those under way are awaited and given. Whatever else ends
        the draw, as an interrupt or an exception of `on_drawn` does, ends those, too.

        Raises:
            ServerError: a request failed for good. Names how many completions were drawn.
        """
        draw = Draw(
            requests,
            self._connection,
            lambda connection, request: self._completion(connection, request, sampling),
            tries=self._tries,
            on_drawn=on_drawn,
            clock=self._clock,
            notices=self._notices,
        )
        draw.run(min(self._concurrency, len(requests)))
        if draw.failures:
            first = draw.failures[0].message(f"{self.address}/chat/completions")
            others = len(draw.failures) - 1
            also = f" {others} other request{'s' if others > 1 else ''} failed, too." if others else ""
            raise ServerError(
                f"{first}{also} {draw.drawn} of {len(requests)} completions were drawn; the same command goes on "
                "with the rest."
            )

    def _connection(self, sockets: Sockets) -> Connection:
        return Connection(self.address, self._key, self._tls, sockets)

    def _fault_of(self, reply: Reply, sent: Sequence[str] = ()) -> Fault | None:
        return fault_of(reply, self._key, self.address, now=self._clock.time(), sent=sent)

    def _models(self, connection: Connection) -> list[str] | Fault:
        reply = connection.ask("/models", None, min(self._timeout_s, CHECK_S))
        return reply if isinstance(reply, Fault) else self._fault_of(reply) or models_of(reply, self._key)

    def _completion(self, connection: Connection, request: ServerRequest, sampling: ServerSampling) -> Drawn | Fault:
        sent = {"model": self.model, "messages": list(request.messages), **sampling.parameters()}
        if request.seed is not None:
            sent["seed"] = request.seed
        reply = connection.ask("/chat/completions", json.dumps(sent).encode(), self._timeout_s)
        if isinstance(reply, Reply):
            return self._fault_of(reply, list(sent)) or completion_of(reply, self._key)
        if reply.late:
            return replace(
                reply,
                advice=f"Raise timeout_s (now {self._timeout_s:g}), or lower concurrency (now {self._concurrency}) or "
                f"max_completion_length (now {sampling.max_tokens}).",
            )
        return reply

    def _other_models(self, models: Sequence[str]) -> str:
        close = difflib.get_close_matches(self.model, models, n=3, cutoff=0.4)
        names = [*close, *(model for model in models if model not in close)]
        listed = ", ".join(shown(name, self._key) for name in names[:_NAMED]) or "none"
        more = f" and {len(names) - _NAMED} others" if len(names) > _NAMED else ""
        return f"{self.address} does not serve the model {self.model!r}, but: {listed}{more}. Name one of these."
