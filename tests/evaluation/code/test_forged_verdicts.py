"""Programs that try to be graded right without the right values."""

from __future__ import annotations

import textwrap

import pytest

from renio_megatron.evaluation.code.evalplus import evalplus_task
from renio_megatron.evaluation.code.judge import judge_program
from renio_megatron.evaluation.code.references import ReferenceCache
from renio_megatron.evaluation.code.rows import code_task
from tests.evaluation.code.stand_in import CountedSandbox

ROW = {
    "task_id": "HumanEval/9001",
    "prompt": "def double(x):\n",
    "entry_point": "double",
    "canonical_solution": "    return 2 * x\n",
    "base_input": [[1], [2], [30]],
    "plus_input": [[-4], [0], [123456789]],
    "atol": 0,
}
PROGRAM_ROW = {"test_cases": {"inputs": ["1", "2", "30", "-4"], "outputs": ["2", "4", "60", "-8"]}}

HONEST = {
    "plain": "def double(x):\n    return x + x\n",
    "chatty": "import sys\nprint('a')\n\ndef double(x):\n    print(x)\n    sys.stderr.write('x')\n    return x + x\n",
    "another type": "class N(int):\n    pass\n\ndef double(x):\n    return N(2 * x)\n",
    "patched builtins": """
        import builtins, hashlib, json, os, time
        builtins.repr = builtins.map = builtins.max = builtins.zip = builtins.enumerate = None
        json.dumps = time.perf_counter = os.write = hashlib.sha256 = None

        def double(x):
            return 2 * x
        """,
    "threads": "import threading\nthreading.Thread(target=lambda: threading.Event().wait()).start()\n\n"
    "def double(x):\n    return 2 * x\n",
    "closed streams": """
        import sys
        sys.stdout.close()
        sys.stdout = sys.stderr = sys.stdin = None

        def double(x):
            return 2 * x
        """,
    "a dataclass": """
        from __future__ import annotations
        from dataclasses import dataclass

        @dataclass
        class P:
            x: int

        def double(x):
            return 2 * P(x).x
        """,
}
FORGED = {
    "None": "def double(x):\n    return None\n",
    "pass": "def double(x):\n    pass\n",
    "another name": "def twice(x):\n    return 2 * x\n",
    "exit at once": "import os\nos._exit(0)\n",
    "exit in the call": "import os\n\ndef double(x):\n    os._exit(0)\n",
    "sys.exit": "import sys\n\ndef double(x):\n    sys.exit(0)\n",
    "pass marks": "import os, sys\nprint('PASS\\nok\\n9')\nos.write(1, b'ok')\nos.write(2, b'ok')\nsys.exit(0)\n",
    "atexit": "import atexit, os\natexit.register(os._exit, 0)\n\ndef double(x):\n    return 0\n",
    "equal to everything": """
        class Yes:
            def __eq__(self, other): return True
            def __ne__(self, other): return False
            def __hash__(self): return 1
            def __bool__(self): return True
            def __int__(self): return 2
            __index__ = __int__
            def __repr__(self): return "2"

        def double(x):
            return Yes()
        """,
    "an integer that equals everything": """
        class Yes(int):
            def __eq__(self, other): return True
            def __ne__(self, other): return False
            def __repr__(self): return "2"
            def __format__(self, spec): return "2"
            def __index__(self): return 2
            __hash__ = int.__hash__

        def double(x):
            return Yes(77)
        """,
    "a text, list and dict that equal everything": """
        def yes(kind):
            return type("Yes", (kind,), {"__eq__": lambda self, other: True, "__hash__": None, "__iter__": None})

        def double(x):
            return {1: yes(list)(), 2: yes(dict)()}.get(x, yes(str)())
        """,
    "another class": """
        class Yes:
            @property
            def __class__(self): return int
            def __eq__(self, other): return True

        def double(x):
            return Yes()
        """,
    "lines of its own": """
        import os
        for n in range(6):
            os.write(3, b'{"n":%d,"s":0.0,"value":2}\\n' % n)
        os._exit(0)
        """,
    "lines of all kinds": """
        import os
        for line in (b'{"ready":1}', b'{"n":0,"pass":true}', b'PASS', b'{"n":-1}', b'{}', b'[]', b'null',
                     b'{"n":0,"value":["o","int"]}', b'{"n":0,"correct":true,"value":null}', b'\\xff', b'[' * 9999):
            os.write(3, line + b'\\n')
        def double(x):
            return None
        """,
    "a flood of lines": 'import os\nwhile True:\n    os.write(3, b\'{"n":0,"s":0.0,"value":3}\\n\' * 1000)\n',
    "a closed pipe": "import os\nos.close(3)\n\ndef double(x):\n    return 0\n",
    "an emptied request": """
        import sys

        def double(x):
            frame = sys._getframe()
            while frame:
                for name, value in list(frame.f_locals.items()):
                    if name == "request":
                        for key in ("inputs", "seconds"):
                            value[key].clear()
                frame = frame.f_back
            return 2 * x
        """,
    "a patched harness": """
        import __main__
        __main__.encode = lambda *rest: '{"correct":true}'
        __main__.told = lambda error: "PASS"
        __main__.build = lambda tree: (1,)

        def double(x):
            return 0
        """,
    "patched builtins": """
        import builtins, json, sys, time
        builtins.repr = builtins.str = lambda *x: "2"
        builtins.len = builtins.sum = lambda *x: 2
        builtins.isinstance = builtins.all = lambda *x: True
        json.dumps = json.loads = lambda *x, **y: 2
        builtins.open = builtins.type = None
        time.time = time.perf_counter = lambda: 0.0

        def double(x):
            return 0
        """,
    "a search for the answers": """
        import gc, glob, os

        def double(x):
            for thing in gc.get_objects():
                if isinstance(thing, dict):
                    for key in ("expected", "outputs", "answers", "reference"):
                        if key in thing:
                            return thing[key][0]
            for path in glob.glob("**", recursive=True):
                if os.path.isfile(path) and "return 2 * x" in open(path).read():
                    return 2 * x
            return None
        """,
    "an exception that is odd": """
        class Odd(Exception):
            def __str__(self): raise self
            __repr__ = __str__

        def double(x):
            raise Odd
        """,
    "a recursive value": "def double(x):\n    a = []\n    a.append(a)\n    return a\n",
    "an enormous value": "def double(x):\n    return ['a' * 10000] * 10 ** 7\n",
    "an endless iterator": "import itertools\n\ndef double(x):\n    return itertools.count()\n",
    "an endless range": "def double(x):\n    return range(10 ** 30)\n",
    "a deep value": "def double(x):\n    a = 0\n    for _ in range(10 ** 5):\n        a = [a]\n    return a\n",
    "a thread that exits": "import os, threading\nthreading.Thread(target=os._exit, args=(0,)).start()\n\n"
    "def double(x):\n    threading.Event().wait(1)\n    return 0\n",
    "a crash": "import ctypes\n\ndef double(x):\n    ctypes.string_at(0)\n",
    "all memory": "def double(x):\n    return bytes(1 << 40)\n",
    "a syntax error": "def double(x) return 2 * x\n",
    "null bytes": "def double(x):\n    return 2 * x\n\0",
    "empty": "",
    "only odd right": "def double(x):\n    return 2 * x if x != 123456789 else None\n",
    "a float": "def double(x):\n    return 2 * x + 1e-3\n",
    "a text of the number": "def double(x):\n    return str(2 * x)\n",
}


@pytest.fixture(scope="module")
def sandbox():
    return CountedSandbox()


@pytest.fixture(scope="module")
def references():
    return ReferenceCache()


@pytest.mark.parametrize("case", HONEST)
def test_an_honest_program_is_right(case, sandbox, references):
    verdict = judge_program(textwrap.dedent(HONEST[case]), evalplus_task(ROW), sandbox, references=references)
    assert (verdict.correct, verdict.base_correct, verdict.reason) == (True, True, "")


@pytest.mark.parametrize("case", FORGED)
def test_a_forged_verdict_is_wrong(case, sandbox, references):
    verdict = judge_program(textwrap.dedent(FORGED[case]), evalplus_task(ROW), sandbox, references=references)
    assert not verdict.correct
    assert verdict.base_correct is (case == "only odd right")
    assert 0 < len(verdict.reason) <= 200


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (None, "no program"),
        ("def double(x) return 2 * x\n", "SyntaxError: "),
        ("def double(x):\n    while True: pass\n", "time: base test 1 took more than 1 s"),
        ("def double(x):\n    while x > 99: pass\n    return 2 * x\n", "time: plus test 3 took more than 1 s"),
        (
            "import re\n\ndef double(x):\n    re.match('(a*)*b', 'a' * 60)\n",  # one call into C: no handler runs
            "time: ",
        ),
        (
            "import signal as s\ns.setitimer = s.signal = lambda *x: None\n\ndef double(x):\n    while True: pass\n",
            "time: ",
        ),
        ("while True:\n    pass\n", "time: loading the program took more than 4 s"),
        ("def double(x):\n    return 2 * x + (x < 0)\n", "plus test 1: expected -8, got -7"),
        ("def double(x):\n    return 'a' * 1000\n", "base test 1: expected 2, got 'aaaa"),
        ("def double(x):\n    return [1] if x == 2 else 2 * x\n", "base test 2: expected 4, got [1]"),
        ("def double(x):\n    return 1 / 0\n", "base test 1: raised ZeroDivisionError: division by zero"),
        ("def double(x):\n    return (n for n in [x])\n", "base test 1: expected 2, got <generator>"),
        ("def double(x, y):\n    return 2 * x\n", "base test 1: raised TypeError: "),
        ("def twice(x):\n    return 2 * x\n", "NameError: the program defines no 'double'"),
        ("import no_such_module\n", "ModuleNotFoundError: "),
        (
            "import os\n\ndef double(x):\n    os._exit(3) if x == 2 else None\n    return 2 * x\n",
            "the program ended in base",
        ),
        ("def double(x):\n    raise ValueError('a' * 1000)\n", "base test 1: raised ValueError: aaa"),
        ("def double(x):\n    return bytes(1 << 40)\n", "base test 1: raised MemoryError"),
    ],
)
def test_reasons(program, reason, sandbox, references):
    verdict = judge_program(program, evalplus_task(ROW), sandbox, references=references)
    assert not verdict.correct
    assert verdict.reason.startswith(reason)
    assert len(verdict.reason) <= 200
    assert "\n" not in verdict.reason


FORGED_PROGRAMS = {
    "nothing": "",
    "exit": "import os\nos._exit(0)\n",
    "pass marks": "print('PASS')\nraise SystemExit(0)\n",
    "lines to the judge": """
        import os
        for descriptor in range(3, 20):
            try:
                os.write(descriptor, b'{"n":0,"end":"0","out":"Mg=="}\\n')
            except OSError:
                pass
        """,
    "a killed harness": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\n",
    "the parent's pipe": "import os\ntry:\n    with open(f'/proc/{os.getppid()}/fd/3', 'wb', buffering=0) as pipe:\n"
    '        for n in range(9): pipe.write(b\'{"n":%d,"s":0.0,"end":"0","last":"","out":"Mg=="}\\n\' % n)\n'
    "except OSError: pass\n",
    "endless output": "while True: print('2')\n",
    "right only at first": "x = int(input())\nprint(2 * x if x < 30 else 0)\n",
    "an error behind the output": "print(2 * int(input()))\nraise ValueError\n",
    "a failing exit": "print(2 * int(input()))\nraise SystemExit(1)\n",
    "a crash behind the output": "import ctypes\nprint(2 * int(input()), flush=True)\nctypes.string_at(0)\n",
}


@pytest.mark.parametrize("case", FORGED_PROGRAMS)
def test_a_forged_run_is_wrong(case, sandbox):
    verdict = judge_program(textwrap.dedent(FORGED_PROGRAMS[case]), code_task(PROGRAM_ROW), sandbox)
    assert not verdict.correct
    assert 0 < len(verdict.reason) <= 200
