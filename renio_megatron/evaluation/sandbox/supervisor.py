"""The process that starts a program, watches it, and leaves nothing of it; a fresh interpreter of the caller's."""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import select
import signal
import socket
import sys
import time

from renio_megatron.evaluation.sandbox import cleanup, confined, kernel, namespaces, processes, program
from renio_megatron.evaluation.sandbox.fork_guard import ForkGuard
from renio_megatron.evaluation.sandbox.job import RESULT_FD, Job

_TICK_S = 0.05
_DISK_S = 0.2
_DISK_REST = 5  # times as long as looking took


def readable(descriptors: list[int], seconds: float) -> dict[int, bool]:
    """Those descriptors on which something has happened, after at the most so many seconds.

    The value is whether there is something to read; else the other end was closed.
    """
    waiting = select.poll()
    for descriptor in descriptors:
        waiting.register(descriptor, select.POLLIN)
    return {descriptor: bool(events & select.POLLIN) for descriptor, events in waiting.poll(seconds * 1000)}


class Running:
    """A program that runs.

    Attributes:
        ending: where process 1 of a namespace tells the program's wait status and CPU time; None: it is a child.
        pid: the program's process id, where it is a child.
        guard: what decides on its forks, or None.
    """

    def __init__(self, job: Job) -> None:
        """Starts it.

        Raises:
            OSError: it cannot be started.
        """
        self.ending: int | None = None
        self.pid = 0
        self.guard: ForkGuard | None = None
        handshake, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with handshake, theirs:  # where a step fails, whoever waits at the other end sees the end and goes
            if job.backend == "namespaces":
                self.ending = namespaces.start(job, handshake, theirs)
            else:
                self.pid, listener = confined.start(job, handshake, theirs)
                if listener is not None:
                    self.guard = ForkGuard(listener, int(job.limits["processes"]))
            if message := handshake.recv(4096):  # at exec the other end is closed
                raise OSError(message[1:].decode(errors="replace"))
        self._found: tuple[int, float] | None = None

    def ended(self) -> tuple[int, float] | None:
        """Wait status and CPU seconds of a program that has ended, else None; buries what has died."""
        with contextlib.suppress(ChildProcessError):
            while (buried := os.wait4(-1, os.WNOHANG))[0]:
                if buried[0] == self.pid:
                    self._found = buried[1], buried[2].ru_utime + buried[2].ru_stime
        if self.ending is not None and self._found is None and readable([self.ending], 0.0):
            words = os.read(self.ending, 100).split()
            self._found = (int(words[0]), float(words[1])) if words else (int(signal.SIGKILL), 0.0)
        return self._found


def watch(running: Running, job: Job, control: int, wake: int) -> tuple[str | None, tuple[int, float] | None]:
    """Waits for the program's end, or for a reason to stop it.

    Returns:
        (reason, ending): why it has to be stopped, or None; and as of `Running.ended`.
    """
    limits, start = job.limits, time.monotonic()
    waiting = [control, wake] + ([running.ending] if running.ending is not None else [])
    guard, excess = running.guard, Excess(job)
    if guard is not None:
        waiting.append(guard.listener)
    while True:
        if (ended := running.ended()) is not None:
            return None, ended
        now = time.monotonic()
        if now - start >= limits["wall_s"]:
            return "time", None
        if reason := excess.reason(now):
            return reason, None
        ready = readable(waiting, min(_TICK_S, start + limits["wall_s"] - now))
        if control in ready:  # the caller has said stop, or is no more
            return "caller", None
        if wake in ready:
            os.read(wake, 4096)
        if guard is not None and ready.get(guard.listener):
            guard.answer(time.monotonic())


class Excess:
    """Looks at what the program uses that the kernel does not limit."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._next_s = self._next_disk_s = 0.0

    def reason(self, now: float) -> str | None:
        """Why the program has to be stopped, or None; `now` is the monotonic clock's time."""
        limits = self._job.limits
        if now < self._next_s:
            return None
        self._next_s = now + _TICK_S
        if os.getppid() != self._job.parent:
            return "caller"
        if processes.memory_bytes(limits["memory_bytes"]) > limits["memory_bytes"]:
            return "memory"
        if self._job.backend == "namespaces" or now < self._next_disk_s:  # there, the file system has a size
            return None
        used = cleanup.disk_bytes(self._job.directory, program.max_files(limits))
        used += processes.deleted_bytes()
        end = time.monotonic()
        self._next_disk_s = end + max(_DISK_S, _DISK_REST * (end - now))
        return "disk" if used > limits["disk_bytes"] else None


def supervise(job: Job, control: int) -> str:
    """Runs the program.

    Returns:
        Lines for the caller: wait status, or nothing; reason of a stop, or nothing; seconds that it ran.

    Raises:
        OSError: it cannot be started.
    """
    kernel.adopt_orphans()
    wake, waker = os.pipe()
    os.set_blocking(waker, False)
    signal.set_wakeup_fd(waker)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    running = None
    try:
        running = Running(job)
        start = time.monotonic()
        reason, ended = watch(running, job, control, wake)
        seconds = time.monotonic() - start
    finally:
        if running is not None and running.guard is not None:
            running.guard.close()
        processes.kill_descendants()
        if os.path.isdir(job.directory):
            cleanup.remove_directory(job.directory)
    status, cpu = ended or ("", 0.0)
    killed = isinstance(status, int) and os.WIFSIGNALED(status) and os.WTERMSIG(status)
    if killed == signal.SIGXCPU or (killed == signal.SIGKILL and cpu >= job.limits["cpu_s"]):
        status, reason = "", "cpu"
    return f"{status}\n{reason or ''}\n{seconds}\n"


def main() -> None:
    """Runs the job whose descriptor, and those of the pipes, are the arguments; tells its end, or what went wrong."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most if most != resource.RLIM_INFINITY and most < 1024 else 1024, most))
    # Out of the way, so that the result's pipe can have its number from the start.
    described, result, control, told = (
        fcntl.fcntl(int(number), fcntl.F_DUPFD_CLOEXEC, RESULT_FD + 1) for number in sys.argv[1:]
    )
    for number in sys.argv[1:]:
        os.close(int(number))
    os.dup2(result, RESULT_FD, inheritable=False)
    os.close(result)
    with os.fdopen(described, "rb") as stream:
        job = Job.from_bytes(stream.read())
    try:
        words = supervise(job, control)
    except BaseException as error:
        words = f"!{error if isinstance(error, OSError) else repr(error)}"
    os.write(told, words.encode(errors="replace")[:4000])
