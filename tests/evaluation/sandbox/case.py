"""Hostile programs. Each would leave a marker if it got out: a file, a message, a dead process, a word in its output.

Names that a program may use stand in `PRELUDE`; the arena gives their values and looks for the markers.
"""

from __future__ import annotations

import dataclasses
import textwrap
from typing import Any

PRELUDE = """\
import ctypes, errno, mmap, os, resource, signal, socket, struct, sys, time
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
libc.prctl(15, COMM.encode())  # PR_SET_NAME: what is left of this program is found by it
def tries(*actions):
    for action in actions:
        try:
            action()
        except (OSError, ValueError):
            continue
        print("ESCAPED", NAME, flush=True)
def calls(number, *arguments):
    if number is not None and libc.syscall(*map(ctypes.c_long, (number, *arguments))) >= 0:
        print("ESCAPED", NAME, number, flush=True)
def write(path):
    with open(path, "w") as stream:
        stream.write("out")
def mark():
    write(os.path.join(OPEN, NAME))
ARM = os.uname().machine == "aarch64"
"""


@dataclasses.dataclass(frozen=True)
class Case:
    """A program.

    Attributes:
        control: whether it leaves a marker where it runs outside, by the same user; it is harmless then.
        limits: of the run, where they differ.
        outcome: what must hold of the outcome, as attribute: value.
        dangerous: it would hurt this machine outside: it runs last, and only where nothing else got out.
        inside: words that its output must have, so that a program that fails early does not pass.
    """

    source: str
    control: bool = True
    limits: dict[str, Any] = dataclasses.field(default_factory=dict)
    outcome: dict[str, Any] = dataclasses.field(default_factory=dict)
    dangerous: bool = False
    inside: str = "DONE"

    @property
    def text(self) -> str:
        """The program, without the indentation of the table."""
        return textwrap.dedent(self.source).strip()
