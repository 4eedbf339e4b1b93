"""Where a server is, and the key that it wants."""

from __future__ import annotations

import re
import urllib.parse
from dataclasses import dataclass

from renio_megatron.errors import ConfigError

_ENDPOINTS = ("/chat/completions", "/completions", "/models")


@dataclass(frozen=True)
class Address:
    """A server's base URL, as in `http://localhost:8000/v1`. It holds no credentials."""

    scheme: str
    host: str
    port: int
    path: str

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port == _port_of(self.scheme) else f":{self.port}"
        return f"{self.scheme}://{host}{port}{self.path}"


def address_of(url: str) -> Address:
    """The parts of a base URL.

    Raises:
        ConfigError: no http or https URL, or one with credentials, a query or the path of an endpoint. What may be
            a secret is not repeated.

    >>> str(address_of("http://localhost:8000/v1/"))
    'http://localhost:8000/v1'
    """
    example = "Give it as in http://localhost:8000/v1."
    if not re.fullmatch(r"[!-~]+", url):
        raise ConfigError(f"a server's URL has printable ASCII characters only, and no spaces. {example}")
    if "@" in url:
        raise ConfigError(
            "the server's URL holds credentials before the host, and URLs are printed and kept in files. Leave them "
            "out; the key belongs in an environment variable."
        )
    try:
        parts = urllib.parse.urlsplit(url)
        host, port = parts.hostname, parts.port
        (host or "").encode("idna")  # as the resolver will
    except ValueError:  # its words may repeat the user's part
        raise ConfigError(f"the server's URL has a host or a port that cannot be read. {example}") from None
    if parts.query or parts.fragment:
        raise ConfigError(f"the server's URL must end with its path; got one with '?' or '#'. {example}")
    if parts.scheme not in ("http", "https") or not host:
        raise ConfigError(f"a server's URL begins with http:// or https:// and a host; got {url!r}. {example}")
    path = parts.path.rstrip("/")
    for endpoint in _ENDPOINTS:
        if path.endswith(endpoint):
            raise ConfigError(f"the server's URL is the part before {endpoint}; got {url!r}. {example}")
    return Address(parts.scheme, host, port or _port_of(parts.scheme), path)


def _port_of(scheme: str) -> int:
    return 443 if scheme == "https" else 80


class Key:
    """A server's key: it appears in one header, and nowhere else.

    Args:
        value: the key; None or blank: there is none.
        variable: the environment variable that holds it, for messages.
    """

    def __init__(self, value: str | None, variable: str) -> None:
        self._value = (value or "").strip()
        self.variable = variable
        if not re.fullmatch(r"[!-~]*", self._value):
            raise ConfigError(f"the key in {variable} must be printable ASCII characters without spaces.")

    def __repr__(self) -> str:
        return f"Key({'***' if self._value else 'none'})"

    def __bool__(self) -> bool:
        return bool(self._value)

    def headers(self) -> dict[str, str]:
        """The header that shows the key to the server."""
        return {"Authorization": f"Bearer {self._value}"} if self._value else {}

    def masked(self, text: str) -> str:
        """The text with `***` where it repeats the key."""
        if self._value:
            for form in (self._value, urllib.parse.quote(self._value, safe="")):
                text = text.replace(form, "***")
        return text
