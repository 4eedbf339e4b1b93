"""Errors shown to users. Each message names the problem, the actual value and a remedy; each has a scope."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from enum import Enum
from typing import TypeVar

_Error = TypeVar("_Error", bound="RenioError")


class Scope(Enum):
    """The ranks that an error belongs to, so that one fault is reported once; `cli/worker.py` picks the rank."""

    ONE_RANK = "one rank"
    """This rank's own, as far as it knows: it reports at once."""
    ALL_RANKS = "all ranks"
    """Every rank raises the same: the first one reports."""
    FOLLOWS = "follows"
    """A consequence of another rank's error: it is reported only if no other rank reports."""


class RenioError(Exception):
    """Base of every error raised on purpose by this package.

    Args:
        message: the problem, the actual value, and a remedy.
        scope: the ranks that the error belongs to. It is kept where the error is sent to another process.
    """

    def __init__(self, message: str = "", *, scope: Scope = Scope.ONE_RANK) -> None:
        super().__init__(message)
        self.scope = scope

    def scoped(self: _Error, scope: Scope) -> _Error:
        """Sets the error's scope, and returns the error."""
        self.scope = scope
        return self


@contextlib.contextmanager
def on_every_rank() -> Iterator[None]:
    """Gives errors raised inside the scope `ALL_RANKS`: all ranks read the same files and settings."""
    try:
        yield
    except RenioError as error:
        error.scoped(Scope.ALL_RANKS)
        raise


class ConfigError(RenioError, ValueError):
    """A setting, or a combination of settings, that cannot be run."""


class LayoutError(RenioError, ValueError):
    """Ranks, shards or groups that do not fit together."""


class DataError(RenioError, ValueError):
    """A data set, record or prompt that cannot be used. Names the file and the line where there is one."""


class NumericsError(RenioError, ArithmeticError):
    """NaN or infinity where a finite number was expected. Names the step, the rank and the tensor."""


class CheckpointError(RenioError, OSError):
    """A checkpoint or output directory that cannot be read or written."""


class RunStopped(Exception):
    """A run that stopped on request with its state saved; not an error.

    Attributes:
        step: the last completed step.
        number: the signal that requested it.
    """

    def __init__(self, step: int, number: int = signal.SIGTERM) -> None:
        by = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        after = f"after step {step}; the same command resumes it"
        super().__init__(f"stopped by {by} {after if step else 'before the first step; the same command starts it'}")
        self.step, self.number = step, number
