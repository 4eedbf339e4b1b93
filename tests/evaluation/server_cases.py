"""What the tests of the client of a server share."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable
from typing import Any

import pytest

from renio_megatron.evaluation.server import CompletionServer, Drawn, ServerError, ServerRequest, ServerSampling
from renio_megatron.evaluation.server.draw import THREADS
from renio_megatron.evaluation.server.tries import Clock
from tests.fakes.completion_server import Asked, Says, completion, standing_in

KEY = "sk-0123456789/abc"
SAMPLING = ServerSampling(temperature=0.7, top_p=None, top_k=None, max_tokens=64)
WAIT_S = 20  # for events that come
OUTCOME = " 0 of 1 completions were drawn; the same command goes on with the rest."


def requests(count: int) -> list[ServerRequest]:
    return [ServerRequest(("p", n), ({"role": "user", "content": f"{n}"},), seed=n) for n in range(count)]


def content(asked: Asked) -> int:
    return int(asked.body["messages"][0]["content"])


def echo(asked: Asked) -> Says:
    return completion(asked.body["messages"][0]["content"])


def drawn(
    server: CompletionServer, asked: list[ServerRequest], sampling: ServerSampling = SAMPLING
) -> dict[Any, Drawn]:
    found: dict[Any, Drawn] = {}

    def keep(request: ServerRequest, one: Drawn) -> None:
        assert request.key not in found and threading.current_thread() is threading.main_thread()
        found[request.key] = one

    server.draw(asked, sampling, keep)
    return found


def chunked(*pieces: bytes) -> bytes:
    lines = [f"{len(piece):x}\r\n".encode() + piece + b"\r\n" for piece in (*pieces, b"")]
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"".join(lines)


def workers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(THREADS)]


class Pauses(list):
    """Pauses that were asked for; none is made. `clock(part)` takes that part of each bound."""

    def clock(self, part: float = 1.0, time: float = 0.0) -> Clock:
        return Clock(
            wait=lambda event, seconds: self.append(seconds),
            uniform=lambda low, high: low + part * (high - low),
            time=lambda: time,
        )


def in_turn(*answers: Says) -> Callable[[Asked], Says]:
    """The n-th answer to the n-th request, the last one to those that follow."""
    return lambda asked: answers[min(asked.number, len(answers) - 1)]


def refusal(says: Says | Callable[[Asked], Says], sampling: ServerSampling = SAMPLING, **settings: Any) -> str:
    """The error's message after one request, without the server's URL."""
    with standing_in(says if callable(says) else in_turn(says)) as server:
        with pytest.raises(ServerError) as caught:
            drawn(CompletionServer(server.url, "m", **{"clock": Pauses().clock(), **settings}), requests(1), sampling)
        return str(caught.value).replace(server.url, "URL")


def models(*names: str) -> Says:
    return Says({"object": "list", "data": [{"id": name, "object": "model"} for name in names]})


def checked(says: Says, model: str = "m", path: str = "/v1", **settings: Any) -> str:
    """What `check` says, without the server's URL; empty where all is well."""
    with standing_in(lambda asked: says) as server:
        base = server.url.removesuffix("/v1")
        try:
            CompletionServer(base + path, model, clock=Pauses().clock(), **settings).check()
        except ServerError as error:
            return str(error).replace(base, "BASE")
        assert [asked.path for asked in server.asked] == [f"{path}/models"]
        return ""


def told(error: BaseException) -> str:
    """All that a traceback shows of an error, and of those that led to it."""
    return "".join(traceback.TracebackException.from_exception(error).format()) + repr(error)


def local_variables(error: BaseException) -> str:
    """What the package's functions held on the error's way."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    held = [repr(one.f_locals) for one in frames if one.f_globals["__name__"].startswith("renio_megatron.")]
    assert held
    return "".join(held)
