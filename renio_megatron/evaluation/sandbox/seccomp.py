"""The system call filter of a program: classic BPF, for x86_64 and aarch64.

A list of what is refused, not of what is allowed, so that packages' native code runs; but whatever the kernel has got
since this list was written (numbers above `_LAST_KNOWN`) does not exist for the program.
"""

from __future__ import annotations

import ctypes
import errno
import platform
import struct

from renio_megatron.evaluation.sandbox import kernel

NUMBERS: dict[str, tuple[int | None, int | None]] = {  # name: (x86_64, aarch64); None: not on that architecture
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "statmount": (457, 457),
    "listmount": (458, 458),
    "unshare": (272, 97),
    "setns": (308, 268),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "reboot": (169, 142),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "adjtimex": (159, 171),
    "clock_adjtime": (305, 266),
    "create_module": (174, None),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "acct": (163, 89),
    "syslog": (103, 116),
    "vhangup": (153, 58),
    "nfsservctl": (180, 42),
    "lookup_dcookie": (212, 18),
    "iopl": (172, None),
    "ioperm": (173, None),
    "modify_ldt": (154, None),
    "uselib": (134, None),
    "_sysctl": (156, None),
    "personality": (135, 92),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "fanotify_init": (300, 262),
    "fanotify_mark": (301, 263),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "seccomp": (317, 277),
    "move_pages": (279, 239),
    "migrate_pages": (256, 238),
    "vmsplice": (278, 75),
    "remap_file_pages": (216, 234),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "shmdt": (67, 197),
    "semget": (64, 190),
    "semop": (65, 193),
    "semtimedop": (220, 192),
    "semctl": (66, 191),
    "msgget": (68, 186),
    "msgsnd": (69, 189),
    "msgrcv": (70, 188),
    "msgctl": (71, 187),
    "mq_open": (240, 180),
    "mq_unlink": (241, 181),
    "mq_timedsend": (242, 182),
    "mq_timedreceive": (243, 183),
    "mq_notify": (244, 184),
    "mq_getsetattr": (245, 185),
    "clone3": (435, 435),
    "clone": (56, 220),
    "fork": (57, None),
    "vfork": (58, None),
    "socket": (41, 198),
    "socketpair": (53, 199),
    "ioctl": (16, 29),
    "fcntl": (72, 25),
    "prlimit64": (302, 261),
    "setrlimit": (160, 164),
    "setpriority": (141, 140),
    "ioprio_set": (251, 30),
    "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119),
    "sched_setattr": (314, 274),
    "sched_setaffinity": (203, 122),
    "inotify_init": (253, None),
    "inotify_init1": (294, 26),
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424),
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "lchown": (94, None),
    "fchown": (93, 55),
    "fchownat": (260, 54),
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "truncate": (76, 45),
    "open": (2, None),
    "openat": (257, 56),
    "openat2": (437, 437),
}
_MISSING = ["clone3", "io_uring_setup", "io_uring_enter", "io_uring_register", "memfd_create", "memfd_secret"]
"""These answer ENOSYS, on which callers fall back to older calls."""
_ALWAYS = [name for name in list(NUMBERS)[: list(NUMBERS).index("clone3")] if name not in _MISSING]
"""Refused to every program: the names above `clone3`."""
_OTHERS_PROCESSES = "setpriority ioprio_set sched_setparam sched_setscheduler sched_setattr inotify_init inotify_init1"
_OTHERS_FILES = "chown lchown fchown fchownat setxattr lsetxattr fsetxattr removexattr lremovexattr fremovexattr"
_WITHOUT_EFFECT = "chmod fchmod fchmodat fchmodat2 utime utimes futimesat utimensat"
"""Landlock does not know these; packages copy files with them, so that they seem to succeed."""
_LAST_KNOWN = 462
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_X32 = 0x40000000
_NAMESPACE_FLAGS = 0x7E020000
_AF_UNIX = 1
_RLIMIT_CORE = 4
_OTHERS_COMMANDS = (8, 15, 1024, 1026)  # of fcntl: F_SETOWN, F_SETOWN_EX, F_SETLEASE, F_NOTIFY
_HARMLESS_REQUESTS = (0x5401, 0x540F, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # of ioctl: TCGETS ... FIOCLEX
_TERMINAL_REQUESTS = (0x5412, 0x541C)  # TIOCSTI, TIOCLINUX: typing into a terminal
_O_TRUNC = 0o1000

_LOAD, _EQUAL, _ANY_BIT, _AT_LEAST, _RETURN, _AND = 0x20, 0x15, 0x45, 0x35, 0x06, 0x54
_KILL, _ERRNO, _NOTIFY, _ALLOW = 0x80000000, 0x00050000, 0x7FC00000, 0x7FFF0000
_SET_MODE_FILTER, _NEW_LISTENER = 1, 8
_NUMBER_AT, _MACHINE_AT, _ARGUMENTS_AT = 0, 4, 16

_Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, constant


def unsupported_machine() -> str | None:
    """Why there is no filter for this machine's architecture; None where there is one."""
    name = platform.machine()
    return None if name in _MACHINES else f"the system call filter knows {' and '.join(_MACHINES)}, not {name}"


def number_of(name: str) -> int:
    """The number of a system call on this machine.

    Raises:
        OSError: the architecture has none, or is not known.
    """
    if (problem := unsupported_machine()) is None:
        number = NUMBERS[name][_MACHINES[platform.machine()][0]]
        if number is not None:
            return number
    raise OSError(problem or f"there is no system call {name} here")


def _give(value: int) -> _Instruction:
    return (_RETURN, 0, 0, value)


def _argument(index: int) -> _Instruction:
    """Loads the lower half of an argument: all that the kernel looks at of an int."""
    return (_LOAD, 0, 0, _ARGUMENTS_AT + 8 * index)


def _by_value(index: int, values: tuple[int, ...], matching: int, other: int) -> list[_Instruction]:
    """Returns `matching` where the argument is one of the values."""
    tests = [line for value in values for line in ((_EQUAL, 0, 1, value), _give(matching))]
    return [_argument(index), *tests, _give(other)]


def _refuse(number: int) -> int:
    return _ERRNO | number


def rules(
    *, notify: bool = False, landlock_abi: int | None = None, shared_uid: bool = False, pid: int = 0
) -> dict[str, list[_Instruction]]:
    """What becomes of each system call that is not simply allowed: name -> instructions, which all return.

    Args:
        notify: whether the supervisor decides on each fork.
        landlock_abi: version of Landlock that is the other wall; None where namespaces are.
        shared_uid: whether processes and files outside belong to the program's uid.
        pid: the program's process id, as it sees it.
    """
    denied, yes = _refuse(errno.EPERM), _ALLOW
    found = {name: [_give(denied)] for name in _ALWAYS}
    found |= {name: [_give(_refuse(errno.ENOSYS))] for name in _MISSING}
    fork = _NOTIFY if notify else _ALLOW
    found["clone"] = [_argument(0), (_ANY_BIT, 0, 1, _NAMESPACE_FLAGS), _give(denied), _give(fork)]
    found["fork"] = found["vfork"] = [_give(fork)]
    families = (_AF_UNIX,) if landlock_abi is None else ()
    found["socket"] = _by_value(0, families, yes, denied)
    found["socketpair"] = _by_value(0, (_AF_UNIX,), yes, denied)
    found["ioctl"] = _by_value(1, _TERMINAL_REQUESTS, denied, yes)
    # A core limit of 1 keeps the kernel from handing the core to a program of the host; 0 would not. It stays 1.
    found["setrlimit"] = _by_value(0, (_RLIMIT_CORE,), _refuse(0), yes)
    of_itself = [(_LOAD, 0, 0, _ARGUMENTS_AT + 16), (_EQUAL, 0, 2, 0), (_LOAD, 0, 0, _ARGUMENTS_AT + 20)]
    of_itself += [(_EQUAL, 1, 0, 0), _give(_refuse(0)), _give(yes)]  # a null pointer only asks
    of_itself = [(_EQUAL, 0, 6, _RLIMIT_CORE), *of_itself]
    found["prlimit64"] = [_argument(0), (_EQUAL, 1, 0, 0), _give(denied), _argument(1), *of_itself, _give(yes)]
    if landlock_abi is not None:
        found |= {name: [_give(denied)] for name in _OTHERS_PROCESSES.split()}
        found["sched_setaffinity"] = _by_value(0, (0,), yes, denied)
        if landlock_abi < 3:  # it does not know truncation
            reading_only = [(_AND, 0, 0, 3), (_EQUAL, 0, 1, 0), _give(denied), _give(yes)]
            for name, flags in (("open", 1), ("openat", 2)):
                found[name] = [_argument(flags), (_ANY_BIT, 1, 0, _O_TRUNC), _give(yes), *reading_only]
            found |= {"truncate": [_give(denied)], "openat2": [_give(_refuse(errno.ENOSYS))]}
    if landlock_abi is not None and shared_uid:
        found |= {name: [_give(denied)] for name in _OTHERS_FILES.split()}
        found |= {name: [_give(_refuse(0))] for name in _WITHOUT_EFFECT.split()}
        # On a library's file, open for reading, its owner may do more than read.
        found["fcntl"] = _by_value(1, _OTHERS_COMMANDS, denied, yes)
        found["ioctl"] = _by_value(1, _HARMLESS_REQUESTS, yes, _refuse(errno.ENOTTY))
        if landlock_abi < 6:  # it does not know signals
            for name in ("kill", "tkill", "tgkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo"):
                found[name] = _by_value(0, (pid,), yes, denied)
            found["pidfd_send_signal"] = [_give(denied)]
    return found


def assemble(found: dict[str, list[_Instruction]], machine: str) -> bytes:
    """The BPF program of `rules` for an architecture, as an array of struct sock_filter."""
    column, audit_name = _MACHINES[machine]
    program: list[_Instruction] = [(_LOAD, 0, 0, _MACHINE_AT), (_EQUAL, 1, 0, audit_name), _give(_KILL)]
    program += [(_LOAD, 0, 0, _NUMBER_AT), (_AT_LEAST, 0, 1, _X32), _give(_KILL)]
    program += [(_AT_LEAST, 0, 1, _LAST_KNOWN + 1), _give(_refuse(errno.ENOSYS))]
    for name, body in found.items():
        if (number := NUMBERS[name][column]) is not None:
            program += [(_EQUAL, 0, len(body), number), *body]
    program.append(_give(_ALLOW))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def install(found: dict[str, list[_Instruction]], *, listen: bool = False) -> int:
    """Installs the filter for this process and all that it starts; no_new_privs must be set.

    Returns:
        A descriptor of the requests that await a decision where `listen`; else 0.

    Raises:
        OSError: the kernel refuses.
    """
    machine = platform.machine()
    program = assemble(found, machine)
    lines = ctypes.create_string_buffer(program, len(program))
    # struct sock_fprog: the count, padding up to a pointer, the pointer
    holder = ctypes.create_string_buffer(struct.pack("=HxxxxxxQ", len(program) // 8, ctypes.addressof(lines)))
    number = number_of("seccomp")
    flags = _NEW_LISTENER if listen else 0
    return kernel.call("syscall", number, _SET_MODE_FILTER, flags, holder, what="installing the system call filter")
