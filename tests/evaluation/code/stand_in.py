"""The sandbox in which the tests of judging run programs, and the benchmark files' rows."""

from __future__ import annotations

import functools
import gzip
import json
from pathlib import Path

from renio_megatron.evaluation.sandbox import SANDBOXES, Limits, Outcome, sandbox_problem


class CountedSandbox:
    """The best sandbox that works here, with a count of its `runs`; without one, programs of these tests run bare."""

    def __init__(self) -> None:
        names = [name for name in SANDBOXES if sandbox_problem(name) is None]
        self._sandbox = SANDBOXES[names[0]]
        self.name, self.runs = self._sandbox.name, 0

    def run(self, source: str, stdin: bytes = b"", limits: Limits = Limits()) -> Outcome:  # noqa: B008
        self.runs += 1
        return self._sandbox.run(source, stdin, limits)


@functools.cache
def rows(file: Path) -> dict[str, dict]:
    """The rows of a benchmark's file, by task."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return {row["task_id"]: row for row in map(json.loads, lines)}


def all_rows(shared: Path) -> dict[str, dict]:
    """The rows of HumanEval+ and MBPP+."""
    folder = shared / "data"
    return rows(folder / "humanevalplus.jsonl.gz") | rows(folder / "mbppplus.jsonl.gz")
