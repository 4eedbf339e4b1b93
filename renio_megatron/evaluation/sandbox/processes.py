"""The descendants of this process: who they are, what they use, and their end."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import time

_OWN_MEMORY = (b"RssAnon:", b"RssShmem:")
_PATIENCE_S = 5.0
_WALL = 0x40000000  # of wait: children of every kind, also those that were cloned without a signal at their end


def descendants() -> list[int]:
    """Process ids of this process's living descendants, parents first.

    One that is being forked may be missing.
    """
    own = os.getpid()
    found = _by_children_files(own)
    if found is None:
        found = _by_looking_at_all(own)
    return found


def kill_descendants() -> None:
    """Kills every descendant and returns when all are dead; this process must be adopting orphans.

    It ends because a descendant's descendants become children of this process as their parents die, and because forks
    are limited or refused.

    Raises:
        PermissionError: this process may not kill one of them, and it has not ended by itself in a few seconds.
    """
    patience = time.monotonic() + _PATIENCE_S
    while True:
        for pid in descendants():
            try:
                _kill(pid)
            except PermissionError:
                if time.monotonic() > patience:
                    raise
        try:
            while os.waitpid(-1, os.WNOHANG | _WALL)[0]:
                pass
        except ChildProcessError:  # no child, so no descendant either
            return
        time.sleep(0.001)


def num_tasks() -> int:
    """How many threads this process's descendants have in all."""
    total = 0
    for pid in descendants():
        with contextlib.suppress(OSError):
            total += len(os.listdir(f"/proc/{pid}/task"))
    return total


def memory_bytes(enough: float) -> int:
    """Memory that this process's descendants use in all: anonymous and shared, not pages of files.

    Memory that several of them share is counted once for each, unless the total is above `enough`: then it is counted
    by shares, which takes longer.
    """
    pids = descendants()
    total = sum(_kilobytes(pid, "status", _OWN_MEMORY) for pid in pids) << 10
    if total <= enough:
        return total
    shares = [_kilobytes(pid, "smaps_rollup", (b"Pss_Anon:", b"Pss_Shmem:")) for pid in pids]
    # Root without CAP_SYS_PTRACE, as in containers, may not read the shares of another user's process.
    return sum(share or _kilobytes(pid, "status", _OWN_MEMORY) for pid, share in zip(pids, shares, strict=True)) << 10


def deleted_bytes() -> int:
    """Bytes on disk of files that descendants hold open and that have no name any more.

    Those of processes that this one may not look into are missing: root's without CAP_SYS_PTRACE, as in containers.
    """
    given = os.fstat(0)  # the program's stdin, a file in memory
    found = {(given.st_dev, given.st_ino): 0}
    for pid in descendants():
        with contextlib.suppress(OSError):
            for number in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    file = os.stat(f"/proc/{pid}/fd/{number}")
                    if stat.S_ISREG(file.st_mode) and file.st_nlink == 0:
                        found.setdefault((file.st_dev, file.st_ino), file.st_blocks * 512)
    return sum(found.values())


def _kilobytes(pid: int, file: str, names: tuple[bytes, ...]) -> int:
    """The sum of lines of a file of /proc; 0 where the process is gone."""
    try:
        with open(f"/proc/{pid}/{file}", "rb") as stream:
            return sum(int(line.split()[1]) for line in stream if line.startswith(names))
    except OSError:
        return 0


def _kill(pid: int) -> None:
    """Kills a process that is still a descendant; its number may have gone to a stranger meanwhile."""
    descriptor = None
    with contextlib.suppress(OSError):
        descriptor = os.pidfd_open(pid)
    try:
        if not _is_descendant(pid):
            return
        if descriptor is None:  # a kernel before 5.3
            os.kill(pid, signal.SIGKILL)
        else:  # it is older than the look at the parents: not a stranger's
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
    except ProcessLookupError:
        pass
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _is_descendant(pid: int) -> bool:
    own = os.getpid()
    while pid > 1:
        pid = _parent(pid)
        if pid == own:
            return True
    return False


def _parent(pid: int) -> int:
    """The parent's process id; 0 where there is none or the process is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stream:
            return int(stream.read().rpartition(b")")[2].split()[1])
    except OSError:
        return 0


def _by_children_files(own: int) -> list[int] | None:
    """Descendants as /proc/PID/task/TID/children tells; None where the kernel was built without these files."""
    if not os.path.exists("/proc/self/task/self/../children") and not os.path.exists(
        f"/proc/{own}/task/{own}/children"
    ):
        return None
    found, ahead = [], [own]
    while ahead:
        parent = ahead.pop(0)
        with contextlib.suppress(OSError):
            for thread in os.listdir(f"/proc/{parent}/task"):
                with contextlib.suppress(OSError), open(f"/proc/{parent}/task/{thread}/children", "rb") as stream:
                    ahead += (children := [int(pid) for pid in stream.read().split()])
                    found += children
    return found


def _by_looking_at_all(own: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            children.setdefault(_parent(int(name)), []).append(int(name))
    found, ahead = [], [own]
    while ahead:
        found += (own_children := children.get(ahead.pop(0), []))
        ahead += own_children
    return found
