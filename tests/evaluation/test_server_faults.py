"""A server that does not answer as it should: what is tried again, how long the pauses are, and what is said."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest

from renio_megatron.evaluation.server import CompletionServer, ServerError, ServerSampling
from renio_megatron.evaluation.server import transport as transport_module
from renio_megatron.evaluation.server.tries import Clock, Notices
from tests.evaluation.server_cases import (
    OUTCOME,
    SAMPLING,
    WAIT_S,
    Pauses,
    chunked,
    content,
    drawn,
    echo,
    in_turn,
    refusal,
    requests,
    workers,
)
from tests.fakes.completion_server import CLOSES, Asked, Says, completion, standing_in

LOG = " The server's own log may say why."


@pytest.mark.parametrize(
    ("bad", "cause"),
    [
        (Says(b"", 408), "408 Request Timeout"),
        (Says(b"", 409), "409 Conflict"),
        (Says(b"", 425), "425 Too Early"),
        (Says({"error": {"message": "slow\ndown"}}, 429), '429 Too Many Requests, after 3 tries: "slow down"'),
        (Says({"object": "error", "message": "boom"}, 500), '500 Internal Server Error, after 3 tries: "boom"'),
        (Says({"detail": "up soon"}, 503), '503 Service Unavailable, after 3 tries: "up soon"'),
        (Says(b"", 599), "599"),
        (Says(completion("4").body, cut=True), f"an answer that was cut, after 3 tries.{LOG}"),
        (Says(raw=chunked(b'{"choices": [')[:-7]), f"an answer that was cut, after 3 tries.{LOG}"),
        (CLOSES, f"connection closed without an answer, after 3 tries.{LOG}"),
        (Says(raw=b"SSH-2.0-x\r\n"), "an answer that is no HTTP, after 3 tries. Is this the address of a server"),
        (Says(b"<html>Hello</html>"), 'an answer that is not JSON, after 3 tries: "<html>Hello</html>". Is this'),
        (Says(b"[" * 100_000), "an answer that is not JSON"),
        (Says(b"\xff\xfe{"), "an answer that is not JSON"),
        (Says(b""), "an answer that is not JSON, after 3 tries. Is this"),
        (Says({"choices": []}), 'an answer without choices, after 3 tries: "{"choices": []}".'),
        (
            Says({"error": {"message": "overloaded", "code": 502}}),
            'an answer without choices, after 3 tries: "overload',
        ),
        (Says([1]), "an answer without choices"),
        (Says({"choices": [{"text": "4"}]}), "an answer without choices"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_tried_again(bad, cause):
    assert refusal(bad, tries=3).startswith(f"URL/chat/completions: {cause}")
    pauses = Pauses()
    with standing_in(in_turn(bad, bad, completion("4"))) as server:
        found = drawn(CompletionServer(server.url, "m", tries=3, clock=pauses.clock()), requests(1))
    assert found["p", 0].text == "4" and len(server.asked) == 3 and pauses == [2.0, 4.0]
    assert [asked.body["seed"] for asked in server.asked] == [0, 0, 0]


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 405, 413, 422])
def test_what_is_not_tried_again(status):
    message = refusal(
        in_turn(Says({"error": {"message": "no\x1b[31m\x00\u202e" + "!" * 400}}, status), completion("4"))
    )
    shown = re.search(r'at the first try: "(.*?)"\.', message)
    assert message.startswith(f"URL/chat/completions: {status} ") and message.endswith(OUTCOME)
    assert shown is not None and shown[1] == "no[31m" + "!" * 291 + "..." and len(shown[1]) == 300


def test_pauses_double_up_to_a_bound():
    pauses = Pauses()
    assert "after 9 tries" in refusal(Says(b"", 500), tries=9, clock=pauses.clock())
    assert pauses == [2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0]
    assert Clock(uniform=lambda low, high: high).pause_s(10_000, 0.0) == 60.0
    assert all(0.0 <= Clock().pause_s(3, 0.0) <= 8.0 for _ in range(100))


@pytest.mark.parametrize(
    ("asked", "pause"),
    [
        ("7", 7.0),
        ("0", 0.5),
        ("1.5", 1.5),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 30.0),
        ("Wed, 21 Oct 2015 07:28:00 -0000", 30.0),
        ("Wed, 21 Oct 2015 07:00:00 GMT", 0.5),
        ("99999999", 120.0),
        ("9" * 500, 120.0),
        ("Wed, 21 Oct 2065 07:28:00 GMT", 120.0),
        ("soon", 0.5),
        ("-5", 0.5),
        ("", 0.5),
    ],
)
def test_retry_after(asked, pause):
    pauses = Pauses()
    clock = pauses.clock(part=0.25, time=1445412480.0 - 30.0)  # half a minute before 2015-10-21 07:28 UTC
    with standing_in(in_turn(Says(b"", 429, {"Retry-After": asked}), completion("4"))) as server:
        assert drawn(CompletionServer(server.url, "m", clock=clock), requests(1))["p", 0].text == "4"
    assert pauses == [pause]


def test_a_server_that_is_late():
    release = threading.Event()

    def says(asked: Asked) -> Says:
        release.wait(WAIT_S)
        return CLOSES

    with standing_in(says) as server:
        client = CompletionServer(server.url, "m", timeout_s=0.4, tries=2, concurrency=3, clock=Pauses().clock())
        with pytest.raises(ServerError) as caught:
            drawn(client, requests(1))
        release.set()
    assert str(caught.value) == (
        f"{server.url}/chat/completions: no answer within 0.4 s, after 2 tries. Raise timeout_s (now 0.4), or lower "
        f"concurrency (now 3) or max_completion_length (now 64).{OUTCOME}"
    )


def test_a_body_that_trickles_does_not_pass_the_deadline(monkeypatch):
    """The clock of the transport stands still until a piece has come, and is behind the deadline then."""
    now = [0.0]
    monkeypatch.setattr(transport_module.time, "monotonic", lambda: now[0])
    connection = CompletionServer("http://localhost:1/v1", "m")._connection(transport_module.Sockets())
    near, far = socket.socketpair()
    connection._sock = near
    connection._http = transport_module.http.client.HTTPConnection("localhost", 1)
    connection._http.sock = near
    far.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{")
    limits: list[float] = []

    def left(deadline: float, real: Callable[[float], float] = transport_module._left) -> float:
        limits.append(real(deadline))
        now[0] += 2.0
        return limits[-1]

    monkeypatch.setattr(transport_module, "_left", left)
    fault = connection.ask("/models", None, 5.0)
    far.close()
    assert limits == [5.0, 3.0, 1.0] and fault == transport_module.Fault("no answer within 5 s", late=True)


def test_nobody_listens():
    with socket.socket() as taken:  # bound, but it does not listen: nobody else gets the port
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        client = CompletionServer(url, "m", clock=Pauses().clock())
        with pytest.raises(ServerError) as caught:
            drawn(client, requests(3))
        with pytest.raises(ServerError, match=r"/models: connection refused, after 3 tries\. Is the server running"):
            client.check()
    assert str(caught.value).startswith(
        f"{url}/chat/completions: connection refused, after 6 tries. Is the server running, and is this its address? "
    )


def test_a_name_that_is_not_known(monkeypatch):
    def unknown(*args: Any, **kwargs: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(ServerError, match=r"https://nowhere\.invalid/v1/models: host not found, at the first try"):
        CompletionServer("https://nowhere.invalid/v1", "m").check()


def test_a_connection_that_was_idle_for_too_long_is_no_failure():
    """The server says that it keeps the connection, and closes it after the answer."""

    def says(asked: Asked) -> Says:
        body = json.dumps(completion("4").body).encode()
        return Says(raw=f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)

    pauses = Pauses()
    with standing_in(says) as server:
        client = CompletionServer(server.url, "m", tries=1, concurrency=1, clock=pauses.clock())
        server_closed = [1, 2, 3]
        found = []
        client.draw(
            requests(3),
            SAMPLING,
            lambda request, one: (found.append(one.text), server.wait_closed(server_closed.pop(0))),
        )
    assert found == ["4"] * 3 and server.opened == 3 and pauses == []


LOWER = "Lower max_completion_length."


def test_an_answer_that_is_too_large(monkeypatch):
    assert transport_module.MAX_BYTES == 64 * 2**20
    said = (
        f"URL/chat/completions: an answer of more than 64 MiB, at the first try. Lower max_completion_length.{OUTCOME}"
    )
    assert refusal(Says(b"{}", headers={"Content-Length": str(2**26 + 1)})) == said
    monkeypatch.setattr(transport_module, "MAX_BYTES", 2**20)
    said = said.replace("64", "1")
    assert refusal(Says(raw=b"HTTP/1.1 200 OK\r\n\r\n" + b" " * (2**20 + 1))) == said
    assert refusal(Says(raw=chunked(b" " * 2**20, b" "))) == said


@pytest.mark.parametrize(
    ("said", "advice"),
    [
        (
            "Unrecognized request argument supplied: top_k",
            "It names top_k: leave that out. Sent beyond OpenAI's own parameters: top_k, chat_template_kwargs.",
        ),
        ("seed is not supported", "It names seed: leave that out. Sent beyond OpenAI's own parameters: top_k, chat_te"),
        (
            "Extra inputs are not permitted",
            "Sent beyond OpenAI's own parameters: top_k, chat_template_kwargs; leave out",
        ),
        ("maximum context length is 4096 tokens; max_tokens is too large", "0 of 1"),
    ],
)
@pytest.mark.parametrize("status", [400, 422])
def test_parameters_that_a_server_does_not_know(said, advice, status):
    sampling = ServerSampling(1.0, 1.0, 20, 8, extra={"chat_template_kwargs": {}})
    message = refusal(Says({"error": {"message": said}}, status), sampling)
    assert f'"{said}". {advice}' in message


def test_nothing_was_sent_beyond_the_protocol():
    assert f'"unknown". {OUTCOME.strip()}' in refusal(Says(b"unknown", 400))


def test_a_line_each_ten_seconds_while_requests_wait():
    lines: list[str] = []
    now = [100.0]
    notices = Notices(lines.append, Clock(monotonic=lambda: now[0]))
    for moment, count in ((100.0, 1), (100.0, 2), (109.9, 3), (110.0, 4), (119.9, 5), (130.0, 1)):
        now[0] = moment
        notices.waiting(count, "429 Too Many Requests")
    assert lines == [
        f"server: {who} after 429 Too Many Requests"
        for who in ("1 request waits", "4 requests wait", "1 request waits")
    ]
    Notices(None, Clock()).waiting(1, "nothing")


def test_requests_that_wait_are_counted():
    """Three wait until all three are told of; the clock passes ten seconds between two looks."""
    lines: list[str] = []
    seconds = iter(range(0, 1000, 11))
    told = threading.Event()

    def report(line: str) -> None:
        assert threading.current_thread() is threading.main_thread()
        lines.append(line)
        if len(lines) == 3:
            told.set()

    def says(asked: Asked) -> Says:
        return echo(asked) if told.is_set() else Says(b"", 429)

    clock = Clock(wait=lambda event, pause: told.wait(WAIT_S), monotonic=lambda: float(next(seconds)))
    with standing_in(says) as server:
        found = drawn(CompletionServer(server.url, "m", concurrency=3, report=report, clock=clock), requests(6))
    assert len(found) == 6 and not workers()
    assert lines == [
        f"server: {n} after 429 Too Many Requests" for n in ("1 request waits", "2 requests wait", "3 requests wait")
    ]


def test_requests_that_go_on_wait_no_more():
    lines: list[str] = []
    seconds = iter(range(0, 1000, 11))
    clock = Clock(wait=lambda event, pause: None, monotonic=lambda: float(next(seconds)))
    with standing_in(lambda asked: echo(asked) if asked.number % 2 else Says(b"", 429)) as server:
        drawn(CompletionServer(server.url, "m", concurrency=1, report=lines.append, clock=clock), requests(2))
    assert lines == ["server: 1 request waits after 429 Too Many Requests"] * 2


def test_what_fails_for_good_lets_others_try_again():
    """The second request is told to wait until the worker of the first one has failed and ended."""
    together = threading.Barrier(2)

    def says(asked: Asked) -> Says:
        if asked.number < 2:
            together.wait(WAIT_S)
            return Says(b"", 400 if content(asked) == 0 else 500)
        return echo(asked)

    with standing_in(says) as server:
        clock = Clock(wait=lambda event, pause: server.wait_closed(1))
        client = CompletionServer(server.url, "m", concurrency=2, clock=clock)
        found: list[Any] = []
        with pytest.raises(ServerError, match=r"400 Bad Request.* 1 of 5 completions were drawn"):
            client.draw(requests(5), SAMPLING, lambda request, one: found.append(request.key))
    assert found == [("p", 1)] and len(server.asked) == 3
