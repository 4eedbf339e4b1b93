"""A stand-in for a server that speaks OpenAI's protocol, on a free port of this machine."""

from __future__ import annotations

import contextlib
import http.server
import json
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Asked:
    """A request as it came: its number from 0 on, path, headers, and body as JSON."""

    number: int
    path: str
    headers: Mapping[str, str]
    body: Any


@dataclass(frozen=True)
class Says:
    """An answer. `body` is sent as JSON, or as it is where it is bytes; `raw` is all that is sent."""

    body: Any = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    cut: bool = False
    """Half of the body, then the end."""
    raw: bytes | None = None


CLOSES = Says(raw=b"")
"""The connection is closed without an answer."""


def completion(text: str | None, reason: str = "stop", tokens: int | None = 3, **message: Any) -> Says:
    """A right answer."""
    usage = {} if tokens is None else {"usage": {"prompt_tokens": 1, "completion_tokens": tokens}}
    choice = {"index": 0, "message": {"role": "assistant", "content": text, **message}, "finish_reason": reason}
    return Says({"id": "c", "object": "chat.completion", "choices": [choice], **usage})


class StandIn(http.server.ThreadingHTTPServer):
    """Answers as `says(asked)` says, which may wait. It keeps what it was asked, and counts connections."""

    request_queue_size = 64

    def __init__(self, says: Callable[[Asked], Says]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.says = says
        self.asked: list[Asked] = []
        self.opened = self.closed = self.under_way = self.most_under_way = 0
        self.changed = threading.Condition()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def wait_closed(self, count: int | None = None) -> None:
        """Until so many connections are closed, or all that were opened."""
        with self.changed:
            assert self.changed.wait_for(lambda: self.closed >= (self.opened if count is None else count), 20)

    def count(self, opened: int = 0, closed: int = 0, under_way: int = 0) -> None:
        with self.changed:
            self.opened, self.closed, self.under_way = (
                self.opened + opened,
                self.closed + closed,
                self.under_way + under_way,
            )
            self.most_under_way = max(self.most_under_way, self.under_way)
            self.changed.notify_all()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is none."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: StandIn

    def setup(self) -> None:
        super().setup()
        self.server.count(opened=1)

    def finish(self) -> None:
        with contextlib.suppress(OSError):
            super().finish()
        self.server.count(closed=1)

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with self.server.changed:
            number = len(self.server.asked)
            asked = Asked(number, self.path, dict(self.headers.items()), json.loads(body) if body else None)
            self.server.asked.append(asked)
        self.server.count(under_way=1)
        try:
            says = self.server.says(asked)
        finally:
            self.server.count(under_way=-1)
        self._send(says)

    do_POST = do_GET

    def _send(self, says: Says) -> None:
        if says.raw is not None:
            self.wfile.write(says.raw)
            self.close_connection = True
            return
        body = says.body if isinstance(says.body, bytes) else json.dumps(says.body).encode()
        self.send_response(says.status)
        for name, value in {"Content-Length": str(len(body)), **says.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if says.cut else body)
        self.close_connection = self.close_connection or says.cut

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@contextlib.contextmanager
def standing_in(says: Callable[[Asked], Says], tls: ssl.SSLContext | None = None) -> Iterator[StandIn]:
    """A server that runs."""
    with StandIn(says) as server:
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
