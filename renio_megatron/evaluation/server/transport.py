"""One exchange at a time with a server over a connection that stays open. Failures are values, told in words."""

from __future__ import annotations

import contextlib
import errno
import http.client
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from renio_megatron.evaluation.server.address import Address, Key

CONNECT_S = 10.0
"""Seconds for opening a connection."""
MAX_BYTES = 64 * 2**20
"""Size of the largest answer that is read."""
_PIECE = 2**16
_IDLE_S = 60  # seconds of silence before the kernel asks whether the other side is there: routers forget idle lines
_CLOSED = (ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError)


class Stopped(Exception):
    """The draw was stopped: no new connection is opened."""


@dataclass(frozen=True)
class Reply:
    """What a server answered. Names of headers are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class Fault:
    """Why a request brought nothing.

    Attributes:
        cause: a few words, as in "429 Too Many Requests".
        advice: what the user can do; may be empty.
        said: the server's own words, fit to be shown; may be empty.
        retried: whether the same request may succeed later.
        wait_s: seconds that the server asked to wait.
        late: whether the time for an answer was up.
    """

    cause: str
    advice: str = ""
    said: str = ""
    retried: bool = True
    wait_s: float = 0.0
    late: bool = False


class Sockets:
    """The open sockets of one draw, so that one thread can end what others wait for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._stopped = False

    def add(self, sock: socket.socket) -> None:
        """Keeps a socket in mind; raises `Stopped`, with the socket closed, after `stop`."""
        with self._lock:
            if not self._stopped:
                self._open.add(sock)
                return
        sock.close()
        raise Stopped

    def discard(self, sock: socket.socket) -> None:
        """Forgets a socket."""
        with self._lock:
            self._open.discard(sock)

    def stop(self) -> None:
        """Ends every wait on a socket; the thread that owns it closes it."""
        with self._lock:
            self._stopped = True
            for sock in self._open:
                with contextlib.suppress(OSError):
                    # Not the method of a TLS socket, which takes away what another thread is reading with.
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)


class _TooLarge(Exception):
    """An answer above `MAX_BYTES`."""


@dataclass
class Connection:
    """A connection that is opened when needed and stays open; of one thread.

    Attributes:
        address: the server.
        key: its key.
        tls: the context for https.
        sockets: where its socket is kept in mind.
    """

    address: Address
    key: Key
    tls: ssl.SSLContext | None
    sockets: Sockets
    _sock: socket.socket | None = field(default=None, repr=False)
    _http: http.client.HTTPConnection | None = field(default=None, repr=False)

    def ask(self, path: str, body: bytes | None, timeout_s: float) -> Reply | Fault:
        """The answer to a GET, or with a body to a POST of JSON, of a path below the base URL.

        Args:
            timeout_s: seconds for everything from the connection to the answer's last byte.
        Raises:
            Stopped: the sockets were stopped, and the connection was not open.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            was_open = self._sock is not None
            heard = False
            try:
                response = self._response(path, body, deadline)
                heard = True
                reply = Reply(
                    response.status,
                    {name.lower(): value for name, value in response.getheaders()},
                    self._body(response, deadline),
                )
                if response.will_close:
                    self.close()
                return reply
            except _TooLarge:
                self.close()
                return Fault(
                    f"an answer of more than {MAX_BYTES // 2**20} MiB", "Lower max_completion_length.", retried=False
                )
            except (OSError, http.client.HTTPException) as error:
                self.close()
                # A server closes lines that were idle for long: that is no failure of this request.
                if not (was_open and not heard and isinstance(error, _CLOSED)):
                    return _fault_of(error, timeout_s, self.address.scheme)

    def close(self) -> None:
        """Closes the connection; the next question opens another one."""
        if self._http is not None:
            self._http.close()
        if self._sock is not None:
            self._sock.close()
            self.sockets.discard(self._sock)
        self._sock = self._http = None

    def _response(self, path: str, body: bytes | None, deadline: float) -> http.client.HTTPResponse:
        if self._http is None:
            self._open(deadline)
        assert self._http is not None and self._sock is not None
        self._sock.settimeout(_left(deadline))
        headers = {"Accept": "application/json", "User-Agent": "renio-megatron", **self.key.headers()}
        if body is not None:
            headers["Content-Type"] = "application/json"
        # A server that does not want the body may answer, and close, before it has read it.
        with contextlib.suppress(BrokenPipeError):
            self._http.request("GET" if body is None else "POST", self.address.path + path, body, headers)
        self._sock.settimeout(_left(deadline))
        return self._http.getresponse()

    def _open(self, deadline: float) -> None:
        with _connecting():
            sock = _connected(self.address, min(CONNECT_S, _left(deadline)), self.sockets)
            self._sock = sock
            if self.tls is None:
                self._http = http.client.HTTPConnection(self.address.host, self.address.port)
            else:
                self._http = http.client.HTTPSConnection(self.address.host, self.address.port, context=self.tls)
                # The handshake is for later: until then, nothing waits on a socket that is not kept in mind.
                self._sock = self.tls.wrap_socket(
                    sock, server_hostname=self.address.host, do_handshake_on_connect=False
                )
                self.sockets.discard(sock)
                self.sockets.add(self._sock)
                self._sock.do_handshake()
        self._http.sock = self._sock
        self._http.auto_open = 0  # its own sockets could not be stopped

    def _body(self, response: http.client.HTTPResponse, deadline: float) -> bytes:
        """The answer's body, in pieces, so that slow ones do not pass the deadline.

        What `read1` leaves of a length, and whether it sees that a body was cut, depends on Python's version.
        """
        assert self._sock is not None
        length = None if response.chunked else response.length
        if (length or 0) > MAX_BYTES:
            raise _TooLarge
        pieces, size = [], 0
        while length is None or size < length:
            self._sock.settimeout(_left(deadline))
            piece = response.read1(_PIECE if length is None else min(_PIECE, length - size))
            if not piece:
                break
            pieces.append(piece)
            size += len(piece)
            if size > MAX_BYTES:
                raise _TooLarge
        if length is not None and size < length:
            raise http.client.IncompleteRead(b"")
        response.close()
        return b"".join(pieces)


class _NoConnection(OSError):
    """The time for a connection was up."""


@contextlib.contextmanager
def _connecting() -> Iterator[None]:
    try:
        yield
    except TimeoutError:
        raise _NoConnection from None


def _connected(address: Address, timeout_s: float, sockets: Sockets) -> socket.socket:
    """A socket connected to the first of the host's addresses that takes it."""
    problem = OSError("the host has no address")
    for family, kind, protocol, _, place in socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM):
        sock = socket.socket(family, kind, protocol)
        sockets.add(sock)
        try:
            sock.settimeout(timeout_s)
            sock.connect(place)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if hasattr(socket, "TCP_KEEPIDLE"):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _IDLE_S)
            return sock
        except OSError as error:
            sock.close()
            sockets.discard(sock)
            problem = error
    raise problem


def _left(deadline: float) -> float:
    """Seconds until the deadline; raises `TimeoutError` behind it."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _fault_of(error: OSError | http.client.HTTPException, timeout_s: float, scheme: str) -> Fault:
    """What an exception means. Its own words are left out where they may repeat the server's."""
    running = "Is the server running, and is this its address?"
    if isinstance(error, ssl.SSLCertVerificationError):
        trust = "The environment variable SSL_CERT_FILE may name a file of certificates to trust."
        return Fault(f"its certificate is refused ({error.verify_message})", trust, retried=False)
    if isinstance(error, ssl.SSLError) and error.reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNKNOWN_PROTOCOL"):
        return Fault("no TLS", "The server may speak http:// rather than https://.", retried=False)
    if isinstance(error, socket.gaierror):
        return Fault("host not found", "Is its name right?", retried=error.errno == socket.EAI_AGAIN)
    if isinstance(error, _NoConnection):
        return Fault("no connection", running)
    if isinstance(error, TimeoutError) and error.errno != errno.ETIMEDOUT:
        return Fault(f"no answer within {timeout_s:g} s", late=True)
    if isinstance(error, ConnectionRefusedError):
        return Fault("connection refused", running)
    if isinstance(error, http.client.RemoteDisconnected):
        return Fault("connection closed without an answer", "The server's own log may say why.")
    if isinstance(error, http.client.IncompleteRead):
        return Fault("an answer that was cut", "The server's own log may say why.")
    if isinstance(error, http.client.HTTPException):
        return Fault("an answer that is no HTTP", f"Is this the address of a server that speaks {scheme}?")
    if isinstance(error, ConnectionError):
        return Fault("connection reset", "The server's own log may say why.")
    return Fault(f"connection failed ({error.strerror or type(error).__name__})", running)
