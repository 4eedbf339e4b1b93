"""Starts the ranks of a run on this machine. Imports torch only when ranks are started."""

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

# Seconds that ranks which got SIGTERM have to finish a step and write a checkpoint, unless the user says otherwise.
_SHUTDOWN_SECONDS = 3600

# Tells ranks the process id of this one.
_LAUNCHER = "RENIO_LAUNCHER_PID"

# What a rank's environment says unless the user says otherwise.
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


def quiet_environment() -> None:
    """Sets the variables and the loggers' levels that keep libraries quiet, where the user has not set them."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    if os.environ["PYTHONWARNINGS"] == "ignore":  # which this process has read already
        warnings.simplefilter("ignore")
    for name in _QUIET_LOGGERS:
        if (library := logging.getLogger(name)).level == logging.NOTSET:
            library.setLevel(logging.ERROR)
    for name in _REPEATED_LOGGERS:
        if (library := logging.getLogger(name)).level == logging.NOTSET:
            library.setLevel(logging.CRITICAL)


def become_single_rank() -> None:
    """Sets the variables of the only rank of a world of 1, where they are not set.

    Raises:
        ConfigError: the environment says that there are more ranks.
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
    """The exit code of `num_ranks` workers: 0, or that of the rank that failed first (128 + n for signal n).

    A failing rank ends the others and has printed its error itself, unless a signal ended it. Ctrl-C ends all ranks.
    SIGTERM is passed on to them and their end waited for, at most TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds (an hour).

    Args:
        arguments: the command line of `renio_megatron.cli.worker`.
        num_ranks: processes to start.

    Raises:
        ConfigError: TORCH_ELASTIC_SHUTDOWN_TIMEOUT is no number.
        KeyboardInterrupt: Ctrl-C.
    """
    seconds = _shutdown_seconds()
    quiet_environment()
    logger = logging.getLogger("torch.distributed.elastic")
    logger.addHandler(logging.NullHandler())
    logger.propagate = False  # its reports of failed ranks repeat what the rank has said

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
    """Ranks that are started inside know this process, and end with it."""
    os.environ[_LAUNCHER] = str(os.getpid())
    try:
        yield
    finally:
        del os.environ[_LAUNCHER]


@contextlib.contextmanager
def _threads_shared_by(num_ranks: int) -> Iterator[None]:
    """The ranks' OMP_NUM_THREADS, where the user has not set it; only while they are started and run.

    Whatever this process starts later shares the cores in another way, and too many threads wait for each other.
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
    """Asks the system to end this process with the one that started it, also where that is killed; on Linux only.

    Megatron's checkpoint writer starts a helper process, which would outlive a killed rank for good.

    Args:
        parent: process id of the one that started this one, where it is known: if that is gone already, this one ends
            at once. The system tells only those that ask before.
    """
    with contextlib.suppress(AttributeError, OSError):
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os._exit(128 + signal.SIGKILL)


def launcher() -> int | None:
    """Process id of the `renio` command that started this rank; None where torchrun or srun did."""
    text = os.environ.get(_LAUNCHER, "")
    return int(text) if text.isdecimal() else None


def _shutdown_seconds() -> int:
    """Seconds from SIGTERM to SIGKILL for ranks.

    Raises:
        ConfigError: TORCH_ELASTIC_SHUTDOWN_TIMEOUT is no whole number.
    """
    wanted = os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(_SHUTDOWN_SECONDS))
    if not wanted.isdecimal():
        raise ConfigError(f"TORCH_ELASTIC_SHUTDOWN_TIMEOUT must be a whole number of seconds; got {wanted!r}.")
    return int(wanted)


def _report_signal(rank: int, number: int) -> int:
    """The shell's exit code for a rank that a signal ended, which could say nothing itself; says it for the rank."""
    name = signal.Signals(number).name if number in set(signal.Signals) else "unknown"
    hint = " The system does this when memory runs out." if name == "SIGKILL" else ""
    print(f"error: rank {rank} was ended by signal {number} ({name}).{hint}", file=sys.stderr)
    return 128 + number


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
