"""What a forked child does to be as good as a fresh interpreter with its own command line (see warm.py)."""

from __future__ import annotations

import atexit
import concurrent.futures.thread
import contextlib
import io
import logging
import multiprocessing.resource_tracker
import multiprocessing.util
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
import types
import warnings
import weakref
from pathlib import Path
from typing import Any, NoReturn

from tests.helpers.warm import read_start

_PATH = [folder for folder in sys.path[1:] if folder not in os.environ.get("PYTHONPATH", "").split(os.pathsep)]
_SERVER = os.getpid()
_filters: list[Any] = []


def remember_filters() -> None:
    """What libraries did to the filters of warnings when they were imported."""
    _filters[:] = warnings.filters


def become(
    *, arguments: list[str], environment: dict[str, str], directory: str, new_session: bool, outputs: list[int]
) -> NoReturn:
    """Runs `python ARGUMENTS` in this process, with its three files, and ends it."""
    if arguments[0] == "-u":
        arguments, environment = arguments[1:], {**environment, "PYTHONUNBUFFERED": "1"}
    _take_place(environment, directory, new_session, outputs)
    subprocess.Popen._execute_child = _fork_or_execute  # type: ignore[attr-defined]
    code = 1
    try:
        code = _exit_code(arguments)
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        if code < 0:
            signal.signal(-code, signal.SIG_DFL)
            os.kill(os.getpid(), -code)
        os._exit(code)


def _take_place(environment: dict[str, str], directory: str, new_session: bool, outputs: list[int]) -> None:
    """Files, session, directory, environment, signals, threads and seeds."""
    kept = [os.dup(output) if output <= 2 else output for output in outputs]
    for number, output in enumerate(kept):
        os.dup2(output, number)
    os.closerange(3, 4096)
    if new_session:
        os.setsid()
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # TMPDIR says it anew
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _open_streams(unbuffered=bool(environment.get("PYTHONUNBUFFERED")))
    warnings.filters[:] = _filters  # type: ignore[index]
    warnings._processoptions(list(filter(None, environment.get("PYTHONWARNINGS", "").split(","))))  # type: ignore
    rank = f" r{environment['RANK']}" if "RANK" in environment else ""
    Path("/proc/self/comm").write_text(f"warm {_SERVER}{rank}")  # the only name that a process can change: 15 letters
    tracker = multiprocessing.resource_tracker._resource_tracker  # type: ignore[attr-defined]
    tracker._fd = tracker._pid = None  # the parent's
    _threads_and_seeds(environment)


def _open_streams(*, unbuffered: bool) -> None:
    """The three files as an interpreter opens them."""
    size = 0 if unbuffered else -1
    raw = [open(0, "rb", closefd=False), *(open(number, "wb", size, closefd=False) for number in (1, 2))]  # noqa: SIM115
    shown = os.isatty(1)
    out = io.TextIOWrapper(raw[1], encoding="utf-8", line_buffering=shown, write_through=unbuffered)
    err = io.TextIOWrapper(raw[2], encoding="utf-8", errors="backslashreplace", line_buffering=True)
    sys.stdin = sys.__stdin__ = io.TextIOWrapper(raw[0])  # type: ignore[misc]
    sys.stdout = sys.__stdout__ = out  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = err  # type: ignore[misc]


def _threads_and_seeds(environment: dict[str, str]) -> None:
    """As at the start of a process; `random` seeds itself after a fork."""
    import numpy as np
    import torch

    given = environment.get("OMP_NUM_THREADS", "")
    torch.set_num_threads(int(given) if given.isdecimal() else len(os.sched_getaffinity(0)))
    np.random.seed()


def _exit_code(arguments: list[str]) -> int:
    """Runs the program; negative where a signal is to end the process."""
    try:
        try:
            _run(arguments)
            code = 0
        except SystemExit as end:
            code = _code_of(end)
        except KeyboardInterrupt:
            traceback.print_exc()
            code = -signal.SIGINT
        except BaseException:
            traceback.print_exc()
            code = 1
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        return code
    except SystemExit as end:
        return _code_of(end)


def _code_of(end: SystemExit) -> int:
    if end.code is None:
        return 0
    if isinstance(end.code, int):
        return end.code & 0xFF
    print(end.code, file=sys.stderr)
    return 1


def _run(arguments: list[str]) -> None:
    given = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    kind, first = arguments[0], "" if arguments[0] == "-c" else str(Path.cwd())
    if kind not in ("-m", "-c"):
        first = str(Path(kind).resolve().parent)
    sys.path[:] = [first, *given, *(path for path in _PATH if path not in given)]
    for folder in given:  # what an interpreter imports at its start
        if (Path(folder) / "sitecustomize.py").is_file():
            runpy.run_path(str(Path(folder) / "sitecustomize.py"))
            break
    if kind == "-m":
        sys.argv[:] = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv[:] = ["-c", *arguments[2:]]
        _run_text(arguments[1], "<string>")
    else:
        sys.argv[:] = arguments
        _run_text(Path(kind).read_text(encoding="utf-8"), kind, __file__=str(Path(kind).resolve()))


def _run_text(text: str, name: str, **attributes: str) -> None:
    """As the main module."""
    main = types.ModuleType("__main__")
    vars(main).update(attributes)
    sys.modules["__main__"] = main
    exec(compile(text, name, "exec"), vars(main))


def _forget_parent() -> None:
    """What the parent would do at its end is not this process's to do, nor are its modules of the package."""
    atexit._clear()
    atexit.register(logging.shutdown)
    weakref.finalize._registry.clear()  # type: ignore[attr-defined]
    multiprocessing.util._finalizer_registry.clear()  # type: ignore[attr-defined]
    concurrent.futures.thread._threads_queues.clear()  # pools of threads, this one's own among them
    for name in [name for name in sys.modules if name.partition(".")[0] == "renio_megatron"]:
        del sys.modules[name]


_execute_child = subprocess.Popen._execute_child  # type: ignore[attr-defined]


def _fork_or_execute(self: Any, args: Any, executable: Any, *rest: Any) -> None:
    """Of a child's own `subprocess.Popen`: its Python programs are forked in turn, others are executed."""
    start = read_start(args, rest)
    if start is None:
        _execute_child(self, args, executable, *rest)
        return
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    self.pid = os.fork()
    if self.pid == 0:
        _forget_parent()
        if start.preexec is not None:
            start.preexec()
        become(**start.request, outputs=start.outputs)
    self._child_created = True
    self._close_pipe_fds(*start.pipes)
