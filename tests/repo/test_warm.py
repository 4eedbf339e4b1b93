"""A warm process is seen, ended and answered as one of a fresh interpreter is, and knows nothing of the others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.helpers import warm
from tests.helpers.jobs import descendants

pytestmark = [
    pytest.mark.timeout(200),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="nothing is warm on other systems"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's driver does not survive a fork: nothing is warm"),
]

ENDS = {
    "returns": "print('out'); import sys; print('err', file=sys.stderr)",
    "exits": "import sys; sys.stdout.write('cut off'); sys.exit(7)",
    "exits with words": "import sys; sys.exit('what was wrong')",
    "exits at once": "import os; print('never written'); os._exit(9)",
    "is killed": "import os; os.kill(os.getpid(), 9)",
    "is asked to end": "import os; os.kill(os.getpid(), 15)",
    "handles that": "import os, signal; signal.signal(15, lambda *_: print('heard')); os.kill(os.getpid(), 15)",
    "is interrupted": "import os; import signal as s; s.signal(2, s.default_int_handler); os.kill(os.getpid(), 2)",
    "writes at its end": "import atexit; atexit.register(print, 'last'); print('first')",
    "has a thread": "import threading, time; threading.Thread(target=lambda: (time.sleep(.2), print('done'))).start()",
}


@pytest.mark.parametrize("program", ENDS.values(), ids=ENDS)
def test_it_ends_as_a_fresh_one_does(program: str) -> None:
    command = [sys.executable, "-c", program]
    for unbuffered in ("", "1"):
        environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
        fresh = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
        found = warm.run(command, env=environment, timeout=100)
        assert (found.returncode, found.stdout) == (fresh.returncode, fresh.stdout)
        assert found.stderr.splitlines()[-1:] == fresh.stderr.splitlines()[-1:]


def test_an_error_has_its_traceback(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text("import sys\nprint(sys.argv, __name__)\nraise ZeroDivisionError('a bug')\n")
    done = warm.run([sys.executable, "program.py", "a", "-b"], cwd=tmp_path, timeout=100)
    assert (done.returncode, done.stdout) == (1, "['program.py', 'a', '-b'] __main__\n")
    assert 'program.py", line 3, in <module>' in done.stderr
    assert done.stderr.endswith("ZeroDivisionError: a bug\n")


SAYS = """
import os, random, sys
before = [name for name in sys.modules if name.startswith("renio_megatron")]
import numpy, torch, megatron.core, renio_megatron
print(os.getcwd(), os.environ.get("ONLY_HERE"), torch.get_num_threads(), before, torch.cuda.synchronize.__module__,
      sys.path[0], os.getsid(0) == os.getpid(), sys.stdout.line_buffering)
print(random.random(), numpy.random.rand())
"""


def test_it_has_its_own_place_and_nobody_elses_state(tmp_path: Path) -> None:
    drawn = set()
    for name, threads in (("first", 2), ("second", 1)):
        (tmp_path / name).mkdir()
        environment = {**os.environ, "ONLY_HERE": name, "OMP_NUM_THREADS": str(threads)}
        with warm.Popen(
            [sys.executable, "-c", SAYS],
            cwd=tmp_path / name,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as process:
            said, numbers = process.communicate(timeout=100)[0].splitlines()
        assert said == f"{tmp_path / name} {name} {threads} [] torch.cuda  True False"
        drawn |= set(numbers.split())
    assert len(drawn) == 4, "each draws its own random numbers"
    assert "ONLY_HERE" not in os.environ


def test_what_its_path_brings_at_the_start_is_run(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys, types\nsys.modules['put_there'] = types.ModuleType('x')\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    assert warm.run([sys.executable, "-c", "import put_there"], env=environment, timeout=100).returncode == 0
    assert warm.run([sys.executable, "-c", "import put_there"], timeout=100).returncode == 1, "and only there"


PARENT = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", CHILD, "word"], env={**os.environ, "RANK": "3"})
print(child.wait(), flush=True)
"""
CHILD = "import os, sys; print(os.getppid(), os.environ['RANK'], sys.argv[1], flush=True); sys.exit(5)"


def test_its_programs_are_its_own_children() -> None:
    with warm.Popen(
        [sys.executable, "-c", PARENT.replace("CHILD", repr(CHILD))], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.communicate(timeout=100)[0] == f"{process.pid} 3 word\n5\n"


TIDY = """
import os, subprocess, sys, tempfile
with tempfile.TemporaryDirectory() as name:
    assert subprocess.run([sys.executable, "-c", "import renio_megatron"]).returncode == 0
    print(os.path.isdir(name))
"""


def test_the_end_of_a_child_tidies_nothing_of_its_parents() -> None:
    assert warm.run([sys.executable, "-c", TIDY], timeout=100).stdout == "True\n"


# Short sleeps: a signal just before one long sleep would be heard when that is over.
SLEEPS = "import time; print('here', flush=True); [time.sleep(0.1) for _ in range(6000)]"


def test_it_is_ended_by_signals_and_by_the_end_of_whoever_asked() -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with warm.Popen([sys.executable, "-c", SLEEPS], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None and process.stdout.readline() == "here\n"
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(timeout=0.1)
            assert process.poll() is None
            process.send_signal(number)
            assert process.wait(timeout=60) == -number
    with warm.Popen([sys.executable, "-c", SLEEPS], stdout=subprocess.PIPE, text=True) as process:
        assert process._connection is not None
        process._connection.close()
        end = time.monotonic() + 60
        while Path(f"/proc/{process.pid}").exists():
            assert time.monotonic() < end
            time.sleep(0.01)
        process.returncode = -signal.SIGKILL


def test_scripts_have_it_by_a_program(tmp_path: Path) -> None:
    python = str(warm.interpreter(tmp_path))
    done = subprocess.run(
        ["sh", "-c", f"cd / && '{python}' -c \"import os, sys; print(os.getcwd(), sys.argv[1]); sys.exit(4)\" word"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (4, "/ word\n", "")
    asked = "print('flags', __import__('sys').flags.isolated)"
    assert subprocess.run([python, "-I", "-c", asked], capture_output=True, text=True).stdout == "flags 1\n"
    heard = f"import signal, sys; signal.signal(15, lambda *_: sys.exit(6)); {SLEEPS}"
    for program, number, code in ((heard, signal.SIGTERM, 6), (SLEEPS, signal.SIGKILL, -9)):
        with subprocess.Popen([python, "-c", program], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None and process.stdout.readline() == "here\n"
            process.send_signal(number)
            assert process.wait(timeout=60) == code
            assert process.stdout.read() == "", "the process that had the output is gone"


def test_the_server_has_one_thread_and_is_a_child_of_this_process() -> None:
    warm.run([sys.executable, "-c", ""], timeout=100)
    servers = [
        pid
        for pid in descendants(os.getpid())
        if b"tests.helpers.warm_server" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    assert len(servers) >= 1
    for pid in servers:
        assert len(list(Path(f"/proc/{pid}/task").iterdir())) == 1
