"""Tasks from rows with test cases: LiveCodeBench's, and those of training sets in the style of APPS and TACO."""

from __future__ import annotations

import base64
import hashlib
import json
import pickletools
import zlib
from collections.abc import Mapping
from typing import Any

from renio_megatron.errors import DataError
from renio_megatron.evaluation.code.tasks import Cases, CodeTask

_MAX_UNPACKED = 1 << 30  # bytes of private tests
_TEXT_OPCODES = ("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")
_FRAME_OPCODES = ("PROTO", "FRAME", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "STOP")
_NAMES = ("task_id", "question_id", "id", "name", "question_title")
# What the sites that the problems come from import before a submission.
PRELUDE = """
import bisect, collections, functools, heapq, itertools, math, operator, random, re, string, sys
from bisect import *
from collections import *
from copy import *
from functools import *
from heapq import *
from itertools import *
from math import *
from operator import *
from random import *
from re import *
from string import *
from typing import *
from builtins import *
sys.setrecursionlimit(50000)
"""


def test_cases_task(row: Mapping[str, Any]) -> CodeTask:
    """The task of a row with the column `test_cases`, or with LiveCodeBench's `public_test_cases` and `private_...`.

    Raises:
        DataError: the tests are missing or unreadable.
    """
    name = next((str(row[column]) for column in _NAMES if row.get(column) is not None), None)
    if "test_cases" in row:
        return _paired_task(row["test_cases"], name or f"with tests {_digest(row['test_cases'])}")
    return _livecodebench_task(row, name or "without question_id")


def _digest(value: Any) -> str:
    return hashlib.sha256(repr(value).encode("utf-8", "surrogatepass")).hexdigest()[:12]


def _json(text: Any, what: str, name: str) -> Any:
    """The value of a column that is JSON text, or is read already."""
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"task {name}: {what} is not JSON: {error}; it begins with {text[:60]!r}.") from error


def _paired_task(column: Any, name: str) -> CodeTask:
    """The task of `test_cases`: {"inputs": [...], "outputs": [...], "fn_name": ...}."""
    cases = _json(column, "column 'test_cases'", name)
    if not isinstance(cases, dict) or not all(isinstance(cases.get(key), list) for key in ("inputs", "outputs")):
        raise DataError(f"task {name}: column 'test_cases' must hold the lists 'inputs' and 'outputs'.")
    inputs, outputs, function = cases["inputs"], cases["outputs"], cases.get("fn_name")
    if len(inputs) != len(outputs) or not inputs:
        raise DataError(
            f"task {name}: column 'test_cases' has {len(inputs)} inputs and {len(outputs)} outputs; it needs as many "
            "of one as of the other, and at least one."
        )
    if function is None:
        tests = Cases(
            "",
            tuple(_lines(value, "an input", name) for value in inputs),
            tuple(_lines(value, "an output", name) for value in outputs),
        )
        return CodeTask(name, "programs", None, (tests,))
    if not isinstance(function, str) or not function.isidentifier():
        raise DataError(f"task {name}: 'fn_name' must be the name of a function; got {function!r}.")
    arguments = tuple(_arguments(value, name) for value in inputs)
    return CodeTask(name, "calls", function, (Cases("", arguments, tuple(outputs)),), prelude=PRELUDE, wrapped=True)


def _lines(value: Any, what: str, name: str) -> str:
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        return "\n".join(value)
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise DataError(f"task {name}: {what} of a program must be text; got {type(value).__name__}.")


def _arguments(value: Any, name: str) -> list[Any]:
    if isinstance(value, str):
        return [_json(line, "an argument", name) for line in value.split("\n") if line.strip()]
    if not isinstance(value, list):
        raise DataError(f"task {name}: an input of a function must be a list; got {type(value).__name__}.")
    return value


def _livecodebench_task(row: Mapping[str, Any], name: str) -> CodeTask:
    cases: list[Any] = []
    for column in ("public_test_cases", "private_test_cases"):
        if row.get(column) is None:
            raise DataError(f"task {name}: column {column!r} is missing.")
        found = _cases(row[column], column, name)
        if not isinstance(found, list):
            raise DataError(f"task {name}: column {column!r} must hold a list of tests; got {type(found).__name__}.")
        cases += found
    for case in cases:
        if not isinstance(case, dict) or not all(isinstance(case.get(key), str) for key in ("input", "output")):
            raise DataError(f"task {name}: a test must hold the texts 'input' and 'output'.")
    kinds = {case.get("testtype") for case in cases}
    if kinds == {"stdin"}:
        pairs = tuple(case["input"] for case in cases), tuple(case["output"] for case in cases)
        return CodeTask(name, "programs", None, (Cases("", *pairs),))
    if kinds != {"functional"}:
        raise DataError(f"task {name}: all tests must be of one testtype, stdin or functional; got {kinds or 'none'}.")
    metadata = _json(row.get("metadata"), "column 'metadata'", name)
    function = metadata.get("func_name") if isinstance(metadata, dict) else None
    if not isinstance(function, str) or not function.isidentifier():
        raise DataError(f"task {name}: functional tests need 'func_name' in column 'metadata'; got {function!r}.")
    arguments = tuple(_arguments(case["input"], name) for case in cases)
    outputs = tuple(_json(case["output"], "an output", name) for case in cases)
    return CodeTask(name, "calls", function, (Cases("", arguments, outputs),), prelude=PRELUDE)


def _cases(value: Any, column: str, name: str) -> Any:
    """The tests of a column: JSON text or, where that would be long, base64 of zlib of a pickle of that text."""
    if not isinstance(value, str) or value.lstrip()[:1] == "[":
        return _json(value, f"column {column!r}", name)
    try:
        unzip = zlib.decompressobj()
        packed = unzip.decompress(base64.b64decode(value, validate=True), _MAX_UNPACKED)
        if not unzip.eof:
            raise ValueError(f"it is cut, or unpacks to more than {_MAX_UNPACKED} bytes")
        text = _pickled_text(packed)
    except (ValueError, zlib.error) as error:
        raise DataError(f"task {name}: column {column!r} cannot be read: {error}.") from error
    return _json(text, f"column {column!r}", name)


def _pickled_text(packed: bytes) -> str:
    """The text in a pickle of a text. The pickle is read, not executed: it could run anything, or take all memory."""
    texts: list[str] = []
    for opcode, argument, _ in pickletools.genops(packed):
        if opcode.name in _TEXT_OPCODES:
            texts.append(str(argument))
        elif opcode.name not in _FRAME_OPCODES:
            raise ValueError(f"it is a pickle with {opcode.name}; only a text is allowed")
    if len(texts) != 1:
        raise ValueError(f"it is a pickle of {len(texts)} texts; only one is allowed")
    return texts[0]
