"""The kind of task that a row holds, by its columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from renio_megatron.evaluation.code.evalplus import evalplus_task
from renio_megatron.evaluation.code.tasks import CodeTask
from renio_megatron.evaluation.code.test_cases import test_cases_task


def code_task(row: Mapping[str, Any]) -> CodeTask | None:
    """The task of a row, of whatever kind its columns say; None where none of them holds tests of a program.

    >>> code_task({"question": "1 + 1?", "answer": "2"}) is None
    True
    >>> code_task({"test_cases": '{"inputs": ["1 2"], "outputs": ["3"]}'}).kind
    'programs'

    Raises:
        DataError: it has tests, but something is missing or unreadable.
    """
    if "base_input" in row or "plus_input" in row:
        return evalplus_task(row)
    if any(row.get(column) is not None for column in ("test_cases", "public_test_cases", "private_test_cases")):
        return test_cases_task(row)
    return None
