"""Verdicts on programs: they are run in a sandbox, and their outputs are compared here, outside of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from renio_megatron.evaluation.code.comparison import evalplus_equal, json_equal, text_equal
from renio_megatron.evaluation.code.references import Reference, ReferenceCache
from renio_megatron.evaluation.code.runs import printed_of, run_calls, run_programs, show, text_of, value_of
from renio_megatron.evaluation.code.tasks import Cases, CodeTask
from renio_megatron.evaluation.code.values import build, encode, parse
from renio_megatron.evaluation.sandbox import Sandbox

# EvalPlus's limits: of a call by its reference time, of a group by the sum of its calls.
_LEAST_CALL_S = 1.0
_TIMES_REFERENCE = 4.0
_MOST_GROUP_S = 60.0
_SPARE_S = 1.0
_LEAST_BYTES = 1 << 16
_CHUNKS = (2, 8, 32)  # tests of the first runs, so that a program that is wrong at once does not run through them all
_LATER_CHUNK = 64
_CHUNK_CHARS = 1 << 24  # of standard input
_REFERENCES = ReferenceCache()


@dataclass(frozen=True)
class CodeVerdict:
    """A program's verdict.

    Attributes:
        correct: it passes all tests.
        base_correct: it passes the base tests; None where the task has no two groups of tests.
        reason: what failed first, at most 200 characters; tests count from 1. Empty where it is correct.
    """

    correct: bool
    base_correct: bool | None
    reason: str


def judge_program(
    program: str | None, task: CodeTask, sandbox: Sandbox, *, references: ReferenceCache | None = None
) -> CodeVerdict:
    """The verdict on a program, from running it on the task's tests up to the first that fails.

    Args:
        program: its text; None, where a completion holds none, is wrong.
        task: the task.
        sandbox: where it runs. It sees inputs, never an expected output.
        references: keeps the outputs of canonical programs; None: one in memory for the whole process.
    Raises:
        DataError: the sandbox failed, or the task's canonical program did. Neither is a verdict.
    """
    base = False if task.kind == "evalplus" else None
    if program is None:
        return CodeVerdict(False, base, "no program")
    for number, tests in enumerate(task.groups):
        if task.kind == "evalplus":
            reference = (references or _REFERENCES).get(task, sandbox)[number]
            problem = _evalplus(program, task, tests, reference, sandbox)
        else:
            problem = _in_chunks(program, task, tests, sandbox)
        if problem is not None:
            return CodeVerdict(False, base, problem)
        base = base if base is None else True
    return CodeVerdict(True, base, "")


def _evalplus(program: str, task: CodeTask, tests: Cases, reference: Reference, sandbox: Sandbox) -> str | None:
    """Why the program fails the group of tests."""
    if not tests.inputs:
        return None
    seconds = [max(_LEAST_CALL_S, _TIMES_REFERENCE * spent) for spent in reference.seconds]
    run = run_calls(
        task,
        program,
        sandbox,
        name=tests.name,
        inputs=tests.inputs,
        seconds=seconds,
        total_s=min(_MOST_GROUP_S, sum(seconds)) + _SPARE_S,
        result_bytes=max(_LEAST_BYTES, 2 * sum(map(len, reference.outputs))),
    )

    def accept(number: int, record: dict[str, Any]) -> str | None:
        expected, got = build(parse(reference.outputs[number])), value_of(record)
        right = evalplus_equal(
            expected,
            got,
            dataset=task.dataset,
            entry_point=task.entry_point or "",
            arguments=tests.inputs[number],
            atol=task.atol,
        )
        return None if right else f"expected {show(expected)}, got {show(got)}"

    return run.failure(len(tests.inputs), accept, known=reference.outputs)


def _in_chunks(program: str, task: CodeTask, tests: Cases, sandbox: Sandbox) -> str | None:
    """Why the program fails the group of tests, which are run a few at first, and then more."""
    left_s, name = task.total_s, tests.name
    judge: Callable[..., str | None] = _programs if task.kind == "programs" else _calls
    for start, end in _chunks(tests.inputs):
        assert tests.outputs is not None
        chunk = Cases(name, tests.inputs[start:end], tests.outputs[start:end])
        chunk_s = min(left_s, task.test_s * (end - start))
        begin = time.monotonic()
        problem = judge(program, task, chunk, sandbox, total_s=chunk_s + _SPARE_S, first=start)
        if problem is not None:
            return problem
        left_s -= time.monotonic() - begin
        if left_s <= 0 and end < len(tests.inputs):
            return f"time: {end} of {len(tests.inputs)} tests took more than {task.total_s:g} s"
    return None


def _chunks(inputs: Sequence[Any]) -> Iterator[tuple[int, int]]:
    start, number = 0, 0
    while start < len(inputs):
        most = _CHUNKS[number] if number < len(_CHUNKS) else _LATER_CHUNK
        end, chars = start, 0
        while end < len(inputs) and end - start < most and (end == start or chars < _CHUNK_CHARS):
            chars += len(inputs[end])
            end += 1
        yield start, end
        start, number = end, number + 1


def _calls(program: str, task: CodeTask, tests: Cases, sandbox: Sandbox, *, total_s: float, first: int) -> str | None:
    outputs = tests.outputs or ()
    run = run_calls(
        task,
        program,
        sandbox,
        name=tests.name,
        inputs=tests.inputs,
        seconds=[task.test_s] * len(tests.inputs),
        total_s=total_s,
        result_bytes=max(_LEAST_BYTES, 4 * sum(len(encode(output)) for output in outputs)),
        first=first,
    )

    def accept(number: int, record: dict[str, Any]) -> str | None:
        expected, got = outputs[number], value_of(record)
        alone = task.wrapped and isinstance(expected, list) and len(expected) == 1
        right = json_equal(expected, got) or (alone and json_equal(expected[0], got))
        return None if right else f"expected {show(expected)}, got {show(got)}"

    return run.failure(len(tests.inputs), accept)


def _programs(
    program: str, task: CodeTask, tests: Cases, sandbox: Sandbox, *, total_s: float, first: int
) -> str | None:
    outputs = tests.outputs or ()
    run = run_programs(
        task,
        program,
        sandbox,
        name=tests.name,
        inputs=tests.inputs,
        caps=[_cap(output) for output in outputs],
        seconds=task.test_s,
        total_s=total_s,
        first=first,
    )

    def accept(number: int, record: dict[str, Any]) -> str | None:
        expected, got = outputs[number], printed_of(record).decode("utf-8", "replace")
        end, last = record.get("end"), text_of(record.get("last"))
        if end == "late":
            return f"time: {run.where(number)} took more than {task.test_s:g} s"
        if end == "cut":
            return "output: it printed too much"
        if end != "0":
            return f"exit code {end}: {last}"
        return None if text_equal(expected, got) else f"expected {show(expected)}, got {show(got)}"

    return run.failure(len(tests.inputs), accept)


def _cap(expected: str) -> int:
    """Bytes that a program may print: a power of two, so that the harness does not know how much is expected."""
    return max(_LEAST_BYTES, 1 << (2 * len(expected.encode("utf-8", "surrogatepass"))).bit_length())
