"""One rank of a run: `python -m renio_megatron.cli.worker KIND RECIPE [key=value ...] [--fresh]`."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from renio_megatron.errors import RenioError, RunStopped, Scope

# Seconds that a rank waits before it reports an error that another rank should report, or that may follow from another
# rank's. If that rank ends first, the launcher ends this one, and one message is printed instead of many.
_PATIENCE = 1.0

_STOPPED = (128 + signal.SIGTERM, 128 + signal.SIGINT)

# gloo's messages where a peer is gone, or has closed its connections after a timeout on a third rank.
_LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Application timeout caused pair closure")


def main(argv: Sequence[str]) -> int:
    """Runs this rank; returns 0, 143 or 130 where SIGTERM or Ctrl-C stopped the run, 2 for a `RenioError`, 1 for any
    other error.

    Errors are printed to stderr, the message about a stop to stdout.

    Args:
        argv: `train RECIPE [key=value ...] [--fresh]`, the same with `sft`, `quickstart OUTPUT_DIR [--fresh]`,
            `check RECIPE [key=value ...]`, `doctor RECIPE [key=value ...]` with an empty RECIPE where there is none,
            `compare-precision RECIPE [key=value ...] [--output=DIR]`, or `evaluate OPTIONS`, the result of
            `EvaluateOptions.as_word`.
    """
    fresh = "--fresh" in argv
    kind, target, *overrides = [text for text in argv if text != "--fresh"]
    others: dict[str, Callable[[str, str, Sequence[str], bool], int | None]] = {
        "quickstart": _run_quickstart,
        "check": _run_check,
        "doctor": _run_doctor,
        "compare-precision": _run_compare_precision,
        "evaluate": _run_evaluate,
    }
    run = others.get(kind, _run_recipe)
    return _guard(lambda: run(kind, target, overrides, fresh))


def run_rank(argv: Sequence[str]) -> NoReturn:
    """Runs `main` and ends the process; a failed rank ends at once, without waiting for communicators to close.

    Where all ranks end together, finished or stopped, libraries may clean up.
    """
    from renio_megatron.cli.launch import end_with_parent, launcher, quiet_environment

    if "TORCHELASTIC_RUN_ID" in os.environ:  # a killed launcher cannot end its ranks, which would train on
        end_with_parent(launcher())
    quiet_environment()
    show_warnings()
    code = main(argv)
    if code not in (0, *_STOPPED):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise SystemExit(code)


class _Console(logging.Handler):
    """Prints warnings to the current sys.stderr: a live progress bar replaces it and prints above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        """Prints one line, with the rank unless it is the first."""
        _say(f"{_prefix()}{record.levelname.lower()}: {record.getMessage()}")


def show_warnings() -> None:
    """Shows the package's own warnings to the user, once and in the format of its errors."""
    logger = logging.getLogger("renio_megatron")
    logger.addHandler(_Console(logging.WARNING))
    logger.propagate = False  # a library may have given the root logger a handler, too


def _run_recipe(kind: str, target: str, overrides: Sequence[str], fresh: bool) -> None:
    from renio_megatron.cli.train import run

    run(kind, target, overrides, fresh=fresh)


def _run_quickstart(kind: str, target: str, overrides: Sequence[str], fresh: bool) -> None:
    from renio_megatron.tools.quickstart import quickstart

    quickstart(Path(target), fresh=fresh)


def _run_check(kind: str, target: str, overrides: Sequence[str], fresh: bool) -> None:
    from renio_megatron.cli.train import check

    check(target, overrides)


def _run_doctor(kind: str, target: str, overrides: Sequence[str], fresh: bool) -> int:
    from renio_megatron.cli.doctor import doctor

    return doctor(target or None, overrides)


def _run_compare_precision(kind: str, target: str, overrides: Sequence[str], fresh: bool) -> int:
    from renio_megatron.tools.precision.experiment import compare_precision

    option = "--output="
    output = next((text.removeprefix(option) for text in overrides if text.startswith(option)), None)
    return compare_precision(target, [text for text in overrides if not text.startswith(option)], output)


def _run_evaluate(kind: str, target: str, overrides: Sequence[str], fresh: bool) -> None:
    from renio_megatron.cli.evaluate import evaluate_on_rank

    evaluate_on_rank(target)


def _guard(run: Callable[[], int | None]) -> int:
    """Calls `run`; turns an error into an exit code and a message on the rank whose error it is."""
    code = None
    rank, prefix = _rank(), _prefix()
    try:
        code = run()
    except RunStopped as stopped:
        if rank == 0:
            print(stopped, flush=True)
            if path := os.environ.get("RENIO_STOP_FILE"):  # for a script that requeues the run
                Path(path).touch()
        return 128 + stopped.number
    except RenioError as error:
        if (seconds := _turn(rank, error)) is not None:
            time.sleep(seconds)
        if os.environ.get("RENIO_TRACEBACK") == "1":
            _say(f"{prefix}{traceback.format_exc().rstrip()}")
        else:
            _say(f"{prefix}error: {error}")
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception as error:
        report = f"unexpected error\n{traceback.format_exc().rstrip()}"
        if _world_size() > 1:
            time.sleep(_PATIENCE * (1.0 if rank == 0 else 1.5 + 0.5 * min(rank, 20)))
        if os.environ.get("RENIO_TRACEBACK") != "1":
            report = peer_problem(error) or report
        _say(f"{'' if _is_tagged() else f'[rank {rank}] '}{report}")
        return 1
    return code or 0


def _turn(rank: int, error: RenioError) -> float | None:
    """Seconds before a rank reports its error, None for at once: the first rank to report ends the others.

    An error of all ranks is reported late, because the first rank has it, too; so is, on every rank, an error that
    follows from another rank's, because that rank reports the cause.
    """
    if rank == 0 and error.scope is not Scope.FOLLOWS:
        return None
    return _PATIENCE * (0.5 * min(rank, 20) + (0.0 if error.scope is Scope.ONE_RANK else 4.5))


def peer_problem(error: Exception) -> str | None:
    """The message about another rank that a failed collective implies; None for any other error.

    >>> peer_problem(RuntimeError("Timed out waiting 60000ms for recv operation to complete"))[:42]
    'error: waited 60 s for another rank, which'
    """
    text = str(error)
    if found := re.search(r"Timed out waiting (\d+)ms", text):
        return (
            f"error: waited {int(found[1]) / 1000:g} s for another rank, which did not answer: it hangs, was stopped, "
            "or computes for longer than parallel.distributed_timeout_minutes allows. The same "
            "command continues from the newest checkpoint. RENIO_TRACEBACK=1 shows where this rank waited."
        )
    if any(words in text for words in _LOST_PEER):
        return (
            "error: lost the connection to another rank, which has ended; see what it said. The same command continues "
            "from the newest checkpoint. RENIO_TRACEBACK=1 shows where this rank was."
        )
    return None


def _say(text: str) -> None:
    """Prints to stderr in one write, so that output of other ranks cannot split it."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _prefix() -> str:
    """Prefix with the rank, where it is not the first and the launcher does not add it to each line."""
    return f"[rank {rank}] " if (rank := _rank()) > 0 and not _is_tagged() else ""


def _is_tagged() -> bool:
    """Whether torchrun prefixes each line with the rank."""
    return "${rank}" in os.environ.get("TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE", "")


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


if __name__ == "__mp_main__":  # imported by a helper process that a library started
    from renio_megatron.cli.launch import end_with_parent

    end_with_parent()

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a rank without a traceback; the parent reports it
    run_rank(sys.argv[1:])
