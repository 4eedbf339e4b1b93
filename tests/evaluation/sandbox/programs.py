"""Hostile programs. Each would leave a marker if it got out: a file, a message, a dead process, a word in its output.

Names that a program may use stand in `PRELUDE`; the arena gives their values and looks for the markers.
"""

from __future__ import annotations

import dataclasses
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


CASES = {
    "write_where_all_may": Case("tries(mark)"),
    "write_temporary": Case(
        "for folder in ('/tmp', '/var/tmp', '/dev/shm'):\n"
        "    try: write(f'{folder}/{TOKEN}-{NAME}')\n"
        "    except OSError: pass"
    ),
    "read_what_all_may": Case("tries(lambda: print(open(SECRET_FILE).read()))"),
    "read_home": Case("tries(lambda: print(open(HOME_FILE).read()))"),
    "list_home": Case("tries(lambda: os.listdir(os.path.dirname(HOME_FILE)))"),
    "environment": Case("print(dict(os.environ), os.environb)"),
    "proc_walk": Case(
        "for pid in [*range(1, 5), CALLER, os.getppid(), VICTIM]:\n"
        "    for file in ('environ', 'cmdline', 'root' + SECRET_FILE, 'cwd/secret', f'task/{pid}/environ', 'maps'):\n"
        "        try: content = open(f'/proc/{pid}/{file}', 'rb').read()\n"
        "        except OSError: continue\n"
        "        if pid in (CALLER, VICTIM): print(content)\n"
    ),
    "proc_descriptors": Case(
        "for pid in ['self', 1, CALLER, os.getppid()]:\n"
        "    for number in range(64):\n"
        "        try: print(os.read(os.open(f'/proc/{pid}/fd/{number}', os.O_NONBLOCK), 100))\n"
        "        except (OSError, ValueError): pass\n",
        limits={"wall_s": 5},
    ),
    "inherited_descriptors": Case(
        "for number in range(3, 1100):\n    try: print(os.pread(number, 100, 0))\n    except OSError: pass"
    ),
    "directory_descriptors": Case(
        "for number in range(3, 300):\n"
        "    try: print(open(os.open('../' * 30 + SECRET_FILE[1:], os.O_RDONLY, dir_fd=number)).read())\n"
        "    except OSError: pass",
        control=False,
    ),
    "tcp": Case("tries(lambda: socket.create_connection(('127.0.0.1', TCP)).sendall(NAME.encode()))"),
    "udp": Case(
        "tries(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(NAME.encode(), ('127.0.0.1', UDP)))"
    ),
    "other_families": Case(
        "for family, kind in ((socket.AF_INET6, 2), (socket.AF_NETLINK, 3), (socket.AF_PACKET, 3), (40, 1), (38, 5)):\n"
        "    tries(lambda: socket.socket(family, kind))"
    ),
    "abstract_socket": Case(
        "s = None\n"
        "def go():\n"
        "    s = socket.socket(socket.AF_UNIX)\n"
        "    s.connect(ABSTRACT); s.sendall(NAME.encode())\n"
        "tries(go)"
    ),
    "path_socket": Case(
        "def go():\n    s = socket.socket(socket.AF_UNIX)\n    s.connect(UNIX); s.sendall(NAME.encode())\ntries(go)"
    ),
    "signal_caller": Case("tries(lambda: os.kill(CALLER, signal.SIGUSR1))"),
    "signal_victim": Case("tries(lambda: os.kill(VICTIM, signal.SIGKILL)); calls(130 if ARM else 200, VICTIM, 9)"),
    "signal_by_descriptor": Case(
        "import fcntl\n"
        "a, b = socket.socketpair()\n"
        "def go():\n"
        "    fcntl.fcntl(a, 10, int(signal.SIGKILL))\n"
        "    fcntl.fcntl(a, fcntl.F_SETOWN, VICTIM)\n"
        "    fcntl.fcntl(a, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)\n"
        "    b.send(b'x')\n"
        "try: go()\n"
        "except OSError: pass"
    ),
    "kill_parents": Case(
        "tries(lambda: os.kill(os.getppid(), signal.SIGKILL) if os.getppid() > 1 else time.sleep(9),\n"
        "      lambda: os.kill(os.getppid(), signal.SIGSTOP) if os.getppid() > 1 else time.sleep(9))",
        control=False,
        limits={"wall_s": 2},
        inside="",
    ),
    "kill_everybody": Case(
        "try: os.kill(-1, signal.SIGKILL)\nexcept OSError: pass", control=False, dangerous=True, inside=""
    ),
    "links_in_the_way_of_cleaning": Case(
        "os.symlink(PRECIOUS, 'directory'); os.symlink(PRECIOUS + '/file', 'file'); os.symlink('/', 'root')\n"
        "os.mkdir('folder'); os.symlink(PRECIOUS, 'folder/again'); os.mkdir('closed'); os.symlink(PRECIOUS, 'closed/x')\n"
        "os.chmod('closed', 0)\n"
        "try: os.link(PRECIOUS + '/file', 'hard')\n"
        "except OSError: pass",
        control=False,
    ),
    "change_files_of_the_caller": Case(
        "def go():\n"
        "    os.chmod(PRECIOUS + '/file', 0o666)\n"
        "def times():\n"
        "    os.utime(PRECIOUS + '/file', (1, 1))\n"
        "def extended():\n"
        "    os.setxattr(PRECIOUS + '/file', 'user.renio', b'x')\n"
        "for action in (go, times, extended, lambda: os.truncate(PRECIOUS + '/file', 0),\n"
        "               lambda: os.chown(PRECIOUS + '/file', -1, os.getgid()), lambda: os.unlink(PRECIOUS + '/file'),\n"
        "               lambda: os.rename(PRECIOUS, OPEN + '/taken')):\n"
        "    try: action()\n"
        "    except OSError: pass"
    ),
    "change_libraries": Case(
        "import fcntl\n"
        "assert open(LIBRARY).read()\n"
        "f = os.open(LIBRARY, os.O_RDONLY)\n"
        "for action in (lambda: os.fchmod(f, 0o666), lambda: os.utime(f, (1, 1)), lambda: os.truncate(LIBRARY, 0),\n"
        "               lambda: os.setxattr(f, 'user.renio', b'x'), lambda: os.open(LIBRARY, os.O_RDONLY | os.O_TRUNC),\n"
        "               lambda: fcntl.ioctl(f, 0x40086602, struct.pack('l', 0x40)), lambda: write(LIBRARY + '2'),\n"
        "               lambda: calls(437, -100, ctypes.cast(LIBRARY.encode(), ctypes.c_void_p).value,\n"
        "                             ctypes.addressof(ctypes.create_string_buffer(struct.pack('QQQ', 0o1000, 0, 0))), 24)):\n"
        "    try: action()\n"
        "    except OSError: pass"
    ),
    "shell": Case(
        "tries(lambda: __import__('subprocess').run(['/bin/sh', '-c', f'echo > {OPEN}/{NAME}'], check=True))"
    ),
    "daemon": Case(
        "libc.prctl(1, 0, 0, 0, 0)\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork() == 0:\n"
        "        os.closerange(0, 4)\n"
        "        for number in range(1, 32):\n"
        "            try: signal.signal(number, signal.SIG_IGN)\n"
        "            except OSError: pass\n"
        "        time.sleep(1); mark(); time.sleep(3)\n"
        "    os._exit(0)\n"
        "os.wait()"
    ),
    "orphans_that_fork_on": Case(
        "def flee():\n"
        "    end = time.time() + 4\n"
        "    while time.time() < end:\n"
        "        try:\n"
        "            if os.fork(): os._exit(0)\n"
        "            os.setsid()\n"
        "        except OSError: pass\n"
        "for _ in range(3):\n"
        "    if os.fork() == 0:\n"
        "        flee()\n"
        "        os._exit(0)\n"
        "time.sleep(0.2)",
        control=False,
    ),
    "many_processes": Case(
        "children = 0\n"
        "try:\n"
        "    while children < 60:\n"
        "        if os.fork() == 0:\n"
        "            time.sleep(3); os._exit(0)\n"
        "        children += 1\n"
        "except OSError: pass\n"
        "print('ESCAPED' if children > 20 else children)\n"
        "assert children > 10, children",
        limits={"processes": 20},
    ),
    "many_threads": Case(
        "import threading\n"
        "children = 0\n"
        "try:\n"
        "    while children < 60:\n"
        "        threading.Thread(target=time.sleep, args=(1,), daemon=True).start()\n"
        "        children += 1\n"
        "except RuntimeError: pass\n"
        "print('ESCAPED' if children > 20 else children)\n"
        "assert children > 10, children",
        limits={"processes": 20},
    ),
    "fork_bomb": Case(
        "while True:\n    try: os.fork()\n    except OSError: pass",
        control=False,
        limits={"wall_s": 1.5},
        outcome={"stopped": "time", "exit_code": None},
        dangerous=True,
        inside="",
    ),
    "endless_output": Case(
        "while True: os.write(1, b'x' * 65536)",
        control=False,
        limits={"output_bytes": 100_000},
        outcome={"stopped": "output", "stdout": b"x" * 100_000},
        inside="",
    ),
    "endless_errors": Case(
        "while True: os.write(2, b'x' * 65536)",
        control=False,
        limits={"output_bytes": 100_000},
        outcome={"stopped": "output", "stderr": b"x" * 100_000},
        inside="",
    ),
    "endless_result": Case(
        "while True: os.write(3, b'x' * 65536)",
        control=False,
        limits={"output_bytes": 100_000},
        outcome={"stopped": "output", "result": b"x" * 100_000},
        inside="",
    ),
    "memory": Case(
        "try: bytearray(2 << 30)\nexcept MemoryError: pass\nelse: print('ESCAPED')",
        limits={"memory_bytes": 1 << 30},
    ),
    "memory_together": Case(
        "for _ in range(8):\n"
        "    if os.fork() == 0:\n"
        "        kept = bytearray(b'x') * (64 << 20)\n"
        "        time.sleep(9)\n"
        "time.sleep(9)",
        control=False,
        limits={"memory_bytes": 256 << 20},
        outcome={"stopped": "memory"},
        inside="",
    ),
    "shared_memory_together": Case(
        "for _ in range(8):\n"
        "    if os.fork() == 0:\n"
        "        kept = mmap.mmap(-1, 64 << 20); kept.write(b'x' * (64 << 20))\n"
        "        time.sleep(9)\n"
        "time.sleep(9)",
        control=False,
        limits={"memory_bytes": 256 << 20},
        outcome={"stopped": "memory"},
        inside="",
    ),
    "memory_files": Case("tries(lambda: os.memfd_create('x'))"),
    "large_file": Case(
        "with open('large', 'wb') as stream:\n"
        "    try:\n"
        "        for _ in range(64): stream.write(bytes(1 << 18)); stream.flush()\n"
        "    except OSError: pass\n"
        "    print('ESCAPED' if os.stat('large').st_size > 8 << 20 else 'small', flush=True)\n"
        "os._exit(0)",
        limits={"file_bytes": 8 << 20},
        inside="small",
    ),
    "many_files": Case(
        "for number in range(24):\n"
        "    with open(str(number), 'wb') as stream: stream.write(b'x' * (4 << 20))\n"
        "time.sleep(1)\n"
        "print('ESCAPED')",
        limits={"disk_bytes": 16 << 20},
        inside="",
    ),
    "many_empty_files": Case(
        "for number in range(30_000):\n    open(f'{number:060}', 'wb').close()\ntime.sleep(1)\nprint('ESCAPED')",
        limits={"disk_bytes": 16 << 20, "wall_s": 30},
        control=False,
        inside="",
    ),
    "deep_directories": Case(
        "for number in range(5000):\n"
        "    os.mkdir('d'); os.chdir('d')\n"
        "os.mkdir('closed'); open('closed/file', 'w').close(); os.chmod('closed', 0)",
        control=False,
        limits={"wall_s": 30},
    ),
    "closed_directories": Case(
        "os.makedirs('a/b/c'); open('a/b/c/d', 'w').close()\n"
        "for name in ('a/b/c', 'a/b', 'a'): os.chmod(name, 0)\n"
        "try: os.chmod('.', 0)\n"
        "except OSError: pass",
        control=False,
    ),
    "ptrace": Case("calls(117 if ARM else 101, 0x4206, VICTIM, 0, 0)"),
    "read_memory": Case(
        "b = ctypes.create_string_buffer(8); ours = struct.pack('QQ', ctypes.addressof(b), 8)\n"
        "o = ctypes.create_string_buffer(ours); r = ctypes.create_string_buffer(struct.pack('QQ', ADDRESS, 8))\n"
        "calls(270 if ARM else 310, CALLER, ctypes.addressof(o), 1, ctypes.addressof(r), 1, 0)"
    ),
    "raise_limits": Case(
        "for kind in (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE):\n"
        "    tries(lambda: resource.setrlimit(kind, (resource.getrlimit(kind)[0], resource.getrlimit(kind)[1] + 4096)))\n"
        "    hard = resource.getrlimit(kind)[1]\n"
        "    if hard == resource.RLIM_INFINITY: print('ESCAPED', kind)",
    ),
    "limits_of_others": Case("tries(lambda: resource.prlimit(VICTIM, resource.RLIMIT_NOFILE, (64, 64)))"),
    "priority_of_others": Case(
        "tries(lambda: os.setpriority(os.PRIO_PROCESS, VICTIM, 19), lambda: os.sched_setaffinity(VICTIM, {0}),\n"
        "      lambda: os.sched_setscheduler(VICTIM, os.SCHED_BATCH, os.sched_param(0)))"
    ),
    "mounts": Case(
        "s = ctypes.create_string_buffer(b'tmpfs'); t = ctypes.create_string_buffer(b'/tmp')\n"
        "a = ctypes.addressof\n"
        "calls(40 if ARM else 165, a(s), a(t), a(s), 0, 0)\n"
        "calls(39 if ARM else 166, a(t), 2)\n"
        "tries(lambda: os.chroot('.'))\n"
        "calls(430, a(s), 0); calls(428, -100, a(t), 1)",
        control=False,
    ),
    "new_namespaces": Case(
        "unshare = 97 if ARM else 272\n"
        "for kind in (0x10000000, 0x20000, 0x40000000): calls(unshare, kind)\n"
        "pid = libc.syscall(*map(ctypes.c_long, (220 if ARM else 56, 0x10000000 | 17, 0, 0, 0, 0)))\n"
        "if pid == 0: os._exit(0)\n"
        "if pid > 0: print('ESCAPED clone')\n"
        "a = ctypes.create_string_buffer(struct.pack('8Q', 0x10000000, 0, 0, 0, 17, 0, 0, 0), 64)\n"
        "pid = libc.syscall(*map(ctypes.c_long, (435, ctypes.addressof(a), 64)))\n"
        "if pid == 0: os._exit(0)\n"
        "if pid > 0: print('ESCAPED clone3')"
    ),
    "other_namespaces": Case(
        "for kind in ('user', 'mnt', 'net', 'pid'):\n"
        "    for pid in (1, CALLER):\n"
        "        try: calls(268 if ARM else 308, os.open(f'/proc/{pid}/ns/{kind}', os.O_RDONLY), 0)\n"
        "        except OSError: pass",
        control=False,
    ),
    "become_root": Case(
        "for action in (lambda: os.setuid(0), lambda: os.setresuid(0, 0, 0), lambda: os.setgid(0), lambda: os.setgroups([0])):\n"
        "    tries(action)\n"
        "print('ESCAPED' if 0 in (*os.getresuid(), *os.getresgid()) else '')\n"
        "header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()\n"
        "assert libc.capget(header, sets) == 0\n"
        "print('ESCAPED with capabilities' if any((sets[0], sets[1], sets[3], sets[4])) else '')",
        control=False,
    ),
    "kernel_interfaces": Case(
        "b = ctypes.create_string_buffer(256); a = ctypes.addressof(b)\n"
        "k = ctypes.create_string_buffer(b'user'); d = ctypes.create_string_buffer(b'renio')\n"
        "for number in ((280 if ARM else 321, 0, a, 128), (241 if ARM else 298, a, 0, -1, -1, 0), (282 if ARM else 323, 1),\n"
        "               (425, 4, a), (217 if ARM else 248, ctypes.addressof(k), ctypes.addressof(d), a, 8, -3),\n"
        "               (219 if ARM else 250, 0, -3, 0), (447, 0), (438, 0, 0, 0), (450 + 300, 0), (92 if ARM else 135, 0x40000),\n"
        "               (272 if ARM else 312, os.getpid(), os.getppid(), 0, 0, 0)): calls(*number)",
        control=False,
    ),
    "write_to_the_kernel": Case(
        "for path in ('/proc/sys/kernel/hostname', '/proc/sys/kernel/core_pattern', '/proc/sysrq-trigger', '/proc/self/mem',\n"
        "             '/sys/kernel/mm/transparent_hugepage/enabled', '/proc/self/oom_score_adj', '/proc/self/uid_map', '/dev/mem',\n"
        "             '/dev/kmsg', '/dev/tty', '/dev/vda', '/dev/sda'):\n"
        "    tries(lambda: os.close(os.open(path, os.O_WRONLY)))",
        control=False,
    ),
    "shared_memory": Case(
        "path = f'/dev/shm/{TOKEN}-{NAME}'\n"
        "try: write(path)\n"
        "except OSError: pass\n"
        "calls(194 if ARM else 29, KEY, 4096, 0o1666); calls(186 if ARM else 68, KEY, 0o1666); calls(190 if ARM else 64, KEY, 1, 0o1666)\n"
        "n = ctypes.create_string_buffer(f'{TOKEN}-{NAME}'.encode())\n"
        "calls(180 if ARM else 240, ctypes.addressof(n), 0o102, 0o666, 0)\n"
        "libc.shmctl(libc.shmget(KEY, 0, 0), 0, None); libc.msgctl(libc.msgget(KEY, 0), 0, None)\n"
        "libc.semctl(libc.semget(KEY, 0, 0), 0, 0); libc.syscall(ctypes.c_long(181 if ARM else 241), n)"
    ),
    "other_call_tables": Case(
        "if not ARM: libc.syscall(ctypes.c_long(0x40000000 | 39))\nelse: os.kill(os.getpid(), signal.SIGSYS)",
        control=False,
        outcome={"exit_code": -31},
        inside="",
    ),
    "core_dump": Case(
        "resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n"
        "print('ESCAPED' if resource.getrlimit(resource.RLIMIT_CORE) != (1, 1) else '')\n"
        "print('DONE', flush=True)\n"
        "libc.abort()",
        control=False,
        outcome={"exit_code": -6},
    ),
    "without_descriptors": Case("os.closerange(0, 4); os._exit(7)", control=False, outcome={"exit_code": 7}, inside=""),
    "endless_loop": Case(
        "while True: pass", control=False, limits={"wall_s": 0.5}, outcome={"stopped": "time"}, inside=""
    ),
    "deaf_loop": Case(
        "signal.signal(signal.SIGXCPU, signal.SIG_IGN); signal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: pass",
        control=False,
        limits={"cpu_s": 0.5},
        outcome={"stopped": "cpu", "exit_code": None},
        inside="",
    ),
    "alarm": Case(
        "signal.setitimer(signal.ITIMER_REAL, 0.05); time.sleep(9)",
        control=False,
        outcome={"exit_code": -14},
        inside="",
    ),
}
