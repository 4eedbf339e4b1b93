"""Files and rows of benchmarks, in the formats that their makers write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.helpers.row_files import write_rows

SUM: dict[str, Any] = {"problem": "What is 2 + 2?", "answer": "4"}
ASKED = {"prompt": "What is 2 + 3?\nPlease put your final answer within \\boxed{}.", "answer": 5}
FUNCTION: dict[str, Any] = {
    "task_id": "HumanEval/900",
    "prompt": 'def double(x: int) -> int:\n    """Twice x."""\n',
    "entry_point": "double",
    "canonical_solution": "    return 2 * x\n",
    "base_input": [[1]],
    "plus_input": [[0], [-3]],
    "atol": 0,
}
STDIN: dict[str, Any] = {
    "question_title": "Double",
    "question_content": "Print twice the number that is given.",
    "platform": "here",
    "question_id": "1",
    "starter_code": "",
    "difficulty": "easy",
    "public_test_cases": json.dumps([{"input": "2\n", "output": "4\n", "testtype": "stdin"}]),
    "private_test_cases": "[]",
    "metadata": "{}",
}
STARTED = {
    **STDIN,
    "question_content": "Return twice x.",
    "starter_code": "class Solution:\n    def double(self, x: int) -> int:\n        ",
    "public_test_cases": json.dumps([{"input": "2", "output": "4", "testtype": "functional"}]),
    "metadata": '{"func_name": "double"}',
}


def written(path: Path, *rows: dict[str, Any]) -> str:
    """The path of a file of these rows, as JSON lines; gzipped where its name says so."""
    return str(write_rows(path, rows))
