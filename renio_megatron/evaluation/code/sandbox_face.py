"""The part of a sandbox that judging needs: a stand-in, to be deleted when `evaluation/sandbox/` is here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Limits:
    """Bounds of one run: seconds, and bytes; `output_bytes` bounds each of stdout, stderr and result."""

    wall_s: float = 10.0
    cpu_s: float = 10.0
    memory_bytes: int = 4 << 30
    output_bytes: int = 1 << 20


class Outcome(Protocol):
    """What came of one run."""

    @property
    def exit_code(self) -> int | None:
        """None where it was stopped; negative: a signal."""

    @property
    def stopped(self) -> str | None:
        """The bound that stopped it: `time`, `output`, ...; None where it ended by itself."""

    @property
    def stderr(self) -> bytes:
        """The beginning of standard error."""

    @property
    def result(self) -> bytes:
        """What was written to descriptor 3."""


class Sandbox(Protocol):
    """Runs program texts in fresh interpreters."""

    @property
    def name(self) -> str:
        """Its kind."""

    def run(self, source: str, stdin: bytes = b"", limits: Any = None) -> Outcome:
        """Runs a program text."""
