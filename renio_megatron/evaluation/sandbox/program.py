"""The last steps of the process that becomes the program: limits, descriptors, environment, exec."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket

from renio_megatron.evaluation.sandbox.job import RESULT_FD, Job

PROGRAM_FILE = "program.py"
NOBODY = 65534
_UNUSED_UIDS = 1_879_048_192  # systemd's table of uids gives those from here to 2^31 to nobody
_FILE_BYTES = 4096
_STACK_BYTES = 8 << 20
_FIRST_HANDLE = 200  # descriptors above those that a program would close or use

_RUNNER = """
def _run():
    import site, sys
    sys.path[:] = [{directory!r}, *sys.path[1:], *{sites!r}]
    sys.argv[:] = [{file!r}]
    site.setquit(), site.setcopyright(), site.sethelper()
    namespace = sys.modules["__main__"].__dict__
    del namespace["_run"]
    namespace["__file__"] = {file!r}
    with open({file!r}, encoding="utf-8", errors="surrogatepass") as stream:
        source = stream.read()
    try:
        exec(compile(source, {file!r}, "exec", dont_inherit=True), namespace)
    except Exception as error:
        sys.excepthook(type(error), error.with_traceback(error.__traceback__.tb_next), error.__traceback__)
        sys.exit(1)
_run()
"""
"""Without `site`, whose .pth files are code of their own; a program's traceback begins with the program."""


def max_files(limits: dict[str, float]) -> int:
    """How many files and directories a program may have: many small ones fill a disk, too."""
    return max(1024, int(limits["disk_bytes"]) // _FILE_BYTES)


def unprivileged_uid() -> int | None:
    """A uid, also a gid, for a program of this process; None where it has to be the caller's own.

    That is where the caller is not root, or is the only user in a user namespace: root in name. Otherwise it is this
    run's alone where all uids are to be had, so that limits per user do not meet.
    """
    if os.geteuid() != 0:
        return None
    with open("/proc/self/uid_map", "rb") as stream:
        ranges = [tuple(int(number) for number in line.split()) for line in stream]
    for uid in (_UNUSED_UIDS + os.getpid(), NOBODY, max(first + count - 1 for first, _, count in ranges)):
        if uid > 0 and any(first <= uid < first + count for first, _, count in ranges):
            return uid
    return None


def take_uid(uid: int) -> None:
    """Makes this process another user's, in no group but the one of the same number.

    Raises:
        OSError: root lacks the capability, or the user is not to be had in this user namespace.
    """
    try:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    except OSError as error:
        raise OSError(error.errno, f"becoming the unprivileged user {uid}: {error.strerror}") from error


def report_failure(handshake: socket.socket, error: BaseException) -> None:
    """Tells the supervisor why the program cannot be started."""
    with contextlib.suppress(OSError):
        handshake.send(b"!" + str(error).encode(errors="replace")[:2000])


def forget_the_caller() -> None:
    """Undoes what is inherited through fork and exec: signals that are ignored or blocked, the file mode mask.

    The kernel, where it runs out of memory, takes this process before the caller.
    """
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        with contextlib.suppress(OSError, ValueError):
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    os.umask(0o022)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as stream:
        stream.write("1000")


def write_source(job: Job, directory: str) -> None:
    """Writes the program's file."""
    path = os.path.join(directory, PROGRAM_FILE)
    with open(path, "x", encoding="utf-8", errors="surrogatepass") as stream:
        stream.write(job.source)


def keep_descriptors(others: list[int]) -> None:
    """Closes every descriptor but 0 to 2, `RESULT_FD`, and `others`; this process has none above the first handle's."""
    os.set_inheritable(RESULT_FD, True)
    start = RESULT_FD + 1
    for kept in sorted(others):
        os.closerange(start, kept)
        start = kept + 1
    os.closerange(start, max(start, 2 * _FIRST_HANDLE))


def set_limits(limits: dict[str, float], processes: int | None) -> None:
    """Sets this process's resource limits; `processes` None leaves their number as it is.

    Raises:
        OSError: the kernel refuses.
        ValueError: a limit of the caller's own is lower.
    """
    cpu = int(-(-limits["cpu_s"] // 1))
    memory = int(limits["memory_bytes"])
    wanted = {
        resource.RLIMIT_AS: (memory, memory),
        resource.RLIMIT_CPU: (cpu, cpu + 1),  # SIGXCPU, and a second later SIGKILL
        resource.RLIMIT_FSIZE: (int(limits["file_bytes"]),) * 2,
        resource.RLIMIT_NOFILE: (int(limits["open_files"]),) * 2,
        resource.RLIMIT_MEMLOCK: (0, 0),
        # Unlike 0, a limit of 1 also keeps the kernel from starting the host's collector of core dumps.
        resource.RLIMIT_CORE: (1, 1),
    }
    if processes is not None:
        wanted[resource.RLIMIT_NPROC] = (processes, processes)
    for kind, (soft, hard) in wanted.items():
        ceiling = resource.getrlimit(kind)[1]
        if ceiling != resource.RLIM_INFINITY:
            soft, hard = min(soft, ceiling), min(hard, ceiling)
        resource.setrlimit(kind, (soft, hard))
    hard = resource.getrlimit(resource.RLIMIT_STACK)[1]
    soft = _STACK_BYTES if hard == resource.RLIM_INFINITY else min(_STACK_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_STACK, (soft, hard))


def handles_of(directories: list[str]) -> dict[str, int]:
    """An open handle of each directory, numbered so that programs do not meet it."""
    found = {}
    for directory in directories:
        descriptor = os.open(directory, os.O_PATH | os.O_CLOEXEC)
        found[directory] = _moved_up(descriptor)
    return found


def _moved_up(descriptor: int) -> int:
    number = _FIRST_HANDLE
    while True:
        try:
            os.fstat(number)
        except OSError:
            break
        number += 1
    os.dup2(descriptor, number, inheritable=False)
    os.close(descriptor)
    return number


def execute(job: Job, directory: str, handles: dict[str, int] | None = None) -> None:
    """Becomes the program; returns only by an exception.

    Args:
        job: the run.
        directory: the program's working directory, which holds its file.
        handles: for directories that this process's uid cannot reach by their path, a descriptor that stays open.

    Raises:
        OSError: the interpreter cannot be executed.
    """
    environment = {
        "HOME": directory,
        "TMPDIR": directory,
        "LANG": "C.UTF-8",
        "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        **job.environment,
    }
    places = {place: place for place in (job.home, *job.sites)}
    executable = job.executable
    for place, descriptor in (handles or {}).items():
        os.set_inheritable(descriptor, True)
        places[place] = f"/proc/self/fd/{descriptor}"
        if place == job.home:
            executable = places[place] + job.executable.removeprefix(place)
            environment["LD_LIBRARY_PATH"] = f"{places[place]}/lib"  # a shared libpython is looked for by its path
    file = os.path.join(directory, PROGRAM_FILE)
    runner = _RUNNER.format(sites=[places[site] for site in job.sites], directory=directory, file=file)
    os.execve(executable, [executable, "-s", "-S", "-B", "-c", runner], environment)
