"""Which back ends hold on this machine: each one runs a program that tries what it must not be able to do."""

from __future__ import annotations

import shutil
import sys
import tempfile
import threading
from pathlib import Path

from renio_megatron.evaluation.sandbox.outcome import Limits, Sandbox

_PROGRAM = """
import os, socket, time
if os.fork() == 0:
    time.sleep(1000)  # to be killed at the end
def works(action):
    try:
        action()
    except OSError:
        return False
    return True
def write():
    with open({folder!r} + "/written", "w") as stream:
        stream.write("x")
escapes = {{
    "read a file that everybody may read": lambda: open({folder!r} + "/secret").close(),
    "write where everybody may write": write,
    "make an internet socket": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).close(),
    "list the caller's directory": lambda: os.listdir({folder!r}),
}}
os.write(3, ("," .join(["ran", *(name for name, action in escapes.items() if works(action))])).encode())
"""
_problems: dict[str, str | None] = {}
_lock = threading.Lock()


def problem_of(sandbox: Sandbox) -> str | None:
    """Why a back end cannot be used here; None where it can. Found once for each name, by running a program in it."""
    with _lock:
        if sandbox.name not in _problems:
            _problems[sandbox.name] = _try(sandbox)
        return _problems[sandbox.name]


def _try(sandbox: Sandbox) -> str | None:
    if sys.platform != "linux":
        return f"it needs Linux; this is {sys.platform}"
    folder = Path(tempfile.mkdtemp(prefix="renio-sandbox-probe-"))
    try:
        folder.chmod(0o777)
        (folder / "secret").write_text("x")
        (folder / "secret").chmod(0o644)
        outcome = sandbox.run(_PROGRAM.format(folder=str(folder)), limits=Limits(wall_s=60, cpu_s=60))
    except OSError as error:
        return str(error)
    finally:
        shutil.rmtree(folder)
    ran, *escapes = outcome.result.decode(errors="replace").split(",")
    if ran != "ran":
        end = outcome.stopped or f"exit code {outcome.exit_code}"
        return f"a first program did not run ({end}): {outcome.stderr.decode(errors='replace').strip()[-500:]}"
    if escapes and sandbox.name != "unsafe":
        return f"it does not hold: a program could {' and '.join(escapes)}"
    return None
