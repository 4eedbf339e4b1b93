"""What a server's answers mean: a completion, the models it serves, or a fault with advice."""

from __future__ import annotations

import email.utils
import json
import re
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timezone
from http import HTTPStatus
from typing import Any

from renio_megatron.evaluation.server.address import Address, Key
from renio_megatron.evaluation.server.transport import Fault, Reply

MAX_SAID = 300
"""Characters of a server's own words that are shown."""
MAX_WAIT_S = 120.0
"""Seconds that a server may ask to wait; what is above is cut."""
OWN_PARAMETERS = frozenset(
    (
        "frequency_penalty",
        "logit_bias",
        "logprobs",
        "max_completion_tokens",
        "max_tokens",
        "messages",
        "metadata",
        "modalities",
        "model",
        "n",
        "parallel_tool_calls",
        "presence_penalty",
        "reasoning_effort",
        "response_format",
        "seed",
        "service_tier",
        "stop",
        "store",
        "stream",
        "temperature",
        "tool_choice",
        "tools",
        "top_logprobs",
        "top_p",
        "user",
        "verbosity",
    )
)
"""Parameters that OpenAI's own chat completions have."""
_NEEDED = frozenset(("model", "messages", "max_tokens", "max_completion_tokens", "temperature"))
_UNKNOWN = re.compile(
    r"un(?:known|recogni[sz]ed|supported|expected)|(?:not|n't) (?:supported?|permitted|allowed|recogni[sz]ed|valid)"
    r"|extra (?:inputs?|fields?|parameters?)|extra_forbidden",
    re.IGNORECASE,
)
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Drawn:
    """A completion.

    Attributes:
        text: what the student wrote. A thought that the server keeps apart stands first, in `<think>` marks; the
            closing one is missing where the thought was cut.
        finish_reason: the server's word: `stop`, `length`, `content_filter`, ...; empty where it says none.
        tokens: number of its tokens; None where the server does not say.
    """

    text: str
    finish_reason: str
    tokens: int | None


def shown(text: str, key: Key) -> str:
    """A server's words on one line: no control characters, the key masked, at most `MAX_SAID` characters."""
    begin = key.masked(text)[: 16 * MAX_SAID]  # all of a large answer would take seconds
    line = key.masked("".join(letter for letter in " ".join(begin.split()) if letter.isprintable()))
    return line if len(line) <= MAX_SAID else line[: MAX_SAID - 3] + "..."


def parsed(body: bytes) -> Any:
    """The value of a body of JSON.

    Raises:
        ValueError: it is none.
    """
    try:
        return json.loads(body)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def said_by(body: bytes, key: Key) -> str:
    """An error's message where servers put it, else the body; fit to be shown."""
    try:
        found = parsed(body)
    except ValueError:
        found = None
    for name in ("error", "message", "detail"):
        while isinstance(found, dict) and found.get(name):
            found = found[name]
    return shown(found if isinstance(found, str) else body.decode(errors="replace"), key)


def completion_of(reply: Reply, key: Key) -> Drawn | Fault:
    """The completion in an answer with a good status."""
    try:
        answer = parsed(reply.body)
    except ValueError:
        return Fault("an answer that is not JSON", "Is this the address of its API?", said_by(reply.body, key))
    try:
        choice = answer["choices"][0]
        message, reason = choice["message"], choice.get("finish_reason")
        content = message.get("content")
        # vLLM and DeepSeek had the first name; vLLM has the second one since 0.12, as other servers do.
        thought = message.get("reasoning_content") or message.get("reasoning")
    except (LookupError, TypeError, AttributeError):
        return Fault("an answer without choices", "The server's own log may say why.", said_by(reply.body, key))
    if not isinstance(content, str | None):
        return Fault("an answer whose content is no text", said=said_by(reply.body, key), retried=False)
    text = content or ""
    if isinstance(thought, str) and thought:
        cut = reason == "length" and not text
        text = f"<think>{thought}" if cut else f"<think>{thought}</think>{text}"
    usage = answer.get("usage")
    tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return Drawn(
        _LONE_SURROGATE.sub("\ufffd", text),  # JSON may hold halves of characters, which no file takes
        reason if isinstance(reason, str) else "",
        tokens if isinstance(tokens, int) and not isinstance(tokens, bool) else None,
    )


def models_of(reply: Reply, key: Key) -> list[str] | Fault:
    """Names of the models that a server says it serves."""
    try:
        answer = parsed(reply.body)
        models = answer if isinstance(answer, list) else answer["data"]
        return [str(model["id"]) for model in models]
    except (ValueError, LookupError, TypeError):
        said = said_by(reply.body, key)
        return Fault("an answer that is no list of models", "Is this the address of its API?", said, retried=False)


def fault_of(reply: Reply, key: Key, address: Address, *, now: float, sent: Sequence[str] = ()) -> Fault | None:
    """What is wrong by an answer's status; None where it is a good one.

    Args:
        now: seconds since the epoch, for a date in Retry-After.
        sent: names of the parameters that were sent.
    """
    status = reply.status
    if 200 <= status < 300:
        return None
    cause = f"{status} {_phrase(status)}".rstrip()
    said = said_by(reply.body, key)
    if status in (408, 409, 425, 429) or status >= 500:
        return Fault(cause, said=said, wait_s=wait_of(reply.headers.get("retry-after", ""), now))
    if 300 <= status < 400:
        advice = _redirect_advice(reply.headers.get("location", ""), key, address)
    elif status in (401, 403):
        state = "which holds another one than the server wants" if key else "which is not set"
        advice = f"The key is read from the environment variable {key.variable}, {state}."
    elif status == 404:
        advice = _path_advice(address)
    elif status == 413:
        advice = "The prompt is larger than the server takes."
    elif status in (400, 422):
        advice = parameter_advice(said, sent)
    else:
        advice = ""
    return Fault(cause, advice, said, retried=False)


def _phrase(status: int) -> str:
    """The standard's words: the server's own may hold anything."""
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return ""


def _path_advice(address: Address) -> str:
    if address.path.endswith("/v1"):
        return "Is this the address of its API, and is the model still served?"
    return f"The address of an API mostly ends in /v1: try {address}/v1."


def _redirect_advice(location: str, key: Key, address: Address) -> str:
    follow = "Redirects are not followed: the prompts" + (" and the key" if key else "") + " would go there, too."
    try:
        parts = urllib.parse.urlsplit(urllib.parse.urljoin(f"{address}/", location))
        port = f":{parts.port}" if parts.port else ""
        target = f"{parts.scheme}://{parts.hostname}{port}{parts.path}"  # no credentials, no query
    except ValueError:
        return follow
    if not location:
        return follow
    base = re.sub(r"(/chat/completions|/models)?/*$", "", target)
    return f"{follow} It leads to {shown(base, key)}; give that address if you trust it."


def parameter_advice(said: str, sent: Sequence[str]) -> str:
    """What to leave out after a complaint about parameters; empty where it is about something else.

    >>> parameter_advice("Unrecognized request argument supplied: top_k", ["model", "top_k"])
    "It names top_k: leave that out. Sent beyond OpenAI's own parameters: top_k."
    """
    named = [name for name in sent if name not in _NEEDED and re.search(rf"(?<!\w){re.escape(name)}(?!\w)", said)]
    beyond = [name for name in sent if name not in OWN_PARAMETERS]
    if not named and not _UNKNOWN.search(said):
        return ""
    sentences = [f"It names {', '.join(named)}: leave that out."] if named else []
    if beyond:
        rest = "" if named else "; leave out what the server does not know"
        sentences.append(f"Sent beyond OpenAI's own parameters: {', '.join(beyond)}{rest}.")
    return " ".join(sentences)


def wait_of(retry_after: str, now: float) -> float:
    """Seconds that a header Retry-After asks for, in [0, `MAX_WAIT_S`]; 0 where it is missing or unreadable.

    >>> wait_of("7", 0.0), wait_of("1e9", 0.0), wait_of("Thu, 01 Jan 1970 00:01:40 GMT", 70.0), wait_of("99999", 0.0)
    (7.0, 0.0, 30.0, 120.0)
    """
    text = retry_after.strip()
    if re.fullmatch(r"[0-9]+(\.[0-9]*)?", text):
        seconds = float(text)
    else:
        try:
            date = email.utils.parsedate_to_datetime(text)
            seconds = (date if date.tzinfo else date.replace(tzinfo=timezone.utc)).timestamp() - now
        except (ValueError, TypeError, OverflowError, IndexError):
            return 0.0
    return min(max(seconds, 0.0), MAX_WAIT_S)
