"""Where model-written Python programs run when they are graded.

>>> from renio_megatron.evaluation.sandbox import open_sandbox
>>> sandbox = open_sandbox(None)  # doctest: +SKIP
>>> sandbox.run("print(input() * 2)", b"ab").stdout  # doctest: +SKIP
b'abab\\n'

Back ends, Linux on x86_64 and aarch64:

- `namespaces`: user, mount, process, network, IPC, host name and control group namespaces of the program's own. Its
  root directory holds the interpreter, its packages and the system's libraries, read-only; nothing else of this machine
  has a name. Processes outside have no number there. It dies as a whole.
- `landlock`, where user namespaces are refused, as by Docker's and Kubernetes' default profiles: the same files may be
  read by Landlock's rules, and a private directory written. The supervisor decides on each fork.
- `unsafe`: limits, a private directory, an empty environment, and death at the end. A program may do all that the
  caller may: read and delete files, use the network, kill processes, escape the end itself by killing its supervisor.
  It is for people who run all of this in a container of their own that holds nothing else.

The first two also filter system calls, drop every capability, forbid new privileges, and give a program of root's
another uid, of which nothing else is; a caller that is not root has no other uid to give. All have limits of time,
memory, output and files, the first two also of processes (`Limits`), and an environment without the caller's variables.
When `run` returns every process of the program is dead, and nothing is left on disk. When the caller dies its programs
die, within a moment.

What is stopped: reading and writing files of this machine, network, signals, tracing, shared memory, message queues,
keyrings; filling memory, disk and process tables; outliving the run.

What is not:

- Errors of the kernel and of the processor: the kernel is shared. Against those, a virtual machine.
- Files below the interpreter's `lib`, its packages, /lib, /usr/lib and /usr/share/zoneinfo can be read and
  executed. Secrets do not belong there.
- A run may use all processors, and as much bandwidth of memory as it can take, until its time ends. Its CPU limit is
  for each process. Memory of all its processes together is looked at 20 times a second; in between more can be taken.
- Under `landlock` a program sees that a file exists, its size, owner and times (stat), where the uid may look. A disk
  quota is enforced by looking 5 times a second: until then disk is limited per file and by time. Files that are
  deleted but open are counted, unless the caller is root without CAP_SYS_PTRACE, as in containers.
- Under `landlock` with a caller that is not root, changing modes and times of files seems to succeed and has no effect,
  and extended attributes and owners cannot be changed, not even of the program's own files.
- Under `landlock` with a caller that is root and an interpreter that other users cannot reach (in /root), the program
  holds descriptors of the interpreter's and the packages' directories, through which it may read what it may anyway.
- Under `landlock` and `unsafe`, a supervisor that is killed from outside leaves the program's children behind, unable
  to fork under `landlock`, until their CPU time is used up.
- The result, stdout and stderr are the program's own words: whoever grades must not take them for a judge's.
- A program can find out that it is in a sandbox, and under `landlock` the name and the kernel of this machine.

What honest programs lack: shells and other programs of the system, time zones other than UTC by default, memfd_create,
System V and POSIX message queues and shared memory, and under `landlock` also UNIX sockets, /dev/shm and with it
multiprocessing's locks, queues and pools.
"""

from __future__ import annotations

from renio_megatron.errors import ConfigError
from renio_megatron.evaluation.sandbox.job import RESULT_FD
from renio_megatron.evaluation.sandbox.launch import SupervisedSandbox
from renio_megatron.evaluation.sandbox.outcome import Limits, Outcome, Sandbox, SandboxError
from renio_megatron.evaluation.sandbox.probe import problem_of

__all__ = [
    "RESULT_FD",
    "SANDBOXES",
    "Limits",
    "Outcome",
    "Sandbox",
    "SandboxError",
    "open_sandbox",
    "sandbox_problem",
]

SANDBOXES: dict[str, Sandbox] = {name: SupervisedSandbox(name) for name in ("namespaces", "landlock", "unsafe")}
"""The back ends by name, the best first."""
_REMEDY = (
    "Allow user namespaces (sysctl user.max_user_namespaces above 0; on Ubuntu "
    "kernel.apparmor_restrict_unprivileged_userns=0; on Debian: "
    "kernel.unprivileged_userns_clone=1; in a container: a seccomp profile that allows unshare), or use a kernel from "
    "5.13 on with Landlock among the modules of its lsm= option; or set data.sandbox=unsafe inside a container of your "
    "own that holds nothing else; or data.grader=none."
)


def sandbox_problem(name: str) -> str | None:
    """Why a back end cannot work here, or None where it works; found by running a small program in it, once.

    Raises:
        ConfigError: there is no such back end.
    """
    return problem_of(_named(name))


def open_sandbox(name: str | None) -> Sandbox:
    """The back end of this name; for None the best that works here, which is never `unsafe`.

    Raises:
        ConfigError: there is no such back end, or none works here; the message says what was tried.
    """
    names = [name for name in SANDBOXES if name != "unsafe"] if name is None else [_named(name).name]
    tried = {}
    for candidate in names:
        if (problem := sandbox_problem(candidate)) is None:
            return SANDBOXES[candidate]
        tried[candidate] = problem
    reasons = "; ".join(f"{candidate!r}: {problem}" for candidate, problem in tried.items())
    raise ConfigError(f"no sandbox for programs works here. Tried {reasons}. {_REMEDY}")


def _named(name: str) -> Sandbox:
    if name not in SANDBOXES:
        raise ConfigError(f"there is no sandbox {name!r}; there are {', '.join(SANDBOXES)}")
    return SANDBOXES[name]
