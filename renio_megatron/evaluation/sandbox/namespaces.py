"""The back end `namespaces`: a root directory, processes, network and users of the program's own."""

from __future__ import annotations

import contextlib
import os
import signal
import socket

from renio_megatron.evaluation.sandbox import kernel, program, seccomp
from renio_megatron.evaluation.sandbox.job import RESULT_FD, Job

_OLD_ROOT = "/.old"
_WRITABLE = (b"/tmp", b"/dev/shm")
_DEVICES = ("null", "zero", "random", "urandom")
_RESTRICTED = kernel.MS_NOSUID | kernel.MS_NODEV
_OPTIONS = {"ro": kernel.MS_RDONLY, "nosuid": kernel.MS_NOSUID, "nodev": kernel.MS_NODEV, "noexec": kernel.MS_NOEXEC}


def start(job: Job, handshake: socket.socket, theirs: socket.socket) -> int:
    """Starts the program, and returns the descriptor on which its end is told.

    Three processes: one that makes a user namespace and ends, the first one of the new process namespace, whose death
    is the death of all in it, and the program.

    Raises:
        OSError: a step failed; the message names it.
    """
    uid = program.unprivileged_uid()
    ending, ended = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            handshake.close()
            os.close(ending)
            _outside(job, uid, ended, theirs)
        except BaseException as error:
            program.report_failure(theirs, error)
        os._exit(1)
    theirs.close()
    os.close(ended)
    _expect(handshake, b"unshared")
    inside_and_outside = f"{program.NOBODY} {os.geteuid()} 1", f"{program.NOBODY} {os.getegid()} 1"
    if uid is not None:
        inside_and_outside = (f"0 0 1\n{program.NOBODY} {uid} 1",) * 2
    else:
        _write(f"/proc/{pid}/setgroups", "deny")
    _write(f"/proc/{pid}/uid_map", inside_and_outside[0])
    _write(f"/proc/{pid}/gid_map", inside_and_outside[1])
    handshake.send(b"mapped")
    _expect(handshake, b"forked")
    os.waitpid(pid, 0)  # so that this process is the parent of the first one of the namespace
    handshake.send(b"adopted")
    _expect(handshake, b"bound")
    handshake.send(b"go")
    return ending


def _expect(handshake: socket.socket, word: bytes) -> None:
    """Waits for the other side's word.

    Raises:
        OSError: it says something else, which is an error's message, or has died.
    """
    try:
        message = handshake.recv(4096)
    except ConnectionResetError:
        message = b""
    if message != word:
        raise OSError(message[1:].decode(errors="replace") or "the process that makes the namespaces died")


def _write(path: str, text: str) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY)
        try:
            os.write(descriptor, text.encode())  # these files take one write
        finally:
            os.close(descriptor)
    except OSError as error:
        raise OSError(error.errno, f"writing {text!r} to {path}: {error.strerror}") from error


def _outside(job: Job, uid: int | None, ended: int, handshake: socket.socket) -> None:
    """Makes the namespaces, and the first process of the process namespace."""
    program.forget_the_caller()
    if uid is not None:
        os.setgroups([])
    kernel.call("unshare", kernel.CLONE_NEWUSER, what="unshare(CLONE_NEWUSER)")
    handshake.send(b"unshared")
    _expect(handshake, b"mapped")
    kinds = kernel.CLONE_NEWNS | kernel.CLONE_NEWPID | kernel.CLONE_NEWNET | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS
    kernel.call("unshare", kinds | kernel.CLONE_NEWCGROUP, what="unshare of mounts, processes, network and IPC")
    if os.fork() == 0:
        try:
            _first(job, uid, ended, handshake)
        except BaseException as error:
            program.report_failure(handshake, error)
        os._exit(1)
    handshake.send(b"forked")
    os._exit(0)


def _first(job: Job, uid: int | None, ended: int, handshake: socket.socket) -> None:
    """Process 1 of the namespace: sets the new root up, starts the program, buries the dead, tells the end."""
    _expect(handshake, b"adopted")
    kernel.die_with_parent(signal.SIGKILL)
    handshake.send(b"bound")
    _expect(handshake, b"go")  # the supervisor was there after the call: this process cannot outlive it
    kernel.call("sethostname", b"sandbox", 7, what="sethostname")
    _make_root(job)
    pid = os.fork()
    if pid == 0:
        try:
            _become_program(job, uid, handshake)
        except BaseException as error:
            program.report_failure(handshake, error)
        os._exit(1)
    handshake.close()
    for descriptor in (0, 1, 2, RESULT_FD):
        os.close(descriptor)
    while True:
        dead, status, usage = os.wait4(-1, 0)
        if dead == pid:
            os.write(ended, f"{status} {usage.ru_utime + usage.ru_stime}".encode())
            os._exit(0)  # with it dies all that the program has left


def _become_program(job: Job, uid: int | None, handshake: socket.socket) -> None:
    os.setsid()
    kernel.limit_capabilities()
    # The limit counts within this user namespace; where the uid is the caller's, process 1 and its maker count as well.
    program.set_limits(job.limits, int(job.limits["processes"]) + (2 if uid is None else 0))
    if uid is not None:
        program.take_uid(program.NOBODY)
    kernel.drop_capabilities()
    kernel.forbid_new_privileges()
    kernel.die_with_parent(signal.SIGKILL)
    os.chdir("/tmp")
    program.keep_descriptors([handshake.fileno()])
    seccomp.install(seccomp.rules())
    program.execute(job, "/tmp")


def _make_root(job: Job) -> None:
    """Changes to a root directory that holds what the interpreter needs, read-only, and an empty /tmp."""
    kernel.mount(None, "/", flags=kernel.MS_REC | kernel.MS_PRIVATE)
    kernel.mount("tmpfs", "/tmp", "tmpfs", _RESTRICTED, "mode=755,size=1m")
    os.chdir("/tmp")
    os.mkdir(_OLD_ROOT[1:], 0o700)
    number = seccomp.number_of("pivot_root")
    kernel.call("syscall", number, b".", os.fsencode(_OLD_ROOT[1:]), what="pivot_root")
    os.chdir("/")
    _make_scratch(int(job.limits["disk_bytes"]), program.max_files(job.limits))
    for name in _DEVICES:
        _bind(f"/dev/{name}", f"/dev/{name}")
    for name, target in (("fd", "fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")):
        os.symlink(f"/proc/self/{target}", f"/dev/{name}")
    for source, target in job.binds:
        _bind(source, target)
    _forbid_writing()
    _mount_proc()
    program.write_source(job, "/tmp")
    kernel.call("umount2", os.fsencode(_OLD_ROOT), kernel.MNT_DETACH, what="leaving the old root")
    os.rmdir(_OLD_ROOT)
    kernel.mount(None, "/", flags=kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY | _RESTRICTED)


def _make_scratch(disk_bytes: int, max_files: int) -> None:
    """/tmp and /dev/shm, which share one file system and its size."""
    os.mkdir("/.scratch")
    options = f"mode=755,size={disk_bytes},nr_inodes={max_files}"
    kernel.mount("tmpfs", "/.scratch", "tmpfs", _RESTRICTED | kernel.MS_NOEXEC, options)
    for name, target in (("tmp", "/tmp"), ("shm", "/dev/shm")):
        os.makedirs(target)
        os.mkdir(f"/.scratch/{name}")
        os.chmod(f"/.scratch/{name}", 0o1777)
        kernel.mount(f"/.scratch/{name}", target, flags=kernel.MS_BIND)
    kernel.call("umount2", b"/.scratch", kernel.MNT_DETACH, what="unmounting /.scratch")
    os.rmdir("/.scratch")


def _bind(source: str, target: str) -> None:
    """Shows a file or directory of the old root, and whatever is mounted below it; a link is made anew."""
    source = _OLD_ROOT + source
    if os.path.islink(source):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.symlink(os.readlink(source), target)
        return
    if os.path.exists(target) and os.path.samefile(source, target):
        return  # it came with a directory around it
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o600))
    kernel.mount(source, target, flags=kernel.MS_BIND | kernel.MS_REC)


def _forbid_writing() -> None:
    """Makes everything that was bound read-only, mount by mount: one flag for a tree of them is new in Linux 5.12.

    Options that a mount has already stay; the kernel does not let them go in a namespace of less privilege.
    """
    with open(f"{_OLD_ROOT}/proc/self/mountinfo", "rb") as stream:
        lines = [line.split() for line in stream]
    for line in lines:
        point = line[4].decode("unicode_escape").encode("latin-1")
        if point in (b"/", *_WRITABLE) or point.startswith(_OLD_ROOT.encode()):
            continue
        flags = kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY | kernel.MS_NOSUID
        flags |= kernel.MS_NOEXEC if point.startswith(b"/dev/") else kernel.MS_NODEV
        for option in line[5].decode().split(","):
            flags |= _OPTIONS.get(option, 0)
        with contextlib.suppress(PermissionError):  # a mount that not even this process may look into
            kernel.mount(None, os.fsdecode(point), flags=flags)


def _mount_proc() -> None:
    """/proc of the new process namespace; left out where the caller's own is covered in part, as in containers."""
    os.mkdir("/proc")
    flags = _RESTRICTED | kernel.MS_NOEXEC | kernel.MS_RDONLY
    for options in ("subset=pid", None):  # subset: Linux 5.8
        with contextlib.suppress(OSError):
            kernel.mount("proc", "/proc", "proc", flags, options)
            return
