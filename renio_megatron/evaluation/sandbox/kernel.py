"""Calls of the Linux kernel that Python 3.10 has no function for, through the C library."""

from __future__ import annotations

import ctypes
import os

_libc = ctypes.CDLL(None, use_errno=True)

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = (
    1 << bit for bit in (0, 1, 2, 3, 5, 12, 14, 18)
)
MNT_DETACH = 2
CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = (
    1 << bit for bit in (17, 25, 26, 27, 28, 29, 30)
)
_PR_SET_PDEATHSIG = 1
_PR_CAPBSET_DROP = 24
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4
_CAPABILITY_VERSION_3 = 0x20080522
_LAST_CAPABILITY = 63  # the kernel's own last one is lower: it refuses those above with EINVAL


def call(function: str, *arguments: int | bytes | ctypes.Array | None, what: str) -> int:
    """The result of a function of the C library.

    Args:
        function: its name, such as `mount`; `syscall` takes the number first.
        arguments: integers, bytes of a C string, buffers, or None for a null pointer.
        what: words for the error, such as "mounting /proc".

    Raises:
        OSError: it returned a negative number; the message begins with `what`.
    """
    values = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    result = getattr(_libc, function)(*values)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def mount(source: str | None, target: str, kind: str | None = None, flags: int = 0, options: str | None = None) -> None:
    """Mounts, binds or remounts (mount(2)).

    Raises:
        OSError: the kernel refuses.
    """
    texts = [None if text is None else os.fsencode(text) for text in (source, target, kind)]
    call("mount", *texts, flags, None if options is None else options.encode(), what=f"mounting {target}")


def die_with_parent(signal_number: int) -> None:
    """Has the kernel send this process a signal when the thread that forked it ends.

    A change of uid or of capabilities undoes it: it comes after them.
    """
    call("prctl", _PR_SET_PDEATHSIG, signal_number, 0, 0, 0, what="prctl(PR_SET_PDEATHSIG)")


def adopt_orphans() -> None:
    """Makes this process the parent of every descendant whose own parent ends (a child subreaper)."""
    call("prctl", _PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0, what="prctl(PR_SET_CHILD_SUBREAPER)")


def forbid_new_privileges() -> None:
    """Makes set-uid programs and file capabilities of no effect for this process and all that it starts."""
    call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0, what="prctl(PR_SET_NO_NEW_PRIVS)")


def limit_capabilities() -> None:
    """Empties the bounding and the ambient set, as far as this process may: no later exec brings a capability back."""
    for capability in range(_LAST_CAPABILITY + 1):
        try:
            call("prctl", _PR_CAPBSET_DROP, capability, 0, 0, 0, what="prctl(PR_CAPBSET_DROP)")
        except OSError:  # past the last one, or not privileged: then there is nothing in the sets that could be used
            break
    call("prctl", _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0, what="prctl(PR_CAP_AMBIENT)")


def drop_capabilities() -> None:
    """Gives up every capability of this process.

    Raises:
        OSError: the kernel refuses.
    """
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    call("capset", header, (ctypes.c_uint32 * 6)(), what="capset")
