"""The errors a user can meet. Each names what was wrong, what it got and what to do about it, and whose it is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from enum import Enum
from typing import TypeVar

_Error = TypeVar("_Error", bound="RenioError")


class Scope(Enum):
    """Whose error it is, so that one fault is reported once: which rank reports it is decided in `cli/worker.py`."""

    ONE_RANK = "one rank"
    """This rank's own, as far as it knows: it reports at once."""
    ALL_RANKS = "all ranks"
    """Every rank raises the same: the first one reports."""
    FOLLOWS = "follows"
    """It is behind another rank's error, and reports only if nobody else does."""


class RenioError(Exception):
    """Base of every error raised on purpose by this package.

    Args:
        message: what was wrong, what it got, what to do.
        scope: whose error it is. It is kept where the error is sent to another process.
    """

    def __init__(self, message: str = "", *, scope: Scope = Scope.ONE_RANK) -> None:
        super().__init__(message)
        self.scope = scope

    def scoped(self: _Error, scope: Scope) -> _Error:
        """The same error, now of another scope."""
        self.scope = scope
        return self


@contextlib.contextmanager
def on_every_rank() -> Iterator[None]:
    """Errors that are raised inside are every rank's: all of them read the same files and settings."""
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
    """NaN or infinity where a number was due. Names the step, the rank and the tensor."""


class CheckpointError(RenioError, OSError):
    """A checkpoint or output directory that cannot be read or written."""


class RunStopped(Exception):
    """A run that was asked to stop and did, its state saved; no error. `step` is the last one done."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped by SIGTERM after step {step}; the same command goes on")
        self.step = step
