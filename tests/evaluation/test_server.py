"""Completions from a server: what is sent and what comes back, many at a time, and the end of a draw."""

from __future__ import annotations

import json
import signal
import threading
from typing import Any

import pytest

from renio_megatron.errors import ConfigError
from renio_megatron.evaluation.server import CompletionServer, Drawn, ServerError, ServerRequest, ServerSampling
from tests.evaluation.server_cases import SAMPLING, WAIT_S, chunked, content, drawn, echo, requests, workers
from tests.fakes.completion_server import Asked, Says, completion, standing_in


def one(says: Says, **settings: Any) -> Drawn:
    with standing_in(lambda asked: says) as server:
        return drawn(CompletionServer(server.url, "m", **settings), requests(1))["p", 0]


def test_what_is_sent():
    messages = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2=\u00fc?"})
    sampling = ServerSampling(
        0.6, 0.95, 20, 256, stop=("\n\n",), extra={"chat_template_kwargs": {"enable_thinking": False}, "min_p": 0.1}
    )
    with standing_in(lambda asked: completion("4")) as server:
        client = CompletionServer(server.url + "/", "org/model", key="secret")
        drawn(client, [ServerRequest(0, messages, seed=5)], sampling)
        drawn(client, [ServerRequest(0, messages, seed=None)])
        drawn(
            CompletionServer(server.url, "m"),
            requests(1),
            ServerSampling(0.0, None, None, 8, extra={"max_completion_tokens": 9}),
        )
    first, second, third = server.asked
    assert first.path == "/v1/chat/completions" and first.headers["Authorization"] == "Bearer secret"
    assert first.headers["Content-Type"] == "application/json"
    assert first.headers["Host"] == f"127.0.0.1:{server.server_port}"
    assert first.body == {
        "model": "org/model",
        "messages": list(messages),
        "seed": 5,
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": 20,
        "max_tokens": 256,
        "stop": ["\n\n"],
        "chat_template_kwargs": {"enable_thinking": False},
        "min_p": 0.1,
    }
    assert second.body == {"model": "org/model", "messages": list(messages), "temperature": 0.7, "max_tokens": 64}
    assert "Authorization" not in third.headers
    assert third.body["max_completion_tokens"] == 9 and "max_tokens" not in third.body


@pytest.mark.parametrize(
    ("says", "expected"),
    [
        (completion("four"), Drawn("four", "stop", 3)),
        (completion("fo", "length", None), Drawn("fo", "length", None)),
        (completion(None, "content_filter", 0), Drawn("", "content_filter", 0)),
        (completion("4", reasoning_content="2+2"), Drawn("<think>2+2</think>4", "stop", 3)),
        (completion("4", reasoning="2+2"), Drawn("<think>2+2</think>4", "stop", 3)),
        (completion(None, reasoning_content="2+2"), Drawn("<think>2+2</think>", "stop", 3)),
        (completion(None, "length", reasoning_content="2+"), Drawn("<think>2+", "length", 3)),
        (completion("4", reasoning_content="", reasoning=None), Drawn("4", "stop", 3)),
        (
            Says(b'{"choices": [{"message": {"content": "a\\ud83d\\ude00b\\ud83d"}}]}'),
            Drawn("a\U0001f600b\ufffd", "", None),
        ),
        (Says(b'\n\n {"choices": [{"message": {"content": "a"}, "finish_reason": null}]}'), Drawn("a", "", None)),
        (
            Says(b"", headers={}, raw=b"HTTP/1.0 200 OK\r\n\r\n" + json.dumps(completion("4").body).encode()),
            Drawn("4", "stop", 3),
        ),
        (Says(raw=chunked(b'{"choices": [{"mess', b'age": {"content": "4"}}]}')), Drawn("4", "", None)),
    ],
)
def test_what_comes_back(says, expected):
    assert one(says, tries=1) == expected


def test_results_come_in_the_order_of_arrival_with_their_key():
    first_is_there = threading.Event()
    order = []

    def says(asked: Asked) -> Says:
        if content(asked) == 0:
            assert first_is_there.wait(WAIT_S)
        return echo(asked)

    def keep(request: ServerRequest, found: Drawn) -> None:
        order.append((request.key, found.text))
        first_is_there.set()

    with standing_in(says) as server:
        CompletionServer(server.url, "m", concurrency=2).draw(requests(2), SAMPLING, keep)
    assert order == [(("p", 1), "1"), (("p", 0), "0")]


def test_so_many_at_a_time_over_as_many_connections():
    together = threading.Barrier(4)

    def says(asked: Asked) -> Says:
        together.wait(WAIT_S)
        return echo(asked)

    with standing_in(says) as server:
        found = drawn(CompletionServer(server.url, "m", concurrency=4), requests(20))
        server.wait_closed()
    assert {key: one.text for key, one in found.items()} == {("p", n): f"{n}" for n in range(20)}
    assert server.most_under_way == 4 and server.opened == 4 and not workers()


def test_a_server_that_closes_each_connection():
    with standing_in(lambda asked: Says(echo(asked).body, headers={"Connection": "close"})) as server:
        assert len(drawn(CompletionServer(server.url, "m", concurrency=1, tries=1), requests(3))) == 3
        assert server.opened == 3


def test_no_more_threads_than_requests_and_none_for_nothing():
    with standing_in(echo) as server:
        client = CompletionServer(server.url, "m", concurrency=50)
        assert drawn(client, []) == {} and server.opened == 0
        assert len(drawn(client, requests(2))) == 2 and server.opened <= 2


def test_a_request_that_fails_for_good_lets_the_others_arrive():
    together = threading.Barrier(4)

    def says(asked: Asked) -> Says:
        together.wait(WAIT_S)  # the first four are under way
        if content(asked) == 2:
            return Says({"error": {"message": "too long"}}, 400)
        server.wait_closed(1)  # the worker of the one that failed has ended
        return echo(asked)

    with standing_in(says) as server:
        client = CompletionServer(server.url, "m", concurrency=4)
        found: dict[Any, Drawn] = {}
        with pytest.raises(ServerError) as caught:
            client.draw(requests(20), SAMPLING, lambda request, one: found.update({request.key: one}))
    assert sorted(found) == [("p", 0), ("p", 1), ("p", 3)] and len(server.asked) == 4 and not workers()
    assert str(caught.value) == (
        f'{server.url}/chat/completions: 400 Bad Request, at the first try: "too long". 3 of 20 completions were '
        "drawn; the same command goes on with the rest."
    )


def test_all_twenty_are_under_way_and_two_fail():
    def says(asked: Asked) -> Says:
        return Says(b"no", 403) if content(asked) in (7, 9) else echo(asked)

    together = threading.Barrier(20)
    with standing_in(lambda asked: (together.wait(WAIT_S), says(asked))[1]) as server:
        found: list[Any] = []
        with pytest.raises(
            ServerError, match=r"1 other request failed, too\. 18 of 20 completions were drawn; the same"
        ):
            CompletionServer(server.url, "m", concurrency=20).draw(
                requests(20), SAMPLING, lambda request, one: found.append(request.key)
            )
    assert sorted(found) == [("p", n) for n in range(20) if n not in (7, 9)]


def test_an_exception_of_the_caller_ends_the_draw_at_once():
    release = threading.Event()

    def says(asked: Asked) -> Says:
        if content(asked) > 0:
            release.wait(WAIT_S)
        return echo(asked)

    def full(request: ServerRequest, found: Drawn) -> None:
        with server.changed:  # the others wait for an answer
            assert server.changed.wait_for(lambda: server.under_way == 3, WAIT_S)
        raise OSError("disk full")

    with standing_in(says) as server:
        with pytest.raises(OSError, match="disk full"):
            CompletionServer(server.url, "m", concurrency=3).draw(requests(9), SAMPLING, full)
        assert not workers() and len(server.asked) == 4 and not release.is_set()
        release.set()
        server.wait_closed()


def test_an_exception_of_the_caller_ends_pauses_too():
    together = threading.Barrier(2)

    def says(asked: Asked) -> Says:
        if asked.number < 2:
            together.wait(WAIT_S)
        return Says(b"", 503, {"Retry-After": "100"}) if content(asked) else echo(asked)

    def stop(line: str) -> None:
        raise RuntimeError(line)

    with standing_in(says) as server:
        with pytest.raises(RuntimeError, match="1 request waits after 503 Service Unavailable"):
            CompletionServer(server.url, "m", report=stop).draw(requests(2), SAMPLING, lambda request, one: None)
        assert not workers()


def test_an_interrupt_ends_the_draw_at_once():
    release, main = threading.Event(), threading.get_ident()

    def says(asked: Asked) -> Says:
        if asked.number == 1:
            signal.pthread_kill(main, signal.SIGINT)
        release.wait(WAIT_S)
        return echo(asked)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with standing_in(says) as server:
            with pytest.raises(KeyboardInterrupt):
                CompletionServer(server.url, "m", concurrency=2).draw(requests(9), SAMPLING, lambda request, one: None)
            assert not workers() and not release.is_set()
            release.set()
            server.wait_closed()
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_mistake_in_a_worker_is_raised():
    with standing_in(echo) as server, pytest.raises(TypeError, match="not JSON serializable"):
        drawn(CompletionServer(server.url, "m"), [ServerRequest(0, ({"role": b"?"},), None)])  # type: ignore[dict-item]
    assert not workers()


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"stream": True, "seed": 1}, "must not hold seed, stream"),
        ({"stop_token_ids": {1}}, "must be JSON"),
        ({"min_p": float("nan")}, "must be JSON"),
    ],
)
def test_extra_parameters_that_cannot_be_sent(extra, words):
    with pytest.raises(ConfigError, match=words):
        ServerSampling(1.0, None, None, 8, extra=extra)


@pytest.mark.parametrize(
    "settings", [{"concurrency": 0}, {"tries": 0}, {"timeout_s": 0.0}, {"timeout_s": float("inf")}], ids=str
)
def test_numbers_that_make_no_sense(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        CompletionServer("http://localhost:8000/v1", "m", **settings)
