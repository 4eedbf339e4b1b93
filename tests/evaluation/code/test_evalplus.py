"""HumanEval+ and MBPP+: every task's own tests, and verdicts on right and wrong programs.

Expected outputs come from the canonical programs, so that canonical programs pass is nearly a tautology. What can fail
is the sets' own tests (the first test here), the conversion of inputs, and the wrong programs.
"""

from __future__ import annotations

import json

import pytest

from renio_megatron.evaluation.code.evalplus import evalplus_task
from renio_megatron.evaluation.code.judge import judge_program
from renio_megatron.evaluation.code.programs import find_program
from renio_megatron.evaluation.code.references import ReferenceCache
from renio_megatron.evaluation.sandbox import Limits
from tests.evaluation.code.stand_in import CountedSandbox, all_rows

SLOW = {
    "HumanEval/15",
    "HumanEval/36",
    "HumanEval/59",
    "HumanEval/83",
    "HumanEval/94",
    "HumanEval/130",
    "HumanEval/139",
    "Mbpp/84",
    "Mbpp/123",
    "Mbpp/255",
    "Mbpp/271",
    "Mbpp/300",
    "Mbpp/389",
    "Mbpp/392",
    "Mbpp/583",
    "Mbpp/589",
    "Mbpp/592",
    "Mbpp/599",
    "Mbpp/603",
    "Mbpp/630",
}
"""Tasks that take seconds."""
LENIENT = {"Mbpp/737", "Mbpp/787", "Mbpp/794", "HumanEval/32"}
"""Tasks whose rule lets some of the wrong programs below pass."""
CONVERTED = ("Mbpp/106", "Mbpp/124", "Mbpp/252", "Mbpp/278", "Mbpp/580", "Mbpp/722", "Mbpp/753")
SPECIAL = ("Mbpp/2", "Mbpp/7", "Mbpp/558", "Mbpp/581", *sorted(LENIENT))

RUN_ALL = """
import json, os, sys
failed = {{}}
for name, text in json.load(sys.stdin):
    try:
        exec(compile(text, name, "exec"), {{"__name__": "program"}})
    except BaseException as error:
        failed[name] = repr(error)
os.write(3, json.dumps(failed).encode())
"""
OFF = """

def _off(value):
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, (int, float, complex)):
        return value + 1
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, (list, tuple)):
        return value[:-1] + type(value)([_off(value[-1])]) if value else type(value)([0])
    if isinstance(value, dict):
        return {{**value, "another": 1}}
    return value ^ {{"another"}}

_right = {name}

def {name}(*arguments):
    return _off(_right(*arguments))
"""
ONLY_BASE = """

_right, _base = {name}, {base!r}

def {name}(*arguments):
    return _right(*arguments) if repr(list(arguments)) in _base else None
"""
UNMUTATED = """

_right = {name}

def {name}(*arguments):
    value = _right(*arguments)
    for argument in arguments:
        if hasattr(argument, "clear"):
            argument.clear()
    return value
"""


@pytest.fixture(scope="module")
def rows(shared):
    return all_rows(shared)


@pytest.fixture(scope="module")
def sandbox():
    return CountedSandbox()


@pytest.fixture(scope="module")
def references():
    return ReferenceCache()


def sample(rows):
    """About 60 tasks of both sets: every tenth that is not slow, and those with a conversion or rule of their own."""
    chosen = [name for number, name in enumerate(rows) if number % 10 == 3 and name not in SLOW]
    return list(dict.fromkeys([*chosen, *CONVERTED, *SPECIAL]))


def test_canonical_programs_pass_the_sets_own_tests(rows, sandbox):
    programs = []
    for name, row in rows.items():
        checks = f"{row['test']}\ncheck({row['entry_point']})" if "test" in row else row["assertion"]
        programs.append((name, f"{row['prompt']}{row['canonical_solution']}\n{checks}"))
    assert len(programs) == 164 + 378
    failed = {}
    for start in range(0, len(programs), 100):
        text = json.dumps(programs[start : start + 100]).encode()
        outcome = sandbox.run(RUN_ALL.format(), text, Limits(wall_s=120))
        failed |= json.loads(outcome.result)
    assert list(failed) == ["Mbpp/120"], failed  # its program lacks `import math`
    assert "math" in failed["Mbpp/120"]


def judge(program, row, sandbox, references):
    return judge_program(program, evalplus_task(row), sandbox, references=references)


def test_right_programs_pass(rows, sandbox, references):
    names = sample(rows)
    assert 60 <= len(names) <= 75
    for number, name in enumerate(names):
        row = rows[name]
        completion = f"<think>\nHm.\n</think>\n\n```python\n{row['prompt']}{row['canonical_solution']}\n```\n"
        if number % 2 and name.startswith("HumanEval/") and name not in SPECIAL:
            completion = row["canonical_solution"]  # a body, which continues the prompt
        task = evalplus_task(row)
        program = find_program(completion, task.entry_point, task.prompt)
        verdict = judge_program(program, task, sandbox, references=references)
        assert (verdict.correct, verdict.base_correct, verdict.reason) == (True, True, ""), name


@pytest.mark.parametrize("kind", ["None", "pass", "off", "only base"])
def test_wrong_programs_fail(kind, rows, sandbox, references):
    failed_plus = 0
    for name in [name for name in sample(rows) if name not in LENIENT][:: 2 if kind == "off" else 3]:
        row, task = rows[name], evalplus_task(rows[name])
        program = {
            "None": f"def {task.entry_point}(*arguments):\n    return None\n",
            "pass": f"def {task.entry_point}(*arguments):\n    pass\n",
            "off": task.canonical + OFF.format(name=task.entry_point),
            "only base": task.canonical
            + ONLY_BASE.format(
                name=task.entry_point, base={repr(list(arguments)) for arguments in task.groups[0].inputs}
            ),
        }[kind]
        verdict = judge(program, row, sandbox, references)
        if kind == "only base":
            plus = {repr(list(arguments)) for arguments in task.groups[1].inputs}
            new = not plus <= {repr(list(arguments)) for arguments in task.groups[0].inputs}
            assert verdict.base_correct, (name, verdict.reason)
            assert verdict.correct is not new or "None" in verdict.reason, (name, verdict.reason)
            failed_plus += verdict.reason.startswith("plus test ")
        else:
            assert (verdict.correct, verdict.base_correct) == (False, False), name
            assert verdict.reason.startswith("base test "), (name, verdict.reason)
    assert kind != "only base" or failed_plus > 10


def test_endless_loops_end(rows, sandbox, references):
    for name in ("HumanEval/3", "Mbpp/3"):
        program = f"def {rows[name]['entry_point']}(*arguments):\n    while True:\n        pass\n"
        verdict = judge(program, rows[name], sandbox, references)
        assert (verdict.correct, verdict.reason) == (False, "time: base test 1 took more than 1 s")


def test_a_program_that_empties_its_inputs_is_right(rows, sandbox, references):
    for name in ("HumanEval/4", "HumanEval/33", "Mbpp/8", "Mbpp/62", "Mbpp/106"):
        program = evalplus_task(rows[name]).canonical + UNMUTATED.format(name=rows[name]["entry_point"])
        verdict = judge(program, rows[name], sandbox, references)
        assert verdict.correct, (name, verdict.reason)


@pytest.mark.parametrize(
    ("name", "program", "right"),
    [
        ("Mbpp/2", "def similar_elements(a, b):\n    return sorted(set(a) & set(b), reverse=True)\n", True),
        ("Mbpp/2", "def similar_elements(a, b):\n    return sorted(set(a) | set(b))\n", False),
        ("Mbpp/581", "def surface_Area(b, h):\n    return round(b * b + 2 * b * (b * b / 4 + h * h) ** 0.5)\n", True),
        ("Mbpp/581", "def surface_Area(b, h):\n    return b * b + 3 * b * h\n", False),
        ("Mbpp/737", "import re\n\ndef check_str(s):\n    return bool(re.match('^[aeiouAEIOU]', s))\n", True),
        ("Mbpp/737", "def check_str(s):\n    return 'Valid' if s[:1] in 'aeiouAEIOU' and s else None\n", True),
        ("Mbpp/737", "def check_str(s):\n    return 'Valid'\n", False),
        ("HumanEval/32", "def find_zero(xs):\n    return float('nan')\n", False),
        ("HumanEval/32", "def find_zero(xs):\n    return 0.0\n", False),
    ],
)
def test_tasks_with_a_rule_of_their_own(name, program, right, rows, sandbox, references):
    verdict = judge(program, rows[name], sandbox, references)
    assert verdict.correct is right, verdict.reason


@pytest.mark.exhaustive
@pytest.mark.timeout(2400)
def test_all_canonical_programs_pass(rows, sandbox):
    references = ReferenceCache()
    wrong = {}
    for name, row in rows.items():
        task = evalplus_task(row)
        verdict = judge_program(task.canonical, task, sandbox, references=references)
        if not verdict.correct:
            wrong[name] = verdict.reason
        references.forget(task)
    # Its canonical program needs more than half of the minute that a group of tests may take.
    if wrong.get("Mbpp/599", "").startswith("time: "):
        del wrong["Mbpp/599"]
    assert not wrong
