"""The back ends `landlock` and `unsafe`: the program is a child of the supervisor, in a directory of the run's own."""

from __future__ import annotations

import os
import signal
import socket
import struct

from renio_megatron.evaluation.sandbox import kernel, landlock, program, seccomp
from renio_megatron.evaluation.sandbox.job import Job

_FILES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")


def start(job: Job, handshake: socket.socket, theirs: socket.socket) -> tuple[int, int | None]:
    """Starts the program.

    Returns:
        Its process id, and under `landlock` a descriptor on which it and its children ask before they fork.

    Raises:
        OSError: a step failed; the message names it.
    """
    uid = program.unprivileged_uid() if job.backend == "landlock" else None
    os.mkdir(job.directory, 0o700)
    program.write_source(job, job.directory)
    if uid is not None:
        for path in (os.path.join(job.directory, program.PROGRAM_FILE), job.directory):
            os.chown(path, uid, uid)
    pid = os.fork()
    if pid == 0:
        try:
            handshake.close()
            _become_program(job, uid, theirs)
        except BaseException as error:
            program.report_failure(theirs, error)
        os._exit(1)
    theirs.close()
    if job.backend == "unsafe":
        return pid, None
    message, ancillary, _, _ = handshake.recvmsg(4096, socket.CMSG_SPACE(4))
    if not ancillary:
        raise OSError(message[1:].decode(errors="replace") or "the process that becomes the program died")
    (listener,) = struct.unpack("=i", ancillary[0][2])
    try:
        os.kill(pid, 0)
    except PermissionError:  # then the program must not begin, since nothing could end it
        os.close(listener)
        raise OSError("root may not kill processes of another user here: it lacks CAP_KILL") from None
    handshake.send(b"go")
    return pid, listener


def _become_program(job: Job, uid: int | None, handshake: socket.socket) -> None:
    os.setsid()
    program.forget_the_caller()
    if job.backend == "unsafe":
        kernel.die_with_parent(signal.SIGKILL)
        program.set_limits(job.limits, None)
        os.chdir(job.directory)
        program.keep_descriptors([handshake.fileno()])
        program.execute(job, job.directory)
    abi = min(landlock.version(), job.newest_abi)
    allowed = dict.fromkeys((source for source, _ in job.binds), landlock.READ)
    allowed |= dict.fromkeys(filter(os.path.exists, _FILES), landlock.DEVICE)
    allowed[job.directory] = landlock.EVERYTHING
    domain = landlock.confine(allowed, abi)
    handles = program.handles_of([job.home, *job.sites])
    kernel.limit_capabilities()
    # Where the uid is the run's own, the kernel counts its processes; else the supervisor does, asked at each fork.
    program.set_limits(job.limits, int(job.limits["processes"]) if uid is not None else None)
    if uid is not None:
        program.take_uid(uid)
    kernel.drop_capabilities()
    kernel.forbid_new_privileges()
    kernel.die_with_parent(signal.SIGKILL)
    os.chdir(job.directory)
    for place in [place for place in handles if os.access(place, os.R_OK | os.X_OK)]:
        os.close(handles.pop(place))
    program.keep_descriptors([handshake.fileno(), domain, *handles.values()])
    landlock.enter(domain)
    rules = seccomp.rules(notify=True, landlock_abi=abi, shared_uid=uid is None, pid=os.getpid())
    listener = seccomp.install(rules, listen=True)
    handshake.sendmsg([b"listener"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("=i", listener))])
    os.close(listener)
    if handshake.recv(16) == b"go":
        program.execute(job, job.directory, handles)
