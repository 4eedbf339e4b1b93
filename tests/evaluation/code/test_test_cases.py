"""Tasks with test cases, for whole programs and for functions: rows by hand."""

from __future__ import annotations

import base64
import json
import os
import pickle
import textwrap
import zlib
from dataclasses import replace

import pytest

from renio_megatron.errors import DataError
from renio_megatron.evaluation.code.judge import judge_program
from renio_megatron.evaluation.code.rows import code_task
from tests.evaluation.code.stand_in import CountedSandbox

NUMBERS = [3, 1, 40, 7, 2, 9]
SUMS = {
    "inputs": [f"{len(NUMBERS[:n])}\n{' '.join(map(str, NUMBERS[:n]))}\n" for n in range(1, 7)],
    "outputs": [f"{sum(NUMBERS[:n])}\n" for n in range(1, 7)],
}
PAIRS = {"fn_name": "total", "inputs": [[[1, 2], 3], [[], 0], [[5], -5]], "outputs": [6, 0, 0]}


def packed(cases, pickled=True):
    text = json.dumps(cases)
    return base64.b64encode(zlib.compress(pickle.dumps(text) if pickled else text.encode())).decode()


def livecodebench(kind, cases, private, **changes):
    tests = [{"input": given, "output": expected, "testtype": kind} for given, expected in cases]
    return {
        "question_id": "abc_1",
        "starter_code": "",
        "public_test_cases": json.dumps(tests[:1]),
        "private_test_cases": private(tests[1:]),
        "metadata": json.dumps({"func_name": "total"} if kind == "functional" else {}),
        **changes,
    }


STDIN_CASES = list(zip(SUMS["inputs"], SUMS["outputs"], strict=True))
CALL_CASES = [("[1, 2]\n3", "6"), ("[]\n0", "0"), ("[5]\n-5", "0")]
PROGRAM_ROWS = {
    "object": {"test_cases": SUMS},
    "text": {"test_cases": json.dumps(SUMS)},
    "lists of lines": {"test_cases": {key: [text.splitlines() for text in SUMS[key]] for key in SUMS}},
    "public and private": livecodebench("stdin", STDIN_CASES, json.dumps),
    "packed": livecodebench("stdin", STDIN_CASES, packed),
}
CALL_ROWS = {
    "object": {"test_cases": PAIRS},
    "text": {"test_cases": json.dumps(PAIRS)},
    "wrapped outputs": {"test_cases": {**PAIRS, "outputs": [[6], [0], [0]]}},
    "public and private": livecodebench("functional", CALL_CASES, json.dumps),
    "packed": livecodebench("functional", CALL_CASES, packed),
}
RIGHT_PROGRAMS = {
    "input": "input()\nprint(sum(map(int, input().split())))\n",
    "readline": "import sys\nsys.stdin.readline()\nprint(sum(map(int, sys.stdin.readline().split())))\n",
    "buffer": "import sys\nx = sys.stdin.buffer.read().split()\n"
    "sys.stdout.buffer.write(b'%d' % sum(map(int, x[1:])))\n",
    "iteration": "import sys\nlines = [line for line in sys.stdin]\nprint(sum(map(int, lines[1].split())))\n",
    "open(0)": "print(sum(map(int, open(0).read().split()[1:])))\n",
    "os.read": "import os\nprint(sum(map(int, os.read(0, 9999).split()[1:])))\n",
    "fileinput": "import fileinput\nlines = list(fileinput.input())\nprint(sum(map(int, lines[1].split())))\n",
    "main": "def f():\n    input()\n    print(sum(map(int, input().split())))\n\nif __name__ == '__main__':\n    f()\n",
    "sys.exit": "import sys\ninput()\nprint(sum(map(int, input().split())))\nsys.exit(0)\n",
    "exit": "input()\nprint(sum(map(int, input().split())))\nexit()\n",
    "trailing white space": "input()\nprint(sum(map(int, input().split())), '  \\n\\n')\n",
    "a decimal": "input()\nprint(f'{sum(map(int, input().split())):.3f}')\n",
    "stderr": "import sys\nprint('x' * 100000, file=sys.stderr)\ninput()\nprint(sum(map(int, input().split())))\n",
    "a thread with a deep recursion": """
        import sys, threading
        sys.setrecursionlimit(10 ** 6)
        threading.stack_size(1 << 27)

        def depth(n):
            return 0 if n == 0 else 1 + depth(n - 1)

        def main():
            input()
            print(sum(map(int, input().split())) + depth(50000) - 50000)

        threading.Thread(target=main).start()
        """,
    "a deep recursion": """
        import sys
        sys.setrecursionlimit(10 ** 6)

        def depth(n):
            return 0 if n == 0 else 1 + depth(n - 1)

        input()
        print(sum(map(int, input().split())) + depth(20000) - 20000)
        """,
    "atexit": "import atexit\ninput()\natexit.register(print, sum(map(int, input().split())))\n",
    "its own state": "import builtins\nassert not hasattr(builtins, 'seen')\nbuiltins.seen = 1\ninput()\n"
    "print(sum(map(int, input().split())))\n",
    "the main module": "import sys\nassert __name__ == '__main__' and sys.modules['__main__'].__dict__ is globals()\n"
    "input()\nprint(sum(map(int, input().split())))\n",
    "a child": "import subprocess, sys\ninput()\ntext = input()\nsys.stdout.flush()\n"
    "subprocess.run([sys.executable, '-c', f'print(sum(map(int, {text!r}.split())))'])\n",
}


@pytest.fixture(scope="module")
def sandbox():
    return CountedSandbox()


@pytest.mark.parametrize("row", PROGRAM_ROWS)
def test_programs_of_every_kind_of_row(row, sandbox):
    task = code_task(PROGRAM_ROWS[row])
    assert (task.kind, task.entry_point, task.prompt) == ("programs", None, None)
    assert judge_program(RIGHT_PROGRAMS["input"], task, sandbox).correct
    verdict = judge_program("input()\nprint(sum(map(int, input().split())) % 44)\n", task, sandbox)
    assert (verdict.correct, verdict.base_correct) == (False, None)
    assert verdict.reason.startswith("test 3: expected ")


@pytest.mark.parametrize("program", RIGHT_PROGRAMS)
def test_right_programs(program, sandbox):
    verdict = judge_program(textwrap.dedent(RIGHT_PROGRAMS[program]), code_task({"test_cases": SUMS}), sandbox)
    assert (verdict.correct, verdict.base_correct, verdict.reason) == (True, None, "")


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("print(3)\n", "test 2: expected '4\\n', got '3\\n'"),
        ("print(input(), input(), input())\n", "test 1: exit code 1: EOFError"),
        ("print(1 / 0)\n", "test 1: exit code 1: ZeroDivisionError: division by zero"),
        ("def f(:\n", "SyntaxError: "),
        ("import os\nos.abort()\n", "test 1: exit code -6"),
        ("print('3' * 1000000)\n", "test 1: output: it printed too much"),
        (
            "n = int(input())\nwhile n == 4: pass\nprint(sum(map(int, input().split())))\n",
            "time: test 4 took more",
        ),
        (
            "n = int(input())\nimport time\ntime.sleep(99 * (n == 4))\nprint(sum(map(int, input().split())))\n",
            "time: test",
        ),
        ("import os, time\nif os.fork() == 0: time.sleep(99)\nprint(3)\n", "test 2: expected"),
        ("import os\nos.close(1)\nos.close(2)\nwhile True: pass\n", "time: test 1 took more"),
    ],
)
def test_wrong_programs(program, reason, sandbox):
    task = replace(code_task({"test_cases": SUMS}), test_s=1.0)
    verdict = judge_program(program, task, sandbox)
    assert not verdict.correct
    assert verdict.reason.startswith(reason)
    assert len(verdict.reason) <= 200


def test_long_inputs_and_outputs(sandbox):
    given = "\n".join(["7" * 99] * 140_000)  # 14 MB
    task = code_task({"test_cases": {"inputs": [given, "7"], "outputs": [given, "7"]}})
    copy = "import sys\nwhile text := sys.stdin.read(9999):\n    sys.stdout.write(text)\n"
    assert judge_program(copy, task, sandbox).correct
    assert judge_program("print(input())\n", task, sandbox).reason.startswith("test 1: expected '777")


def test_a_program_that_is_wrong_at_once_is_not_run_through_all_tests(sandbox):
    many = {"inputs": ["1"] * 60, "outputs": ["1"] * 60}
    before = sandbox.runs
    assert not judge_program("print(2)\n", code_task({"test_cases": many}), sandbox).correct
    assert sandbox.runs == before + 1
    assert judge_program("print(input())\n", code_task({"test_cases": many}), sandbox).correct


def test_all_tests_together_have_a_limit(sandbox):
    task = replace(code_task({"test_cases": {"inputs": ["1"] * 20, "outputs": ["1"] * 20}}), test_s=1.0, total_s=0.5)
    verdict = judge_program("import time\ntime.sleep(0.2)\nprint(1)\n", task, sandbox)
    assert not verdict.correct
    assert verdict.reason.startswith("time: ")


CALLS = [
    ("def total(xs, y):\n    return sum(xs) + y\n", True),
    ("class Solution:\n    def total(self, xs: List[int], y: int) -> int:\n        return sum(xs) + y\n", True),
    (
        "class Solution:\n    def __init__(self):\n        self.seen = 0\n    def total(self, xs, y):\n"
        "        self.seen += 1\n        return sum(xs) + y + self.seen - 1\n",
        True,  # each call has an object of its own
    ),
    (
        "class Solution:\n    def total(self, xs, y):\n        xs.append(y)\n        return reduce(add, xs, 0)\n",
        True,
    ),
    ("def total(xs, y):\n    return sum(xs)\n", False),
    ("def total(xs, y):\n    return y and 6 or 0\n", False),
    ("def total(xs, y):\n    return [[6]]\n", False),
    ("def other(xs, y):\n    return sum(xs) + y\n", False),
    ("class Solution:\n    def total(self, xs):\n        return 6\n", False),
]


@pytest.mark.parametrize(
    ("row", "program", "right"),
    [
        (row, program, right)
        for row in CALL_ROWS
        for program, right in (CALLS if row in ("wrapped outputs", "packed") else CALLS[:1])
    ],
)
def test_functions_of_every_kind_of_row(row, program, right, sandbox):
    task = code_task(CALL_ROWS[row])
    assert (task.kind, task.entry_point) == ("calls", "total")
    verdict = judge_program(program, task, sandbox)
    assert verdict.correct is right
    assert verdict.base_correct is None
    assert bool(verdict.reason) is not right


class Evil:
    def __reduce__(self):
        return os.getpid, ()


def pickled(value):
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


TESTS = json.dumps([{"input": "1", "output": "1", "testtype": "stdin"}])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"task_id": "t7", "test_cases": "{"}, "task t7: column 'test_cases' is not JSON"),
        ({"test_cases": "[1]"}, "must hold the lists"),
        ({"test_cases": {"inputs": ["1"]}}, "must hold the lists"),
        ({"test_cases": {"inputs": ["1"], "outputs": []}}, "1 inputs and 0 outputs"),
        ({"test_cases": {"inputs": [], "outputs": []}}, "at least one"),
        ({"test_cases": {"inputs": [{}], "outputs": ["1"]}}, "must be text; got dict"),
        ({"test_cases": {"inputs": [[1]], "outputs": ["1"], "fn_name": "a b"}}, "'fn_name' must be"),
        ({"test_cases": {"inputs": [1], "outputs": ["1"], "fn_name": "f"}}, "must be a list; got int"),
        ({"question_id": "q", "public_test_cases": TESTS}, "task q: column 'private_test_cases' is missing"),
        ({"public_test_cases": TESTS, "private_test_cases": "?"}, "cannot be read"),
        ({"public_test_cases": TESTS, "private_test_cases": pickled(Evil())}, "it is a pickle with"),
        ({"public_test_cases": TESTS, "private_test_cases": pickled(["a"])}, "it is a pickle with"),
        ({"public_test_cases": TESTS, "private_test_cases": pickled(1)}, "it is a pickle with"),
        ({"public_test_cases": TESTS, "private_test_cases": pickled("no")}, "is not JSON"),
        ({"public_test_cases": TESTS, "private_test_cases": packed([], pickled=False)}, "cannot be read"),
        ({"public_test_cases": TESTS, "private_test_cases": pickled("[]")[:-8]}, "cannot be read"),
        ({"public_test_cases": "{}", "private_test_cases": "[]"}, "cannot be read"),
        ({"public_test_cases": "[{}]", "private_test_cases": "[]"}, "'input' and 'output'"),
        ({"public_test_cases": "[]", "private_test_cases": "[]"}, "got none"),
        ({"public_test_cases": TESTS.replace("stdin", "functional"), "private_test_cases": "[]"}, "need 'func_name'"),
        ({"base_input": [[1]]}, "task without task_id: column 'task_id' is missing"),
        ({"task_id": "Mbpp/1", "base_input": [[1]]}, "task Mbpp/1: column 'prompt' is missing"),
    ],
)
def test_unreadable_rows_are_named(row, message):
    with pytest.raises(DataError, match="task ") as caught:
        code_task(row)
    assert message in str(caught.value)


def test_rows_without_tests_are_no_tasks():
    assert code_task({}) is None
    assert code_task({"problem": "1 + 1", "Answer": "2", "test_cases": None}) is None
