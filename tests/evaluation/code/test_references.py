"""Expected outputs from canonical programs: run once, kept, and refused where they are no use."""

from __future__ import annotations

import dataclasses
import json
import threading

import pytest

from renio_megatron.errors import ConfigError, DataError
from renio_megatron.evaluation.code.evalplus import evalplus_task
from renio_megatron.evaluation.code.judge import judge_program
from renio_megatron.evaluation.code.references import ReferenceCache
from renio_megatron.evaluation.sandbox import Outcome
from tests.evaluation.code.stand_in import CountedSandbox
from tests.evaluation.code.test_forged_verdicts import ROW

RIGHT = "def double(x):\n    return 2 * x\n"


def row_of(solution, **changes):
    return {**ROW, "canonical_solution": f"    {solution}\n", **changes}


def test_a_canonical_program_runs_once():
    sandbox, references, task = CountedSandbox(), ReferenceCache(), evalplus_task(ROW)
    threads = [threading.Thread(target=references.get, args=(task, sandbox)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sandbox.runs == 1
    base, plus = references.get(task, sandbox)
    assert (base.outputs, plus.outputs) == ((b"2", b"4", b"60"), (b"-8", b"0", b"246913578"))
    assert all(0 <= seconds < 1 for seconds in base.seconds)
    references.forget(task)
    references.get(task, sandbox)
    assert sandbox.runs == 2


def test_outputs_are_kept_on_disk(tmp_path):
    folder, task, sandbox = tmp_path / "a" / "b", evalplus_task(ROW), CountedSandbox()
    first = ReferenceCache(folder).get(task, sandbox)
    assert ReferenceCache(folder).get(task, sandbox) == first
    assert sandbox.runs == 1
    [file] = folder.iterdir()
    whole = file.read_bytes()
    for torn in (b"", whole[:-1], whole[: len(whole) // 2], whole.replace(b"60", b"61"), b"\xff" * 99, whole[65:]):
        file.write_bytes(torn)
        before = sandbox.runs
        assert ReferenceCache(folder).get(task, sandbox)[0].outputs == first[0].outputs
        assert sandbox.runs == before + 1
        assert len(file.read_bytes().splitlines()) == len(whole.splitlines())
    assert [path.name for path in folder.iterdir()] == [file.name]


def test_another_row_has_another_file(tmp_path):
    sandbox = CountedSandbox()
    rows = [ROW, row_of("return 2 * x + 0"), {**ROW, "base_input": [[1]]}, {**ROW, "atol": 1e-3}]
    for row in rows:
        ReferenceCache(tmp_path).get(evalplus_task(row), sandbox)
    assert len(list(tmp_path.iterdir())) == len(rows)
    assert len({evalplus_task(row).digest for row in rows}) == len(rows)
    assert evalplus_task({**ROW, "contract": "x"}).digest == evalplus_task(ROW).digest


def test_a_directory_that_cannot_be_written_is_no_error(tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    assert len(ReferenceCache(file / "below").get(evalplus_task(ROW), CountedSandbox())) == 2


@pytest.mark.parametrize(
    ("solution", "message"),
    [
        ("return 1 / (x - 2)", "canonical test 2: raised ZeroDivisionError"),
        ("return (n for n in [x])", "canonical test 1: nothing equals its output <generator>"),
        ("return [x, object()]", "canonical test 1: nothing equals its output"),
        ("return float('nan')", "canonical test 1: nothing equals its output nan"),
        ("return x x", "SyntaxError"),
        ("import os; os._exit(0)", "the program ended in canonical test 1"),
    ],
)
def test_a_canonical_program_that_is_no_use_is_an_error(solution, message):
    with pytest.raises(DataError, match=r"task HumanEval/9001: its canonical program cannot be used: ") as caught:
        judge_program(RIGHT, evalplus_task(row_of(solution)), CountedSandbox(), references=ReferenceCache())
    assert message in str(caught.value)


def outcome(**changes):
    return Outcome(
        **{"exit_code": 1, "stopped": None, "stdout": b"", "stderr": b"", "result": b"", "seconds": 0.1, **changes}
    )


class Broken:
    name = "broken"

    def __init__(self, does):
        self.does = does

    def run(self, source, stdin=b"", limits=None):
        if isinstance(self.does, Exception):
            raise self.does
        return self.does


@pytest.mark.parametrize(
    "does",
    [
        outcome(stderr=b"ImportError: no module"),
        outcome(exit_code=0),
        outcome(exit_code=None, stopped="time"),
        outcome(result=b'{"ready":1'),
        outcome(result=b'{"n":0,"s":0.0,"value":2}\n'),
        outcome(result=b'{"fault":"BlockingIOError: no more processes"}\n', exit_code=0),
        OSError("no such file"),
        ConfigError("no namespaces here"),
    ],
    ids=range(8),
)
def test_a_sandbox_that_fails_gives_no_verdict(does):
    references, task = ReferenceCache(), evalplus_task(ROW)
    references.get(task, CountedSandbox())
    with pytest.raises(DataError, match=r"task HumanEval/9001: the sandbox 'broken' failed: "):
        judge_program(RIGHT, task, Broken(does), references=references)


def test_records_that_are_cut_or_odd_are_wrong():
    references, task = ReferenceCache(), evalplus_task(ROW)
    references.get(task, CountedSandbox())
    right = [b'{"ready":1}', *(b'{"n":%d,"s":0.0,"value":%d}' % (n, x) for n, x in enumerate((2, 4, 60)))]
    for lines in (
        right[:3],
        [right[0], right[2], right[1], right[3]],
        [*right[:3], right[3][:-1]],
        [*right[:3], right[3].replace(b"60", b"61")],
        [*right[:3], b"\xff" * 100],
        [*right[:3], b'{"n":2,"s":0.0,"value":"' + b"x" * (1 << 25) + b'"}'],
        [right[0], b'{"fault":"OSError"}', *right[1:]],
        [right[0], *right],
        [*right[:3], b"[" * 10_000],
        [*right[:3], json.dumps({"n": 2, "error": {"a": 1}}).encode()],
        [*right[:3], json.dumps({"n": 2, "late": "x" * 1000}).encode()],
        [*right[:3], json.dumps({"n": True, "value": 60}).encode()],
    ):
        verdict = judge_program(RIGHT, task, Broken(outcome(result=b"\n".join(lines))), references=references)
        assert not verdict.correct
        assert len(verdict.reason) <= 200


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"atol": None}, "'atol' must be a number"),
        ({"prompt": 3}, "'prompt' must be text; got int"),
        ({"task_id": "Other/3"}, "task_id must be"),
        ({"task_id": "HumanEval/x"}, "task_id must be"),
        ({"base_input": []}, "'base_input' is empty"),
        ({"base_input": [1]}, "'base_input' cannot be read"),
        ({"task_id": "Mbpp/124", "base_input": [["a", "b"]]}, "'base_input' cannot be read"),
        ({"task_id": "Mbpp/722", "base_input": [[{}]], "plus_input": [[3]]}, "'plus_input' cannot be read"),
    ],
)
def test_rows_that_cannot_be_used_are_named(changes, message):
    with pytest.raises(DataError, match="task ") as caught:
        evalplus_task({**ROW, **changes})
    assert message in str(caught.value)


def test_one_row_has_an_object_for_no_inputs():
    task = evalplus_task({**ROW, "plus_input": {}})
    assert task.groups[1].inputs == ()
    verdict = judge_program(RIGHT, task, CountedSandbox(), references=ReferenceCache())
    assert verdict.correct


def test_memory_is_bounded_and_what_was_asked_for_last_stays():
    tasks = [dataclasses.replace(evalplus_task(ROW), digest=name) for name in "abc"]
    sandbox = CountedSandbox()
    size = sum(len(output) for group in ReferenceCache().get(tasks[0], sandbox) for output in group.outputs)
    bounded = ReferenceCache(most_bytes=2 * size)
    for number, runs in ((0, 1), (1, 2), (0, 2), (2, 3), (0, 3), (1, 4)):
        bounded.get(tasks[number], sandbox)
        assert sandbox.runs - 1 == runs
