"""Programs that mean no harm: what they are given, what becomes of them, and what the caller notices of it."""

from __future__ import annotations

import concurrent.futures
import contextlib
import importlib.util
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from renio_megatron.errors import ConfigError
from renio_megatron.evaluation import sandbox as sandboxes
from renio_megatron.evaluation.sandbox import SANDBOXES, Limits, Outcome, SandboxError, cleanup, probe, seccomp
from tests.helpers.paths import ROOT


@pytest.fixture(params=SANDBOXES)
def sandbox(request, monkeypatch, tmp_path_factory):
    """Each back end; its temporary files are in a folder that is empty afterwards."""
    if (problem := sandboxes.sandbox_problem(request.param)) is not None:
        pytest.skip(problem)
    with tempfile.TemporaryDirectory(prefix="renio-test-") as folder:
        Path(folder).chmod(0o1777)  # pytest's own is closed to others
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield SANDBOXES[request.param]
        assert not list(Path(folder).iterdir())


def test_a_program_reads_and_writes(sandbox):
    source = (
        "import os, sys\n"
        "data = sys.stdin.buffer.read()\n"
        "print(len(data), data[:3])\n"
        "print('problem \\u00e4', file=sys.stderr)\n"
        "os.write(3, b'7')\n"
        "open('notes', 'w').write('x'); print(open('notes').read(), sorted(os.listdir()), __name__, sys.argv)\n"
        "exit(5)\n"
    )
    outcome = sandbox.run(source, b"abc" * 1_000_000)
    lines = outcome.stdout.decode().splitlines()
    assert lines[0] == "3000000 b'abc'"
    # An interpreter below /tmp has its place there, too.
    assert lines[1].startswith("x [") and "'notes', 'program.py'" in lines[1] and "] __main__ ['/" in lines[1]
    assert outcome.stderr.decode() == "problem \u00e4\n"
    assert (outcome.exit_code, outcome.stopped, outcome.result) == (5, None, b"7")
    assert 0 < outcome.seconds < 10


@pytest.mark.parametrize(
    ("source", "exit_code", "in_stderr"),
    [
        ("pass", 0, b""),
        ("def f():\n    1 / 0\nf()", 1, b'program.py", line 3, in <module>'),
        ("x = (", 1, b"SyntaxError"),
        ("import os; os.kill(os.getpid(), 15)", -15, b""),
        ("import ctypes; ctypes.string_at(0)", -11, b""),
        ("raise SystemExit('bye')", 1, b"bye\n"),
        ("# " + "x" * 300_000 + "\nraise SystemExit(3)", 3, b""),
        ("print('\ud800')", 1, b"UnicodeEncodeError"),
        ("\0", 1, b"null bytes"),
    ],
    ids=["good", "error", "syntax", "signal", "fault", "exit", "long", "surrogate", "null"],
)
def test_ends(sandbox, source, exit_code, in_stderr):
    outcome = sandbox.run(source, b"not read" * 100_000)
    assert (outcome.exit_code, outcome.stopped) == (exit_code, None)
    assert in_stderr in outcome.stderr
    assert b"<string>" not in outcome.stderr


def test_packages_and_processes_of_its_own(sandbox, monkeypatch):
    monkeypatch.setenv("SECRET", "x")
    source = (
        "import os, subprocess, sys, threading\n"
        "print(sorted(os.environ))\n"
        "print(subprocess.run([sys.executable, '-c', 'print(1 + 1)'], stdout=-1, close_fds=False).stdout)\n"
        "thread = threading.Thread(target=print, args=('thread',)); thread.start(); thread.join()\n"
        "print(os.fork() == 0 or os.wait()[1])\n"
        f"if {importlib.util.find_spec('numpy') is not None}:\n"
        "    import numpy; print(numpy.arange(6).reshape(2, 3) @ numpy.ones(3))\n"
    )
    outcome = sandbox.run(source, limits=Limits(wall_s=60, cpu_s=60))
    assert outcome.exit_code == 0, outcome.stderr
    lines = outcome.stdout.decode()
    assert "SECRET" not in lines
    assert "b'2\\n'" in lines
    assert "thread" in lines
    assert importlib.util.find_spec("numpy") is None or "[ 3. 12.]" in lines


def test_runs_at_once_do_not_meet(sandbox):
    """Neither in what they write nor in how many processes they may have."""
    if sandbox.name == "unsafe":
        pytest.skip("it does not limit processes")
    source = (
        "import os, sys, time\n"
        "for _ in range(13):\n"
        "    if os.fork() == 0: time.sleep(30)\n"
        "print(sys.stdin.read()); time.sleep(0.5)\n"
    )
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        runs = pool.map(lambda n: sandbox.run(source, str(n).encode(), Limits(processes=15, wall_s=60)), range(6))
        outcomes = list(runs)
    assert [outcome.stdout for outcome in outcomes] == [f"{n}\n".encode() for n in range(6)]
    assert [outcome.exit_code for outcome in outcomes] == [0] * 6


def test_the_caller_notices_nothing(sandbox):
    """Its descriptors, timers and signal handlers stay as they are."""
    heard: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: heard.append(number))
    signal.setitimer(signal.ITIMER_REAL, 1000)
    handlers = [signal.getsignal(number) for number in range(1, 32)]
    try:
        sandbox.run("pass")
        descriptors = {path.name for path in Path("/proc/self/fd").iterdir()}
        for number in range(10):
            sandbox.run("import os; os.closerange(0, 4); 1 / 0" if number % 2 else "print(1)")
        assert {path.name for path in Path("/proc/self/fd").iterdir()} == descriptors
        assert [signal.getsignal(number) for number in range(1, 32)] == handlers
        assert 900 < signal.getitimer(signal.ITIMER_REAL)[0] < 1000
        assert not heard
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def named(token: str) -> list[int]:
    """Processes that have given themselves a name."""
    found = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if folder.name.isdigit() and (folder / "comm").read_text().strip() == token:
                found.append(int(folder.name))
    return found


def until(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about in time"
        time.sleep(0.05)


def test_it_dies_with_its_caller(sandbox):
    token, folder = f"rd{os.getpid()}", tempfile.gettempdir()
    program = (
        f"import ctypes, os, time\nctypes.CDLL(None).prctl(15, b'{token}')\n"
        "if os.fork() == 0:\n    os.setsid()\n    os.fork()\n"
        "time.sleep(1000)"
    )
    call = f"SANDBOXES[{sandbox.name!r}].run({program!r}, limits=Limits(wall_s=900))"
    command = [sys.executable, "-c", f"from renio_megatron.evaluation.sandbox import *\n{call}"]
    caller = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": folder}, cwd=ROOT)
    try:
        until(lambda: len(named(token)) == 3)
    finally:
        caller.kill()
        caller.wait()
    until(lambda: not named(token) and not list(Path(folder).iterdir()))


def test_an_interrupt_in_the_caller_ends_the_program(sandbox):
    token = f"ri{os.getpid()}"
    program = f"import ctypes, time; ctypes.CDLL(None).prctl(15, b'{token}'); time.sleep(99)"
    call = (
        "import signal, threading, os\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's `&` has it ignored
        "threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        f"SANDBOXES[{sandbox.name!r}].run({program!r}, limits=Limits(wall_s=99))"
    )
    command = [sys.executable, "-c", f"from renio_megatron.evaluation.sandbox import *\n{call}"]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert "KeyboardInterrupt" in done.stderr
    assert not named(token)


def test_importing_it_imports_no_torch():
    code = "import sys, renio_megatron.evaluation.sandbox; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "False\n"


class Broken:
    name = "namespaces"

    def __init__(self, outcome: Outcome | SandboxError) -> None:
        self.outcome = outcome

    def run(self, source: str, stdin: bytes = b"", limits: Limits | None = None) -> Outcome:
        if isinstance(self.outcome, SandboxError):
            raise self.outcome
        return self.outcome


@pytest.mark.parametrize(
    ("outcome", "message"),
    [
        (SandboxError("unshare(CLONE_NEWUSER): Operation not permitted"), "CLONE_NEWUSER"),
        (Outcome(1, None, b"", b"no libpython", b"", 0.1), r"did not run \(exit code 1\): no libpython"),
        (Outcome(None, "time", b"", b"", b"", 60.0), r"did not run \(time\)"),
        (Outcome(0, None, b"", b"", b"ran,make an internet socket", 0.1), "could make an internet socket"),
    ],
)
def test_a_back_end_that_does_not_work_is_not_used(monkeypatch, outcome, message):
    monkeypatch.setattr(probe, "_problems", {})
    monkeypatch.setitem(SANDBOXES, "namespaces", Broken(outcome))
    assert re.search(message, sandboxes.sandbox_problem("namespaces") or "")
    with pytest.raises(ConfigError, match=f"Tried 'namespaces': .*{message}.*data.grader=none"):
        sandboxes.open_sandbox("namespaces")
    other = Broken(SandboxError("Landlock: Function not implemented"))
    other.name = "landlock"
    monkeypatch.setitem(SANDBOXES, "landlock", other)
    with pytest.raises(ConfigError, match=r"'namespaces': .*'landlock': Landlock: Function not implemented.*unsafe"):
        sandboxes.open_sandbox(None)


def test_names():
    with pytest.raises(ConfigError, match="no sandbox 'docker'; there are namespaces, landlock, unsafe"):
        sandboxes.open_sandbox("docker")
    with pytest.raises(ConfigError, match="limit wall_s must be above 0 and finite; got 0"):
        Limits(wall_s=0)
    working = [name for name in ("namespaces", "landlock") if sandboxes.sandbox_problem(name) is None]
    if working:
        assert sandboxes.open_sandbox(None).name == working[0]


def test_an_interpreter_that_is_not_there_is_said(monkeypatch):
    monkeypatch.setattr(sandboxes.launch.libraries, "interpreter", lambda: (Path("/nowhere/python"), Path("/nowhere")))
    for name in ("namespaces", "landlock", "unsafe"):
        if sandboxes.sandbox_problem(name) is None:
            with pytest.raises(SandboxError, match=f"sandbox '{name}': .*No such file"):
                SANDBOXES[name].run("pass")


def test_a_hostile_directory_is_removed(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").touch()
    directory = tmp_path / "inside"
    directory.mkdir()
    (directory / "link").symlink_to(outside)
    (directory / "a" / "b").mkdir(parents=True)
    (directory / "a" / "b" / "link").symlink_to(outside)
    (directory / "a" / "file").write_bytes(b"x" * 8192)
    assert 8192 <= cleanup.disk_bytes(str(directory), 10) < 65536
    assert cleanup.disk_bytes(str(directory), 4) == float("inf")
    (directory / "a" / "b").chmod(0)
    (directory / "a").chmod(0)
    cleanup.remove_directory(str(directory))
    assert not directory.exists()
    assert (outside / "kept").exists()


@pytest.mark.parametrize(
    ("header", "column"),
    [("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", 0), ("/usr/include/asm-generic/unistd.h", 1)],
    ids=["x86_64", "aarch64"],
)
def test_system_call_numbers(header, column):
    if not Path(header).is_file():
        pytest.skip(f"{header} is not installed")
    numbers = dict(re.findall(r"#define __NR(?:3264)?_(\w+) (\d+)", Path(header).read_text()))
    aliases = {"newfstatat": "fstatat"}
    ours = {name: pair[column] for name, pair in seccomp.NUMBERS.items() if pair[column] is not None}
    known = {name: int(numbers[name]) for name in ours if aliases.get(name, name) in numbers}
    assert {name: ours[name] for name in known} == known
    assert len(known) > 90


def test_both_architectures_have_a_filter():
    for machine in ("x86_64", "aarch64"):
        for abi in (None, 1, 7):
            program = seccomp.assemble(seccomp.rules(landlock_abi=abi, shared_uid=True, notify=True, pid=9), machine)
            assert len(program) % 8 == 0
            assert len(program) // 8 < 4096
    assert (seccomp.unsupported_machine() is None) == (platform.machine() in ("x86_64", "aarch64"))


@pytest.mark.parametrize(
    "state",
    [
        "os.closerange(0, 3)",
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))",
        "kept = [os.open('/dev/null', 0) for _ in range(1100)]",
    ],
    ids=["no standard descriptors", "few descriptors", "many descriptors"],
)
def test_callers_in_odd_states(state):
    code = (
        "import os, resource\n"
        "from renio_megatron.evaluation.sandbox import SANDBOXES, sandbox_problem\n"
        "hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))\n"
        f"working = [SANDBOXES[name] for name in SANDBOXES if not sandbox_problem(name)]\n{state}\n"
        "program = 'import os, sys; os.write(3, sys.stdin.buffer.read()); print(5)'\n"
        "for sandbox in working:\n"
        "    outcome = sandbox.run(program, b'in')\n"
        "    if (outcome.exit_code, outcome.stdout, outcome.result) != (0, b'5\\n', b'in'): os._exit(1)\n"
        "os._exit(0)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, timeout=120).returncode == 0
