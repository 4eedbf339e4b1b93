"""One rank of a run: `python -m renio_megatron.cli.worker KIND RECIPE [key=value ...] [--fresh]`."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from renio_megatron.errors import RenioError, RunStopped

# Seconds that a rank keeps still with an error that is not its own to tell, or may follow from another rank's. If that
# other rank ends first, whoever started the ranks ends this one, and one message is printed instead of many.
_PATIENCE = 1.0


def main(argv: Sequence[str]) -> int:
    """The exit code of this rank: 0, 143 where SIGTERM stopped the run, 2 for a `RenioError`, 1 for any other error.

    Errors are printed to stderr, the end by SIGTERM to stdout.

    Args:
        argv: `train RECIPE [key=value ...] [--fresh]`, the same with `sft`, or `quickstart OUTPUT_DIR [--fresh]`.
    """
    fresh = "--fresh" in argv
    kind, target, *overrides = [text for text in argv if text != "--fresh"]
    run = _run_quickstart if kind == "quickstart" else _run_recipe
    return _guard(lambda: run(kind, target, overrides, fresh))


def run_rank(argv: Sequence[str]) -> NoReturn:
    """Runs `main` and ends the process; a failed rank ends at once, without waiting for communicators to close."""
    from renio_megatron.cli.launch import quiet_environment

    quiet_environment()
    code = main(argv)
    if code:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise SystemExit(0)


def _run_recipe(kind: str, target: str, overrides: Sequence[str], fresh: bool) -> None:
    from renio_megatron.cli.run import run

    run(kind, target, overrides, fresh=fresh)


def _run_quickstart(kind: str, target: str, overrides: Sequence[str], fresh: bool) -> None:
    from renio_megatron.cli.run import quickstart

    quickstart(Path(target), fresh=fresh)


def _guard(run: Callable[[], None]) -> int:
    """Runs it; turns an error into a message on the rank whose error it is, and an exit code."""
    rank = _rank()
    prefix = f"[rank {rank}] " if rank > 0 else ""
    try:
        run()
    except RunStopped as stopped:
        if rank == 0:
            print(stopped, flush=True)
        return 128 + signal.SIGTERM
    except RenioError as error:
        if rank > 0 and getattr(error, "shared", False):
            time.sleep(5 * _PATIENCE)  # still here: no other rank has said it
        if os.environ.get("RENIO_TRACEBACK") == "1":
            _say(f"{prefix}{traceback.format_exc().rstrip()}")
        else:
            _say(f"{prefix}error: {error}")
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception:
        report = traceback.format_exc()
        if _world_size() > 1:
            time.sleep(_PATIENCE if rank == 0 else 2 * _PATIENCE)
        _say(f"[rank {rank}] unexpected error\n{report.rstrip()}")
        return 1
    return 0


def _say(text: str) -> None:
    """Prints to stderr in one write, which another rank's cannot split."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


if __name__ == "__mp_main__":  # imported by a helper process that a library started
    from renio_megatron.cli.launch import end_with_parent

    end_with_parent()

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a rank without a traceback; the parent says so
    run_rank(sys.argv[1:])
