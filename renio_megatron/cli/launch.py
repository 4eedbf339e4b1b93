"""Launcher of a run's ranks on this machine. Imports torch only when ranks are started."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import socket
import sys
import tempfile
import uuid
import warnings
from collections.abc import Iterator, Sequence

from renio_megatron.errors import ConfigError

# Default seconds that ranks have after SIGTERM to finish a step and write a checkpoint.
_SHUTDOWN_SECONDS = 3600

# Variable that passes this process's id to the ranks.
_LAUNCHER = "RENIO_LAUNCHER_PID"

# Defaults of a rank's environment, which the user may override.
_QUIET = {
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_OFFLINE": "1",
    "PYTHONWARNINGS": "ignore",
}

# Libraries whose warnings are for their own developers: a deprecated class, a CUDA toolkit without a GPU.
_QUIET_LOGGERS = ("megatron", "torch.utils.cpp_extension")

# Libraries that report a fault which this package names as well.
_REPEATED_LOGGERS = ("megatron.core.dist_checkpointing",)


def is_rank() -> bool:
    """Whether this process was started as a rank, by torchrun for example."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def refuse_nproc(nproc: int | None) -> None:
    """Raises `ConfigError` for a number of ranks to start where they are started already."""
    if nproc is not None:
        raise ConfigError(
            "--nproc would be ignored: RANK and WORLD_SIZE are set, so torchrun or srun has started the ranks. "
            "Leave it out."
        )


def quiet_environment() -> None:
    """Sets environment variables and logger levels that silence libraries, where the user has not set them."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    if os.environ["PYTHONWARNINGS"] == "ignore":  # this process has already read the variable
        warnings.simplefilter("ignore")
    for name in _QUIET_LOGGERS:
        if (library := logging.getLogger(name)).level == logging.NOTSET:
            library.setLevel(logging.ERROR)
    for name in _REPEATED_LOGGERS:
        if (library := logging.getLogger(name)).level == logging.NOTSET:
            library.setLevel(logging.CRITICAL)


def become_single_rank() -> None:
    """Sets the environment variables of a world of one rank, where they are not set.

    Raises:
        ConfigError: the environment describes more ranks.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError(
            f"export runs as a single rank; got WORLD_SIZE={os.environ['WORLD_SIZE']}. Start it without torchrun."
        )
    quiet_environment()
    defaults = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(probe.getsockname()[1])


def start_ranks(arguments: Sequence[str], num_ranks: int) -> int:
    """Starts `num_ranks` workers; returns 0, or the exit code of the rank that failed first (128 + n for signal n).

    A failing rank ends the others and prints its own error, unless a signal ended it. Ctrl-C ends all ranks. SIGTERM is
    forwarded to them and their end waited for, at most TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds (an hour).

    Args:
        arguments: the command line of `renio_megatron.cli.worker`.
        num_ranks: processes to start.

    Raises:
        ConfigError: TORCH_ELASTIC_SHUTDOWN_TIMEOUT is not a number.
        KeyboardInterrupt: Ctrl-C.
    """
    seconds = _shutdown_seconds()
    quiet_environment()
    logger = logging.getLogger("torch.distributed.elastic")
    logger.addHandler(logging.NullHandler())
    logger.propagate = False  # its reports of failed ranks repeat the rank's own message

    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    with tempfile.TemporaryDirectory(prefix="renio_") as logs:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=num_ranks,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=logs),
        )
        if hasattr(config, "shutdown_timeout"):  # older versions of torch always wait 30 s
            config.shutdown_timeout = seconds
        try:
            with _threads_shared_by(num_ranks), _named_to_ranks():
                elastic_launch(config, sys.executable)("-m", "renio_megatron.cli.worker", *arguments)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            return _report_signal(rank, -failure.exitcode) if failure.exitcode < 0 else failure.exitcode
        except SignalException as error:
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from error
            return 128 + int(error.sigval)
    return 0


@contextlib.contextmanager
def _named_to_ranks() -> Iterator[None]:
    """Passes this process's id to ranks started inside, so that they end with it."""
    os.environ[_LAUNCHER] = str(os.getpid())
    try:
        yield
    finally:
        del os.environ[_LAUNCHER]


@contextlib.contextmanager
def _threads_shared_by(num_ranks: int) -> Iterator[None]:
    """Sets the ranks' OMP_NUM_THREADS, where the user has not, while they are started and run.

    Processes that are started later share the cores differently, and too many threads slow each other down.
    """
    if "OMP_NUM_THREADS" in os.environ:
        yield
        return
    os.environ["OMP_NUM_THREADS"] = str(max(1, _num_cores() // num_ranks))
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]


def end_with_parent(parent: int | None = None) -> None:
    """Asks the system to end this process with its parent, even if the parent is killed; on Linux only.

    Megatron's checkpoint writer starts a helper process, which would outlive a killed rank forever.

    Args:
        parent: the parent's process id, where it is known: if the parent is already gone, this process ends at once,
            because the system signals only processes that asked before.
    """
    with contextlib.suppress(AttributeError, OSError):
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os._exit(128 + signal.SIGKILL)


def launcher() -> int | None:
    """Process id of the `renio` command that started this rank; None under torchrun or srun."""
    text = os.environ.get(_LAUNCHER, "")
    return int(text) if text.isdecimal() else None


def _shutdown_seconds() -> int:
    """Seconds from SIGTERM to SIGKILL for ranks.

    Raises:
        ConfigError: TORCH_ELASTIC_SHUTDOWN_TIMEOUT is not an integer.
    """
    wanted = os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(_SHUTDOWN_SECONDS))
    if not wanted.isdecimal():
        raise ConfigError(f"TORCH_ELASTIC_SHUTDOWN_TIMEOUT must be a whole number of seconds; got {wanted!r}.")
    return int(wanted)


def _report_signal(rank: int, number: int) -> int:
    """Prints the error of a rank that was ended by a signal, and returns the shell's exit code for it."""
    name = signal.Signals(number).name if number in set(signal.Signals) else "unknown"
    hint = " The system does this when memory runs out." if name == "SIGKILL" else ""
    print(f"error: rank {rank} was ended by signal {number} ({name}).{hint}", file=sys.stderr)
    return 128 + number


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
