"""A limit of processes that is one program's own, whoever's uid it runs under: each fork is decided on."""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from renio_megatron.evaluation.sandbox import processes

_RECEIVE, _SEND = 0xC0502100, 0xC0182101  # SECCOMP_IOCTL_NOTIF_RECV, SECCOMP_IOCTL_NOTIF_SEND
_REQUEST_BYTES = 80
_CONTINUE = 1
_COUNT_AGAIN_S = 0.02


class ForkGuard:
    """Lets a program fork while its threads and processes are fewer than a limit.

    A decision looks at the fact of the call, not at memory that the program could change meanwhile. When the guard is
    closed, or its process dies, every further fork fails: nothing can outrun being killed.

    Attributes:
        listener: descriptor that is readable while a fork awaits an answer.
    """

    def __init__(self, listener: int, limit: int) -> None:
        self.listener = listener
        self._limit = limit
        self._tasks = 1  # at the most: those that have ended are noticed by counting again
        self._counted_at = 0.0

    def answer(self, now: float) -> None:
        """Answers one request; `now` is a clock's time in seconds."""
        request = bytearray(_REQUEST_BYTES)
        try:
            fcntl.ioctl(self.listener, _RECEIVE, request, True)
            allowed = self._allows(now)
            (identity,) = struct.unpack_from("=Q", request)
            answer = (0, _CONTINUE) if allowed else (-errno.EAGAIN, 0)
            fcntl.ioctl(self.listener, _SEND, struct.pack("=QqiI", identity, 0, *answer))
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EINTR):  # whoever asked was killed meanwhile
                raise

    def close(self) -> None:
        """Refuses every fork from here on."""
        os.close(self.listener)

    def _allows(self, now: float) -> bool:
        if self._tasks >= self._limit and now - self._counted_at > _COUNT_AGAIN_S:
            self._tasks, self._counted_at = processes.num_tasks(), now
        if self._tasks >= self._limit:
            return False
        self._tasks += 1
        return True
