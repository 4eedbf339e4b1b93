"""What a run may use, and what became of it."""

from __future__ import annotations

import dataclasses
from typing import Protocol

from renio_megatron.errors import ConfigError, RenioError


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one run may use; at a limit a call fails inside the program, or the program is stopped.

    Attributes:
        wall_s: seconds from the program's start; then it is stopped ("time").
        cpu_s: seconds of processor time of each process, rounded up; then the kernel ends it ("cpu").
        memory_bytes: address space of each process; where all of them together use more memory, they are stopped
            ("memory").
        output_bytes: of each of stdout, stderr and the result; what comes is cut there, and the program is stopped
            ("output").
        file_bytes: size of a file.
        disk_bytes: size of the private directory, in which a file counts 4 KiB at least; it is full there, or the
            program is stopped ("disk").
        processes: processes and threads at a time.
        open_files: descriptors of each process.

    Raises:
        ConfigError: one is not above zero.
    """

    wall_s: float = 10.0
    cpu_s: float = 10.0
    memory_bytes: int = 4 << 30
    output_bytes: int = 1 << 20
    file_bytes: int = 64 << 20
    disk_bytes: int = 64 << 20
    processes: int = 64
    open_files: int = 256

    def __post_init__(self) -> None:
        """Checks the values."""
        for name, value in vars(self).items():
            if not 0 < value < float("inf"):
                raise ConfigError(f"a program's limit {name} must be above 0 and finite; got {value}")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a program.

    Attributes:
        exit_code: its exit code, or minus the number of the signal that ended it; None where it was stopped.
        stopped: the limit that it ran into: "time", "cpu", "memory", "output" or "disk"; None where it ended itself.
        stdout, stderr, result: what it wrote to descriptors 1, 2 and `RESULT_FD`, up to `Limits.output_bytes` each.
        seconds: from its start to its end, without the sandbox's own set-up.
    """

    exit_code: int | None
    stopped: str | None
    stdout: bytes
    stderr: bytes
    result: bytes
    seconds: float


class SandboxError(RenioError, OSError):
    """A sandbox that could not be set up or did not answer, though it worked when it was opened."""


class Sandbox(Protocol):
    """Where programs run that nobody has read."""

    @property
    def name(self) -> str:
        """Its name in `SANDBOXES`."""

    def run(self, source: str, stdin: bytes = b"", limits: Limits = ...) -> Outcome:
        """Runs a Python program; nothing of it is left, in memory or on disk, when this returns.

        Any number of threads and processes may call it at once.

        Raises:
            SandboxError: the program could not be started.
        """
