"""Programs that reach for what is not theirs: files, networks, processes, the kernel."""

from __future__ import annotations

from tests.evaluation.sandbox.case import Case

CASES = {
    "write_where_all_may": Case(
        "tries(mark)",
    ),
    "write_temporary": Case(
        """
        for folder in ('/tmp', '/var/tmp', '/dev/shm'):
            try: write(f'{folder}/{TOKEN}-{NAME}')
            except OSError: pass
        """,
    ),
    "read_what_all_may": Case(
        "tries(lambda: print(open(SECRET_FILE).read()))",
    ),
    "read_home": Case(
        "tries(lambda: print(open(HOME_FILE).read()))",
    ),
    "list_home": Case(
        "tries(lambda: os.listdir(os.path.dirname(HOME_FILE)))",
    ),
    "environment": Case(
        "print(dict(os.environ), os.environb)",
    ),
    "proc_walk": Case(
        """
        for pid in [*range(1, 5), CALLER, os.getppid(), VICTIM]:
            for file in ('environ', 'cmdline', 'root' + SECRET_FILE, 'cwd/secret', f'task/{pid}/environ', 'maps'):
                try: content = open(f'/proc/{pid}/{file}', 'rb').read()
                except OSError: continue
                if pid in (CALLER, VICTIM): print(content)
        """,
    ),
    "proc_descriptors": Case(
        """
        for pid in ['self', 1, CALLER, os.getppid()]:
            for number in range(64):
                try: print(os.read(os.open(f'/proc/{pid}/fd/{number}', os.O_NONBLOCK), 100))
                except (OSError, ValueError): pass
        """,
        limits={"wall_s": 5},
    ),
    "inherited_descriptors": Case(
        """
        for number in range(3, 1100):
            try: print(os.pread(number, 100, 0))
            except OSError: pass
        """,
    ),
    "directory_descriptors": Case(
        """
        for number in range(3, 300):
            try: print(open(os.open('../' * 30 + SECRET_FILE[1:], os.O_RDONLY, dir_fd=number)).read())
            except OSError: pass
        """,
        control=False,
    ),
    "tcp": Case(
        "tries(lambda: socket.create_connection(('127.0.0.1', TCP)).sendall(NAME.encode()))",
    ),
    "udp": Case(
        """
        tries(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(NAME.encode(), ('127.0.0.1', UDP)))
        """,
    ),
    "other_families": Case(
        """
        for family, kind in ((socket.AF_INET6, 2), (socket.AF_NETLINK, 3), (socket.AF_PACKET, 3), (40, 1), (38, 5)):
            tries(lambda: socket.socket(family, kind))
        """,
    ),
    "abstract_socket": Case(
        """
        s = None
        def go():
            s = socket.socket(socket.AF_UNIX)
            s.connect(ABSTRACT); s.sendall(NAME.encode())
        tries(go)
        """,
    ),
    "path_socket": Case(
        """
        def go():
            s = socket.socket(socket.AF_UNIX)
            s.connect(UNIX); s.sendall(NAME.encode())
        tries(go)
        """,
    ),
    "signal_caller": Case(
        "tries(lambda: os.kill(CALLER, signal.SIGUSR1))",
    ),
    "signal_victim": Case(
        "tries(lambda: os.kill(VICTIM, signal.SIGKILL)); calls(130 if ARM else 200, VICTIM, 9)",
    ),
    "signal_by_descriptor": Case(
        """
        import fcntl
        a, b = socket.socketpair()
        def go():
            fcntl.fcntl(a, 10, int(signal.SIGKILL))
            fcntl.fcntl(a, fcntl.F_SETOWN, VICTIM)
            fcntl.fcntl(a, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
            b.send(b'x')
        try: go()
        except OSError: pass
        """,
    ),
    "kill_parents": Case(
        """
        tries(lambda: os.kill(os.getppid(), signal.SIGKILL) if os.getppid() > 1 else time.sleep(9),
              lambda: os.kill(os.getppid(), signal.SIGSTOP) if os.getppid() > 1 else time.sleep(9))
        """,
        control=False,
        limits={"wall_s": 2},
        inside="",
    ),
    "kill_everybody": Case(
        """
        try: os.kill(-1, signal.SIGKILL)
        except OSError: pass
        """,
        control=False,
        dangerous=True,
        inside="",
    ),
    "links_in_the_way_of_cleaning": Case(
        """
        os.symlink(PRECIOUS, 'directory'); os.symlink(PRECIOUS + '/file', 'file'); os.symlink('/', 'root')
        os.mkdir('folder'); os.symlink(PRECIOUS, 'folder/again'); os.mkdir('closed'); os.symlink(PRECIOUS, 'closed/x')
        os.chmod('closed', 0)
        try: os.link(PRECIOUS + '/file', 'hard')
        except OSError: pass
        """,
        control=False,
    ),
    "change_files_of_the_caller": Case(
        """
        def go():
            os.chmod(PRECIOUS + '/file', 0o666)
        def times():
            os.utime(PRECIOUS + '/file', (1, 1))
        def extended():
            os.setxattr(PRECIOUS + '/file', 'user.renio', b'x')
        for action in (go, times, extended, lambda: os.truncate(PRECIOUS + '/file', 0),
                       lambda: os.chown(PRECIOUS + '/file', -1, os.getgid()), lambda: os.unlink(PRECIOUS + '/file'),
                       lambda: os.rename(PRECIOUS, OPEN + '/taken')):
            try: action()
            except OSError: pass
        """,
    ),
    "change_libraries": Case(
        """
        import fcntl
        assert open(LIBRARY).read()
        f = os.open(LIBRARY, os.O_RDONLY)
        path = ctypes.create_string_buffer(LIBRARY.encode())
        how = ctypes.create_string_buffer(struct.pack('QQQ', os.O_TRUNC, 0, 0), 24)
        for action in (lambda: os.fchmod(f, 0o666), lambda: os.utime(f, (1, 1)), lambda: os.truncate(LIBRARY, 0),
                       lambda: os.setxattr(f, 'user.renio', b'x'), lambda: os.open(LIBRARY, os.O_RDONLY | os.O_TRUNC),
                       lambda: fcntl.ioctl(f, 0x40086602, struct.pack('l', 0x40)), lambda: write(LIBRARY + '2'),
                       lambda: calls(437, -100, ctypes.addressof(path), ctypes.addressof(how), 24)):
            try: action()
            except OSError: pass
        """,
    ),
    "shell": Case(
        "tries(lambda: __import__('subprocess').run(['/bin/sh', '-c', f'echo > {OPEN}/{NAME}'], check=True))",
    ),
    "daemon": Case(
        """
        libc.prctl(1, 0, 0, 0, 0)
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                os.closerange(0, 4)
                for number in range(1, 32):
                    try: signal.signal(number, signal.SIG_IGN)
                    except OSError: pass
                time.sleep(1); mark(); time.sleep(3)
            os._exit(0)
        os.wait()
        """,
    ),
    "ptrace": Case(
        "calls(117 if ARM else 101, 0x4206, VICTIM, 0, 0)",
    ),
    "read_memory": Case(
        """
        b = ctypes.create_string_buffer(8); ours = struct.pack('QQ', ctypes.addressof(b), 8)
        o = ctypes.create_string_buffer(ours); r = ctypes.create_string_buffer(struct.pack('QQ', ADDRESS, 8))
        calls(270 if ARM else 310, CALLER, ctypes.addressof(o), 1, ctypes.addressof(r), 1, 0)
        """,
    ),
    "limits_of_others": Case(
        "tries(lambda: resource.prlimit(VICTIM, resource.RLIMIT_NOFILE, (64, 64)))",
    ),
    "priority_of_others": Case(
        """
        tries(lambda: os.setpriority(os.PRIO_PROCESS, VICTIM, 19), lambda: os.sched_setaffinity(VICTIM, {0}),
              lambda: os.sched_setscheduler(VICTIM, os.SCHED_BATCH, os.sched_param(0)))
        """,
    ),
    "mounts": Case(
        """
        s = ctypes.create_string_buffer(b'tmpfs'); t = ctypes.create_string_buffer(b'/tmp')
        a = ctypes.addressof
        calls(40 if ARM else 165, a(s), a(t), a(s), 0, 0)
        calls(39 if ARM else 166, a(t), 2)
        tries(lambda: os.chroot('.'))
        calls(430, a(s), 0); calls(428, -100, a(t), 1)
        """,
        control=False,
    ),
    "new_namespaces": Case(
        """
        unshare = 97 if ARM else 272
        for kind in (0x10000000, 0x20000, 0x40000000): calls(unshare, kind)
        pid = libc.syscall(*map(ctypes.c_long, (220 if ARM else 56, 0x10000000 | 17, 0, 0, 0, 0)))
        if pid == 0: os._exit(0)
        if pid > 0: print('ESCAPED clone')
        a = ctypes.create_string_buffer(struct.pack('8Q', 0x10000000, 0, 0, 0, 17, 0, 0, 0), 64)
        pid = libc.syscall(*map(ctypes.c_long, (435, ctypes.addressof(a), 64)))
        if pid == 0: os._exit(0)
        if pid > 0: print('ESCAPED clone3')
        """,
    ),
    "other_namespaces": Case(
        """
        for kind in ('user', 'mnt', 'net', 'pid'):
            for pid in (1, CALLER):
                try: calls(268 if ARM else 308, os.open(f'/proc/{pid}/ns/{kind}', os.O_RDONLY), 0)
                except OSError: pass
        """,
        control=False,
    ),
    "become_root": Case(
        """
        for action in (lambda: os.setuid(0), lambda: os.setresuid(0, 0, 0), lambda: os.setgid(0),
                       lambda: os.setgroups([0])):
            tries(action)
        print('ESCAPED' if 0 in (*os.getresuid(), *os.getresgid()) else '')
        header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        assert libc.capget(header, sets) == 0
        print('ESCAPED with capabilities' if any((sets[0], sets[1], sets[3], sets[4])) else '')
        """,
        control=False,
    ),
    "kernel_interfaces": Case(
        """
        b = ctypes.create_string_buffer(256); a = ctypes.addressof(b)
        k = ctypes.create_string_buffer(b'user'); d = ctypes.create_string_buffer(b'renio')
        for number in ((280 if ARM else 321, 0, a, 128), (241 if ARM else 298, a, 0, -1, -1, 0),
                       (282 if ARM else 323, 1),
                       (425, 4, a), (217 if ARM else 248, ctypes.addressof(k), ctypes.addressof(d), a, 8, -3),
                       (219 if ARM else 250, 0, -3, 0), (447, 0), (438, 0, 0, 0), (750, 0),
                       (92 if ARM else 135, 0x40000),
                       (272 if ARM else 312, os.getpid(), os.getppid(), 0, 0, 0)): calls(*number)
        """,
        control=False,
    ),
    "write_to_the_kernel": Case(
        """
        for path in ('/proc/sys/kernel/hostname', '/proc/sys/kernel/core_pattern',
                     '/proc/sysrq-trigger', '/proc/self/mem',
                     '/sys/kernel/mm/transparent_hugepage/enabled', '/proc/self/oom_score_adj', '/proc/self/uid_map',
                     '/dev/mem',
                     '/dev/kmsg', '/dev/tty', '/dev/vda', '/dev/sda'):
            tries(lambda: os.close(os.open(path, os.O_WRONLY)))
        """,
        control=False,
    ),
    "shared_memory": Case(
        """
        path = f'/dev/shm/{TOKEN}-{NAME}'
        try: write(path)
        except OSError: pass
        calls(194 if ARM else 29, KEY, 4096, 0o1666); calls(186 if ARM else 68, KEY, 0o1666)
        calls(190 if ARM else 64, KEY, 1, 0o1666)
        n = ctypes.create_string_buffer(f'{TOKEN}-{NAME}'.encode())
        calls(180 if ARM else 240, ctypes.addressof(n), 0o102, 0o666, 0)
        libc.shmctl(libc.shmget(KEY, 0, 0), 0, None); libc.msgctl(libc.msgget(KEY, 0), 0, None)
        libc.semctl(libc.semget(KEY, 0, 0), 0, 0); libc.syscall(ctypes.c_long(181 if ARM else 241), n)
        """,
    ),
    "other_call_tables": Case(
        """
        if not ARM: libc.syscall(ctypes.c_long(0x40000000 | 39))
        else: os.kill(os.getpid(), signal.SIGSYS)
        """,
        control=False,
        outcome={"exit_code": -31},
        inside="",
    ),
}
