"""The caller's side of a run: a supervisor is started, and what the program writes is collected."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import selectors
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from renio_megatron.evaluation.sandbox import cleanup, libraries
from renio_megatron.evaluation.sandbox.job import Job
from renio_megatron.evaluation.sandbox.outcome import Limits, Outcome, SandboxError

_START = """
import sys
for name, path in {packages!r}:
    module = type(sys)(name)
    module.__path__ = [path]
    sys.modules[name] = module
from {package}.supervisor import main
main()
"""
"""Without the packages' own __init__ files, which import more than a supervisor needs."""
_SETUP_S = 60.0  # for the supervisor's own work, on a machine that has much else to do
_CHUNK = 1 << 16


@dataclasses.dataclass(frozen=True)
class SupervisedSandbox:
    """A back end; see the package's own words for what each one stops.

    Attributes:
        name: its name in `SANDBOXES`.
        newest_abi: Landlock is used as kernels of this version of its interface know it, or older.
    """

    name: str
    newest_abi: int = 7

    def run(self, source: str, stdin: bytes = b"", limits: Limits = Limits()) -> Outcome:  # noqa: B008 - frozen
        """Runs a Python program; nothing of it is left, in memory or on disk, when this returns.

        Raises:
            SandboxError: the program could not be started.
        """
        private = Path(tempfile.gettempdir()) / f"renio-sandbox-{os.urandom(12).hex()}"
        try:
            executable, home = libraries.interpreter()
            job = Job(
                backend=self.name,
                source=source,
                limits=dataclasses.asdict(limits),
                parent=os.getpid(),
                directory=str(private),
                executable=str(executable),
                home=str(home),
                binds=libraries.binds(),
                sites=libraries.sites(),
                environment=libraries.environment(),
                newest_abi=self.newest_abi,
            )
            with _Run(job, stdin, limits) as run:
                return run.collect()
        except SandboxError:
            raise
        except OSError as error:
            raise SandboxError(f"a program could not be run in the sandbox {self.name!r}: {error}") from error
        finally:
            if private.is_dir():  # the supervisor was killed
                cleanup.remove_directory(str(private))


class _Run:
    """A supervisor and the pipes to it; leaving the scope ends it, and waits until all is over."""

    def __init__(self, job: Job, stdin: bytes, limits: Limits) -> None:
        self._name, self._limits = job.backend, limits
        self._open: set[int] = set()
        try:
            described, fed = self._file(job.to_bytes()), self._file(stdin)
            pairs = [self._pipe() for _ in range(5)]
            (self._stdout, stdout), (self._stderr, stderr), (self._result, result), (self._told, told) = pairs[:4]
            control, self._control = pairs[4]
            passed = (described, result, control, told)
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", *(["-B"] if sys.dont_write_bytecode else []), "-c", _start_text()]
                + [str(descriptor) for descriptor in passed],
                stdin=fed,
                stdout=stdout,
                stderr=stderr,
                pass_fds=passed,
                start_new_session=True,
                cwd="/",
                env={name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ},
            )
        except BaseException:
            self._close_all()
            raise
        self._close(fed, stdout, stderr, described, result, told)

    def __enter__(self) -> _Run:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        try:
            self._process.wait(_SETUP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        finally:
            self._close_all()

    def collect(self) -> Outcome:
        """What became of the program.

        Raises:
            SandboxError: it could not be started, or its supervisor died.
        """
        gathered = {self._stdout: bytearray(), self._stderr: bytearray(), self._result: bytearray()}
        told, cut = bytearray(), False
        deadline = time.monotonic() + self._limits.wall_s + _SETUP_S
        with selectors.DefaultSelector() as selector:
            for descriptor in (*gathered, self._told):
                os.set_blocking(descriptor, False)
                selector.register(descriptor, selectors.EVENT_READ)
            while not told and time.monotonic() < deadline and self._process.poll() is None:
                for key, _ in selector.select(1.0):
                    if key.fd == self._told:
                        told += _read(self._told) or b""
                    elif (data := _read(key.fd)) is None:
                        selector.unregister(key.fd)
                    elif self._keep(gathered[key.fd], data) and not cut:
                        cut = True
                        self._stop()
        told += _read(self._told) or b""
        for descriptor, kept in gathered.items():  # nobody writes any more
            while data := _read(descriptor):
                cut |= self._keep(kept, data)
        stdout, stderr, result = (bytes(kept) for kept in gathered.values())
        words = told.decode().split("\n")
        if not told or told.startswith(b"!"):
            problem = words[0][1:] if told else "its supervisor died " + stderr.decode(errors="replace")[-1000:]
            raise SandboxError(f"a program could not be run in the sandbox {self._name!r}: {problem}")
        stopped = "output" if cut else words[1] or None
        exit_code = None if stopped or not words[0] else os.waitstatus_to_exitcode(int(words[0]))
        return Outcome(exit_code, stopped, stdout, stderr, result, float(words[2]))

    def _stop(self) -> None:
        """Tells the supervisor to end. Closing the pipe would not do: a fork of the caller may hold its end as well.

        It cannot raise SIGPIPE, since this process keeps the reading end, too.
        """
        if self._control in self._open:
            os.write(self._control, b"x")
            self._close(self._control)

    def _keep(self, kept: bytearray, data: bytes) -> bool:
        """Appends data up to the limit; whether there was too much."""
        room = self._limits.output_bytes - len(kept)
        kept += data[:room]
        return len(data) > room

    def _file(self, content: bytes) -> int:
        """A file in memory that nobody can change any more, to be read from its start."""
        descriptor = self._own(os.memfd_create("sandbox", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
        with open(descriptor, "wb", closefd=False) as stream:
            stream.write(content)
        os.lseek(descriptor, 0, os.SEEK_SET)
        seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
        return descriptor

    def _pipe(self) -> tuple[int, int]:
        reading, writing = os.pipe()
        return self._own(reading), self._own(writing)

    def _own(self, descriptor: int) -> int:
        """A descriptor to be closed at the end, above those that a caller without a stdin may have free."""
        if descriptor <= 2:
            low, descriptor = descriptor, fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 3)
            os.close(low)
        self._open.add(descriptor)
        return descriptor

    def _close(self, *descriptors: int) -> None:
        for descriptor in set(descriptors) & self._open:
            os.close(descriptor)
            self._open.discard(descriptor)

    def _close_all(self) -> None:
        self._close(*self._open)


def _start_text() -> str:
    folder = Path(__file__).resolve().parent
    names = __package__.split(".")
    count = len(names)
    packages = [
        (".".join(names[: depth + 1]), str(folder.parents[count - depth - 2] if depth + 1 < count else folder))
        for depth in range(count)
    ]
    return _START.format(packages=packages, package=__package__)


def _read(descriptor: int) -> bytes | None:
    """What can be read without waiting: empty where nothing can, None at the end."""
    with contextlib.suppress(BlockingIOError, InterruptedError):
        return os.read(descriptor, _CHUNK) or None
    return b""
