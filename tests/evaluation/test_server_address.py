"""Where a server is and what it wants: `check`, URLs, keys, redirects, TLS."""

from __future__ import annotations

import logging
import shutil
import ssl
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from renio_megatron.errors import ConfigError
from renio_megatron.evaluation.server import CompletionServer, ServerError
from tests.evaluation.server_cases import (
    KEY,
    OUTCOME,
    SAMPLING,
    WAIT_S,
    Pauses,
    checked,
    content,
    drawn,
    echo,
    local_variables,
    models,
    refusal,
    requests,
    told,
    workers,
)
from tests.fakes.completion_server import Asked, Says, standing_in


def test_check_finds_the_model():
    assert checked(models("other", "m")) == checked(Says([{"id": "m"}])) == checked(models("m"), key=KEY) == ""
    assert checked(models("m"), path="") == ""


def test_check_names_the_models_that_are_served():
    listed = "BASE/v1 does not serve the model 'qwen3-8b', but: "
    assert checked(models("llama", "Qwen3-8B"), "qwen3-8b") == f"{listed}Qwen3-8B, llama. Name one of these."
    assert checked(models(), "qwen3-8b") == f"{listed}none. Name one of these."
    many = checked(models(*(f"x{n}" for n in range(12))), "qwen3-8b")
    assert many == f"{listed}{', '.join(f'x{n}' for n in range(10))} and 2 others. Name one of these."


def test_check_says_what_is_wrong_with_the_address():
    assert checked(Says(b"Not Found", 404), path="") == (
        'BASE/models: 404 Not Found, at the first try: "Not Found". The address of an API mostly ends in /v1: try '
        "BASE/v1."
    )
    assert checked(Says(b"", 404)).endswith("Is this the address of its API, and is the model still served?")
    page = checked(Says(b"<!doctype html>\n<p>Hello"))
    assert page.startswith(
        'BASE/v1/models: an answer that is no list of models, at the first try: "<!doctype html> <p>He'
    )
    for body in ({"data": None}, {"data": [1]}, "text", 5):
        assert "no list of models" in checked(Says(body))


def test_check_tries_less_often():
    assert checked(Says(b"", 503)).startswith("BASE/v1/models: 503 Service Unavailable, after 3 tries.")
    assert "at the first try" in checked(Says(b"", 503), tries=1)


@pytest.mark.parametrize("status", [401, 403])
def test_a_key_that_is_missing_or_wrong(status):
    says = Says({"error": "no"}, status)
    where = "The key is read from the environment variable"
    assert checked(says).endswith(f"{where} OPENAI_API_KEY, which is not set.")
    assert checked(says, key=" \n").endswith(f"{where} OPENAI_API_KEY, which is not set.")
    wrong = f"{where} MY_KEY, which holds another one than the server wants."
    assert checked(says, key=KEY, key_variable="MY_KEY").endswith(wrong)


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_redirects_are_not_followed(status):
    with standing_in(echo) as elsewhere:
        target = f"http://user:word@127.0.0.1:{elsewhere.server_port}/api/v1/chat/completions?token=1"
        message = refusal(Says(b"", status, {"Location": target}), key=KEY)
        assert elsewhere.asked == []
    assert message.endswith(
        "Redirects are not followed: the prompts and the key would go there, too. It leads to "
        f"http://127.0.0.1:{elsewhere.server_port}/api/v1; give that address if you trust it.{OUTCOME}"
    )
    assert "Redirects are not followed: the prompts would go there, too. 0 of 1" in refusal(Says(b"", status))
    assert "leads to BASE/api/v1; give" in checked(Says(b"", status, {"Location": "/api/v1/models"}))


@pytest.mark.parametrize(
    "says",
    [
        Says({"error": {"message": f"wrong key {KEY}, sk-0123456789%2Fabc"}}, 401),
        Says(f"<p>{KEY}".encode(), 400),
        Says({"error": {"message": "x" * 290 + KEY}}, 400),
        Says({"error": {"message": KEY[:5] + "\x00" + KEY[5:]}}, 400),
        Says(b" " * 4790 + KEY.encode(), 400),
        Says(b"", 302, {"Location": f"http://localhost/{KEY}/v1"}),
        Says(raw=f"HTTP/1.1 500 {KEY}\r\nContent-Length: 0\r\n\r\n".encode()),
        Says(raw=f"{KEY}\r\n\r\n".encode()),
        Says(raw=f"HTTP/1.1 200 OK\r\nContent-Length: 5{KEY}\r\n\r\n".encode()),
        Says({"choices": [{"message": {"content": {"key": KEY}}}]}),
        Says(f"{KEY} is no JSON".encode()),
        models(KEY, "other"),
    ],
)
def test_the_key_is_in_nothing_that_is_said(says, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("renio_megatron"), "propagate", True)
    caplog.set_level(logging.DEBUG)
    lines: list[str] = []
    with standing_in(lambda asked: says) as server:
        client = CompletionServer(server.url, "m", key=KEY, report=lines.append, clock=Pauses().clock())
        with pytest.raises(ServerError) as first:
            client.check()
        with pytest.raises(ServerError) as second:
            drawn(client, requests(1))
    for error in (first.value, second.value):
        assert KEY[:8] not in told(error) and error.__cause__ is error.__context__ is None
    assert KEY not in local_variables(second.value)
    assert server.asked[0].headers["Authorization"] == f"Bearer {KEY}"
    assert KEY not in repr(client) + repr(vars(client)) + caplog.text + "".join(lines)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://me:hush@localhost:8000/v1", "holds credentials before the host.*environment variable"),
        ("me:hush@localhost:8000/v1", "holds credentials"),
        ("http://hush@localhost/v1", "holds credentials"),
        ("http://localhost/v1?key=hush", "must end with its path"),
        ("http://localhost/v1#hush", "must end with its path"),
        ("localhost:8000/v1", r"begins with http:// or https:// and a host; got 'localhost:8000/v1'\. Give it as in"),
        ("ftp://localhost/v1", "begins with"),
        ("http:///v1", "begins with"),
        ("http://localhost:x/v1", "a host or a port that cannot be read"),
        ("http://localhost:99999/v1", "a host or a port that cannot be read"),
        ("http://a..b/v1", "a host or a port that cannot be read"),
        ("http://[::1/v1", "a host or a port that cannot be read"),
        ("http://localhost/v1 ", "printable ASCII"),
        ("http://localhost/v1\r\nX: hush", "printable ASCII"),
        ("", "printable ASCII"),
        ("http://localhost/v1/chat/completions", "is the part before /chat/completions"),
        ("http://localhost/v1/models/", "is the part before /models"),
    ],
)
def test_urls_that_are_refused(url, words):
    with pytest.raises(ConfigError, match=words) as caught:
        CompletionServer(url, "m")
    assert "hush" not in told(caught.value).replace(repr(url), "")


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://localhost:8000/v1/", "http://localhost:8000/v1"),
        ("http://localhost", "http://localhost"),
        ("https://Example.COM:443/api/v1", "https://example.com/api/v1"),
        ("http://[::1]:8000/v1", "http://[::1]:8000/v1"),
    ],
)
def test_urls_as_they_are_shown(url, base):
    assert str(CompletionServer(url, "m").address) == base


@pytest.mark.parametrize("key", ["hush hush", "hush\nX: y", "h\u00fcsh"])
def test_keys_that_no_header_can_hold(key):
    with pytest.raises(ConfigError, match="OPENAI_API_KEY") as caught:
        CompletionServer("http://localhost/v1", "m", key=key)
    assert key not in told(caught.value)


def test_https_to_a_server_that_has_none():
    with standing_in(echo) as server:
        client = CompletionServer(server.url.replace("http:", "https:"), "m", tries=1)
        with pytest.raises(ServerError, match=r"/models: no TLS, at the first try\. The server may speak http://"):
            client.check()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for 127.0.0.1, with its key, that nobody else trusts."""
    if (openssl := shutil.which("openssl")) is None:
        pytest.skip("openssl, which makes a certificate, is not here")
    folder = tmp_path_factory.mktemp("certificate")
    made = ["-keyout", "key.pem", "-out", "cert.pem", "-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = [openssl, "req", "-x509", "-nodes", "-days", "2", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    subprocess.run([*command, *made], cwd=folder, check=True, capture_output=True, timeout=60)
    return folder


def test_https(certificate, monkeypatch):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate / "cert.pem", certificate / "key.pem")
    with standing_in(echo, context) as server:
        url = server.url.replace("http:", "https:")
        with pytest.raises(
            ServerError, match=r"its certificate is refused \(self.signed certificate\), at the first try"
        ):
            CompletionServer(url, "m").check()
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate / "cert.pem"))
        server.wait_closed()
        opened = server.opened
        found = drawn(CompletionServer(url, "m", key=KEY, concurrency=2), requests(6))
        assert [found["p", n].text for n in range(6)] == ["0", "1", "2", "3", "4", "5"]
        assert server.opened - opened <= 2 and server.asked[0].headers["Authorization"] == f"Bearer {KEY}"


def test_a_draw_over_https_that_is_ended(certificate, monkeypatch):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate / "cert.pem", certificate / "key.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate / "cert.pem"))
    release = threading.Event()

    def says(asked: Asked) -> Says:
        if content(asked):
            release.wait(WAIT_S)
        return echo(asked)

    def full(request: Any, found: Any) -> None:
        with server.changed:
            assert server.changed.wait_for(lambda: server.under_way == 2, WAIT_S)
        raise OSError("disk full")

    with standing_in(says, context) as server:
        client = CompletionServer(server.url.replace("http:", "https:"), "m", concurrency=2)
        with pytest.raises(OSError, match="disk full"):
            client.draw(requests(9), SAMPLING, full)
        assert not workers() and not release.is_set()
        release.set()
        server.wait_closed()
