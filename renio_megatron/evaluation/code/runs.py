"""Runs of a program in the sandbox, and the records that come back from the harness."""

from __future__ import annotations

import base64
import binascii
import functools
import json
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from renio_megatron.errors import DataError, RenioError
from renio_megatron.evaluation.code.tasks import CodeTask
from renio_megatron.evaluation.code.values import MAX_CHARS, BadValueError, Opaque, build, encode, parse
from renio_megatron.evaluation.sandbox import Limits, Outcome, Sandbox

_FUTURE = "from __future__ import annotations\n"
_VALUES = "from renio_megatron.evaluation.code.values import LONG_TEXT, MAX_CHARS, build, encode\n"
# Functions take the builtins of where they are made: a copy, so that a candidate that patches them hurts only itself.
_HEAD = f"{_FUTURE}import builtins\n__builtins__ = dict(vars(builtins))\n"
_START_S = 4.0  # for the interpreter, on a busy machine
_BYTES_A_SECOND = 4_000_000  # of outputs that are written and sent; the time limits are for the program alone
_RECORD_BYTES = 100  # a record without its value
_FIELDS_BYTES = 3000  # with a message, escaped
_MARGIN_BYTES = 1 << 20
_TIME_SIGNALS = (-signal.SIGVTALRM, 128 + signal.SIGVTALRM, -signal.SIGXCPU, 128 + signal.SIGXCPU)
_SHORT = 200


def short(text: str) -> str:
    """The text on one line of at most 200 characters.

    >>> short("a" * 300)[-5:], short("a\\nb")
    ('aa...', 'a b')
    """
    text = " ".join(text.split())
    return text if len(text) <= _SHORT else text[: _SHORT - 3] + "..."


def show(value: Any) -> str:
    """The value as Python writes it, of at most 80 characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError, MemoryError):  # a very long integer
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 80 else text[:77] + "..."


@functools.cache
def harness_source() -> str:
    """Text of the program that is run in the sandbox."""
    values, harness = (Path(__file__).with_name(name).read_text("utf-8") for name in ("values.py", "harness.py"))
    assert values.count(_FUTURE) == 1 and harness.count(_VALUES) == 1
    return _HEAD + values.replace(_FUTURE, "") + harness.replace(_VALUES, "")


@dataclass(frozen=True)
class Run:
    """What a run in the sandbox gave.

    Attributes:
        where: what messages call a test by its number; the first is 0.
        records: the harness's records, behind the first one.
        outcome: how the process ended.
        longest: bytes of the longest record that an honest run can give.
    """

    where: Callable[[int], str]
    records: list[bytes]
    outcome: Outcome
    longest: int

    def failure(
        self, count: int, accept: Callable[[int, dict[str, Any]], str | None], known: Sequence[bytes] = ()
    ) -> str | None:
        """Why the first test that fails does so, at most 200 characters; None where `count` tests pass.

        Args:
            count: the tests that were sent.
            accept: takes a test's number and record, and says what is wrong with it.
            known: for each test the typed JSON of a right output: what is the same text need not be read.
        """
        for number, line in enumerate(self.records[:count]):
            if known and value_text(line, number) == known[number]:
                if number + 1 == count:
                    return None
                continue
            record = _parsed(line) if len(line) <= self.longest else {}
            kind = "error" if "error" in record else "late" if "late" in record else ""
            whole = record.get("n") == -1
            if kind and (whole or record.get("n") == number):
                if kind == "late":
                    what = "loading the program" if whole else self.where(number)
                    return short(f"time: {what} took more than {_seconds(record['late'])} s")
                error = text_of(record["error"])
                return short(error if whole else f"{self.where(number)}: raised {error}")
            if record.get("n") != number and self.outcome.stopped is not None and number == len(self.records) - 1:
                return short(self._end(number))  # a line that was cut
            if record.get("n") != number:
                return short(f"{self.where(number)}: no readable result")
            if (problem := accept(number, record)) is not None:
                return short(problem if problem.startswith("time:") else f"{self.where(number)}: {problem}")
            if number + 1 == count:
                return None
        return short(self._end(len(self.records)))

    def _end(self, number: int) -> str:
        where, stopped, code = self.where(number), self.outcome.stopped, self.outcome.exit_code
        if stopped in ("time", "cpu") or (stopped is None and code in _TIME_SIGNALS):
            return f"time: it ran out in {where}"
        if stopped is not None:
            return f"{stopped}: the limit was reached in {where}"
        return f"the program ended in {where} (exit code {code})"


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        record = parse(line)
    except BadValueError:
        record = None
    return record if isinstance(record, dict) else {}


def value_text(line: bytes, number: int) -> bytes | None:
    """The typed JSON of the output in the record of a test, unread; None where it is no such record."""
    head, found, text = line.partition(b',"value":')
    return text[:-1] if found and head.startswith(b'{"n":%d,' % number) else None


def _seconds(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else "?"


def text_of(tree: Any) -> str:
    """The text in a record's field."""
    try:
        value = build(tree)
    except BadValueError:
        value = None
    return value if isinstance(value, str) else "a message that cannot be read"


def value_of(record: dict[str, Any]) -> Any:
    """The output in a record; an opaque one where it cannot be read."""
    try:
        return build(record["value"])
    except (BadValueError, KeyError):
        return Opaque("unreadable")


def printed_of(record: dict[str, Any]) -> bytes:
    """What the program printed, in a record."""
    try:
        return base64.b64decode(record["out"], validate=True)
    except (KeyError, TypeError, ValueError, binascii.Error):
        return b""


def seconds_of(record: dict[str, Any]) -> float:
    """Seconds that the call took; 0 where the record does not say."""
    seconds = record.get("s")
    return seconds if isinstance(seconds, float) else 0.0


def run_calls(
    task: CodeTask,
    program: str,
    sandbox: Sandbox,
    *,
    name: str,
    inputs: Sequence[Any],
    seconds: Sequence[float],
    total_s: float,
    result_bytes: int,
    first: int = 0,
) -> Run:
    """Calls the task's entry point with each input, in one process, up to the first call that fails.

    Args:
        task: the task, of kind `evalplus` or `calls`.
        program: the candidate's text.
        sandbox: where it runs.
        name: the group of tests.
        inputs: the arguments of each call.
        seconds: the time limit of each call.
        total_s: the time limit of loading and all calls.
        result_bytes: what all outputs together may take.
        first: number of the first input in its group.
    Raises:
        DataError: the sandbox failed.
    """
    request = {
        "kind": "calls",
        "source": program,
        "prelude": task.prelude,
        "entry_point": task.entry_point,
        "method": task.kind == "calls",
        "seconds": list(seconds),
        "load_s": total_s,
    }
    text = json.dumps(request)[:-1] + f', "inputs": [{",".join(map(encode, inputs))}]}}'
    size = result_bytes + _RECORD_BYTES * len(inputs) + _MARGIN_BYTES
    return _run(task, text, sandbox, total_s, size, MAX_CHARS + _FIELDS_BYTES, _namer(name, first))


def run_programs(
    task: CodeTask,
    program: str,
    sandbox: Sandbox,
    *,
    name: str,
    inputs: Sequence[str],
    caps: Sequence[int],
    seconds: float,
    total_s: float,
    first: int = 0,
) -> Run:
    """Runs the program with each text as standard input, each time afresh, up to the first run that fails.

    Args:
        task: the task.
        program: the candidate's text.
        sandbox: where it runs; it must let the harness fork.
        name: the group of tests.
        inputs: the texts.
        caps: bytes that each run may print.
        seconds: the time limit of each run.
        total_s: the time limit of all of them.
        first: number of the first input in its group.
    Raises:
        DataError: the sandbox failed.
    """
    request = {"kind": "programs", "source": program, "stdins": list(inputs), "caps": list(caps), "seconds": seconds}
    size = sum(caps) * 4 // 3 + _FIELDS_BYTES * len(inputs) + _MARGIN_BYTES
    longest = max(caps) * 4 // 3 + _FIELDS_BYTES
    return _run(task, json.dumps(request), sandbox, total_s, size, longest, _namer(name, first))


def _namer(name: str, first: int) -> Callable[[int], str]:
    return lambda number: f"{name} test {first + number + 1}".strip()


def _run(
    task: CodeTask,
    request: str,
    sandbox: Sandbox,
    total_s: float,
    size: int,
    longest: int,
    where: Callable[[int], str],
) -> Run:
    wall_s = total_s + _START_S + size / _BYTES_A_SECOND
    limits = Limits(wall_s=wall_s, cpu_s=wall_s, output_bytes=size)
    try:
        outcome = sandbox.run(harness_source(), request.encode("ascii"), limits)
    except (OSError, RenioError) as error:
        raise _sandbox_error(task, sandbox, str(error)) from error
    lines = outcome.result.split(b"\n")
    # The first line is written before the candidate runs; of all others it may be the author.
    if lines[0].startswith(b'{"fault":'):
        raise _sandbox_error(task, sandbox, f"the harness cannot fork: {lines[0][:200]!r}")
    if lines[0] != b'{"ready":1}':
        end = f"stopped by the limit of {outcome.stopped}" if outcome.stopped else f"exit code {outcome.exit_code}"
        last = outcome.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
        raise _sandbox_error(task, sandbox, f"the interpreter did not start the harness ({end}) {''.join(last)}")
    return Run(where, [line for line in lines[1:] if line], outcome, longest)


def _sandbox_error(task: CodeTask, sandbox: Sandbox, problem: str) -> DataError:
    return DataError(
        f"task {task.name}: the sandbox {sandbox.name!r} failed: {problem[:400]}. That says nothing about the program. "
        "Repair the sandbox, or choose another back end."
    )
