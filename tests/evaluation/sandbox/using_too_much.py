"""Programs that take too much, or do not want to end."""

from __future__ import annotations

from tests.evaluation.sandbox.case import Case

CASES = {
    "orphans_that_fork_on": Case(
        """
        def flee():
            end = time.time() + 4
            while time.time() < end:
                try:
                    if os.fork(): os._exit(0)
                    os.setsid()
                except OSError: pass
        for _ in range(3):
            if os.fork() == 0:
                flee()
                os._exit(0)
        time.sleep(0.2)
        """,
        control=False,
    ),
    "many_processes": Case(
        """
        children = 0
        try:
            while children < 60:
                if os.fork() == 0:
                    time.sleep(1.5); os._exit(0)
                children += 1
        except OSError: pass
        print('ESCAPED' if children > 20 else children)
        assert children > 10, children
        """,
        limits={"processes": 20},
    ),
    "many_threads": Case(
        """
        import threading
        children = 0
        try:
            while children < 60:
                threading.Thread(target=time.sleep, args=(1,), daemon=True).start()
                children += 1
        except RuntimeError: pass
        print('ESCAPED' if children > 20 else children)
        assert children > 10, children
        """,
        limits={"processes": 20},
    ),
    "fork_bomb": Case(
        """
        while True:
            try: os.fork()
            except OSError: pass
        """,
        control=False,
        limits={"wall_s": 1.5},
        outcome={"stopped": "time", "exit_code": None},
        dangerous=True,
        inside="",
    ),
    "endless_output": Case(
        "while True: os.write(1, b'x' * 65536)",
        control=False,
        limits={"output_bytes": 100000},
        outcome={
            "stopped": "output",
            "stdout": b"x" * 100_000,
        },
        inside="",
    ),
    "endless_errors": Case(
        "while True: os.write(2, b'x' * 65536)",
        control=False,
        limits={"output_bytes": 100000},
        outcome={
            "stopped": "output",
            "stderr": b"x" * 100_000,
        },
        inside="",
    ),
    "endless_result": Case(
        "while True: os.write(3, b'x' * 65536)",
        control=False,
        limits={"output_bytes": 100000},
        outcome={
            "stopped": "output",
            "result": b"x" * 100_000,
        },
        inside="",
    ),
    "memory": Case(
        """
        try: bytearray(2 << 30)
        except MemoryError: pass
        else: print('ESCAPED')
        """,
        limits={"memory_bytes": 1073741824},
    ),
    "memory_together": Case(
        """
        for _ in range(8):
            if os.fork() == 0:
                kept = bytearray(b'x') * (64 << 20)
                time.sleep(9)
        time.sleep(9)
        """,
        control=False,
        limits={"memory_bytes": 268435456},
        outcome={"stopped": "memory"},
        inside="",
    ),
    "shared_memory_together": Case(
        """
        for _ in range(8):
            if os.fork() == 0:
                kept = mmap.mmap(-1, 64 << 20); kept.write(b'x' * (64 << 20))
                time.sleep(9)
        time.sleep(9)
        """,
        control=False,
        limits={"memory_bytes": 268435456},
        outcome={"stopped": "memory"},
        inside="",
    ),
    "memory_files": Case(
        "tries(lambda: os.memfd_create('x'))",
    ),
    "large_file": Case(
        """
        with open('large', 'wb') as stream:
            try:
                for _ in range(64): stream.write(bytes(1 << 18)); stream.flush()
            except OSError: pass
            print('ESCAPED' if os.stat('large').st_size > 8 << 20 else 'small', flush=True)
        os._exit(0)
        """,
        limits={"file_bytes": 8388608},
        inside="small",
    ),
    "many_files": Case(
        """
        for number in range(24):
            with open(str(number), 'wb') as stream: stream.write(b'x' * (4 << 20))
        time.sleep(1)
        print('ESCAPED')
        """,
        limits={"disk_bytes": 16777216},
        inside="",
    ),
    "many_deleted_files": Case(
        """
        kept = []
        for number in range(24):
            kept.append(os.open('file', os.O_RDWR | os.O_CREAT))
            os.unlink('file')
            while os.fstat(kept[-1]).st_size < 4 << 20: os.write(kept[-1], b'x' * (1 << 20))
        time.sleep(1)
        print('ESCAPED')
        """,
        limits={"disk_bytes": 16 << 20},
        inside="",
    ),
    "many_empty_files": Case(
        """
        for number in range(8_000):
            open(f'{number:060}', 'wb').close()
        time.sleep(1)
        print('ESCAPED')
        """,
        control=False,
        limits={"disk_bytes": 16777216, "wall_s": 30},
        inside="",
    ),
    "deep_directories": Case(
        """
        for number in range(5000):
            os.mkdir('d'); os.chdir('d')
        os.mkdir('closed'); open('closed/file', 'w').close(); os.chmod('closed', 0)
        """,
        control=False,
        limits={"wall_s": 30},
    ),
    "closed_directories": Case(
        """
        os.makedirs('a/b/c'); open('a/b/c/d', 'w').close()
        for name in ('a/b/c', 'a/b', 'a'): os.chmod(name, 0)
        try: os.chmod('.', 0)
        except OSError: pass
        """,
        control=False,
    ),
    "raise_limits": Case(
        """
        for kind in (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE):
            tries(lambda: resource.setrlimit(kind, (resource.getrlimit(kind)[0], resource.getrlimit(kind)[1] + 4096)))
            hard = resource.getrlimit(kind)[1]
            if hard == resource.RLIM_INFINITY: print('ESCAPED', kind)
        """,
    ),
    "core_dump": Case(
        """
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        print('ESCAPED' if resource.getrlimit(resource.RLIMIT_CORE) != (1, 1) else '')
        print('DONE', flush=True)
        libc.abort()
        """,
        control=False,
        outcome={"exit_code": -6},
    ),
    "without_descriptors": Case(
        "os.closerange(0, 4); os._exit(7)",
        control=False,
        outcome={"exit_code": 7},
        inside="",
    ),
    "endless_loop": Case(
        "while True: pass",
        control=False,
        limits={"wall_s": 0.5},
        outcome={"stopped": "time"},
        inside="",
    ),
    "deaf_loop": Case(
        """
        signal.signal(signal.SIGXCPU, signal.SIG_IGN); signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True: pass
        """,
        control=False,
        limits={"cpu_s": 1, "wall_s": 120},  # of which a busy machine may give it few
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
