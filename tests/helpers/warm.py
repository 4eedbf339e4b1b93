"""Starts Python programs without waiting for their imports: children of a server that has imported torch and Megatron.

`Popen` and `run` are `subprocess`'s for commands that begin with `sys.executable`: the process is forked by the server
(`warm_server.py`) in milliseconds, has the arguments, environment, directory and outputs that it is given, and is seen
and ended like any other. It differs from a fresh interpreter in three ways: libraries are imported already, it says
nothing of what their import warns about, and it ends without tearing its modules down. Whoever looks at one of these
things, or at the start itself, uses `subprocess`.

A process is named `warm SERVER`, or `warm SERVER rRANK` where it is a rank: `/proc/PID/environ` stays the server's.
`interpreter(folder)` is a program to give to scripts as their Python.
"""

from __future__ import annotations

import atexit
import functools
import os
import pickle
import socket
import struct
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
NUMBER = struct.Struct("q")


@dataclass(frozen=True)
class Start:
    """What `subprocess` was asked to start: the child's three files, and what else makes its place."""

    request: dict[str, Any]
    outputs: list[int]
    pipes: tuple[int, ...]
    preexec: Callable[[], None] | None


def read_start(args: Any, rest: Sequence[Any]) -> Start | None:
    """Of the arguments of `subprocess.Popen._execute_child`, less the second; None where that has to do it itself."""
    preexec, _close, pass_fds, cwd, env, _info, _flags, shell, *pipes_and_rest = rest
    pipes, (_, _, _, _, _, new_session, *_) = pipes_and_rest[:6], pipes_and_rest[6:]
    if shell or pass_fds or not is_warm(args):
        return None
    p2cread, _, _, c2pwrite, _, errwrite = pipes
    request = {
        "arguments": [os.fspath(argument) for argument in args[1:]],
        "environment": dict(os.environ if env is None else env),
        "directory": os.fspath(cwd) if cwd is not None else str(Path.cwd()),
        "new_session": bool(new_session),
    }
    outputs = [given if given != -1 else own for given, own in ((p2cread, 0), (c2pwrite, 1), (errwrite, 2))]
    return Start(request, outputs, tuple(pipes), preexec)


class Popen(subprocess.Popen):
    """A Python program, forked by the server.

    It is `subprocess.Popen` where there is no server (another system than Linux, or a GPU), where the command is not of
    this interpreter, and with `preexec_fn`, `pass_fds` or `shell`.
    """

    _connection: socket.socket | None = None
    _status: bytes = b""

    def _execute_child(self, args, executable, *rest):  # type: ignore[no-untyped-def]
        """Takes the place of fork and exec; its arguments are those of `subprocess`."""
        start = read_start(args, rest)
        if start is None or start.preexec is not None or (server := _server()) is None:
            super()._execute_child(args, executable, *rest)
            return
        self._connection = ask(server.address, start.request, start.outputs)
        self.pid = NUMBER.unpack(_read(self._connection, NUMBER.size))[0]
        self._child_created = True
        self._close_pipe_fds(*start.pipes)  # type: ignore[attr-defined]

    def _ended(self, wait: bool) -> bool:
        """Whether the server has said how the process ended, which is then `returncode`."""
        assert self._connection is not None
        self._connection.setblocking(wait)
        try:
            while len(self._status) < NUMBER.size:
                part = self._connection.recv(NUMBER.size - len(self._status))
                if not part:
                    raise RuntimeError("the server of warm processes is gone")
                self._status += part
        except BlockingIOError:
            return False
        self.returncode = NUMBER.unpack(self._status)[0]
        self._connection.close()
        return True

    def _internal_poll(self, *args: Any, **kwargs: Any) -> int | None:
        if self._connection is None:
            return super()._internal_poll(*args, **kwargs)  # type: ignore[misc]
        if self.returncode is None:
            self._ended(wait=False)
        return self.returncode

    def _wait(self, timeout: float | None) -> int:
        if self._connection is None:
            return super()._wait(timeout)  # type: ignore[misc]
        end = None if timeout is None else time.monotonic() + timeout
        while self.returncode is None and not self._ended(wait=end is None):
            if end is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            time.sleep(0.005)
        return self.returncode

    def __del__(self, *args: Any, **kwargs: Any) -> None:
        if self._connection is None:
            super().__del__(*args, **kwargs)


def run(command: list[str], *, timeout: float, check: bool = False, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """`subprocess.run` with captured text, of a warm process."""
    with Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(command, process.returncode, out, err)
    if check:
        done.check_returncode()
    return done


def interpreter(folder: Path) -> Path:
    """A program, in `folder`, that runs `python ARGUMENTS` as a warm process, for scripts that start one by name.

    It passes SIGTERM, SIGINT and SIGHUP on, and where it is killed the process is, too.
    """
    server = _server()
    if server is None:
        return Path(sys.executable)
    path = folder / "warm-python"
    path.write_text(
        f"#!{sys.executable} -SE\nimport sys\nsys.path.append({str(Path(__file__).parent)!r})\n"
        f"from warm_stub import main\nmain({server.address!r}, {sys.executable!r})\n"
    )
    path.chmod(0o755)
    return path


def is_program(word: str) -> bool:
    """Whether a word of Python's command line begins the program, and is no option."""
    return word in ("-m", "-c") or not word.startswith("-")


def is_warm(command: Any) -> bool:
    """Whether a command is this interpreter's, on a module, a text or a file."""
    return (
        not isinstance(command, (str, bytes, os.PathLike))
        and len(command) > 1
        and os.fspath(command[0]) == sys.executable
        and is_program(os.fspath(command[1 + (command[1] == "-u")]))
    )


def ask(address: str, request: dict[str, Any], outputs: list[int]) -> socket.socket:
    """The server's connection for one process: it says the process's id, then its exit code; closed, it kills it."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    text = pickle.dumps(request)
    socket.send_fds(connection, [NUMBER.pack(len(text))], outputs)
    connection.sendall(text)
    return connection


def _read(connection: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        part = connection.recv(size - len(found))
        if not part:
            raise RuntimeError("the server of warm processes is gone; what it wrote to stderr says why")
        found += part
    return found


def names() -> str:
    """What the names of this process's warm processes begin with."""
    server = _server()
    return f"warm {server.pid if server else 0}"


@dataclass(frozen=True)
class Server:
    """Where this process's server listens, and its process id."""

    address: str
    pid: int


@functools.cache
def _server() -> Server | None:
    """This process's server, started at the first call, which ends with it; None where there can be none."""
    import torch

    if not sys.platform.startswith("linux") or torch.cuda.is_available():  # a GPU's driver does not survive a fork
        return None
    folder = tempfile.TemporaryDirectory(prefix="renio_warm_")
    address = str(Path(folder.name) / "socket")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "RENIO_", "PYTEST_"))}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.warm_server", address],
        cwd=ROOT,
        env={**kept, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,  # its end is the server's
        stdout=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    answer = process.stdout.readline().strip()
    if answer != "ready":
        warnings.warn(f"tests start every process anew, which is slow: {answer or 'the server ended'}", stacklevel=2)
        return None
    atexit.register(_end, process, folder)
    return Server(address, process.pid)


def _end(process: subprocess.Popen[str], folder: tempfile.TemporaryDirectory[str]) -> None:
    assert process.stdin is not None
    process.stdin.close()
    process.wait()
    folder.cleanup()
