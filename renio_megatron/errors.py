"""The errors a user can meet. Each names what was wrong, what it got and what to do about it."""


class RenioError(Exception):
    """Base of every error raised on purpose by this package."""


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
