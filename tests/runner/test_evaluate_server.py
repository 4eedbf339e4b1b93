"""A grader that breaks while a server's completions are graded: told once and counted, or the end."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from renio_megatron.errors import DataError
from renio_megatron.evaluation.progress import EvaluationProgress
from renio_megatron.runner.evaluate_server import evaluate_server
from renio_megatron.runner.evaluation_job import EvaluateOptions, read_job
from tests.evaluation.server_cases import echo, models
from tests.fakes.completion_server import Asked, Says, standing_in

GRADER = """
from renio_megatron.evaluation.graders import Verdict

def grade(completion, record):
    if record.problem != "first":
        raise KeyError("units")
    return Verdict(completion.text == record.answer, completion.text)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "judge.py").write_text(GRADER)
    records = [{"problem": name, "answer": name} for name in ("first", "second", "third")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


def says(asked: Asked) -> Says:
    return models("m") if asked.path.endswith("/models") else echo(asked)


def evaluated(folder: Path, *overrides: str) -> str:
    """What is said; completions are in folder/out."""
    shown = io.StringIO()
    settings = (f"grader={folder / 'judge.py'}:grade", "instruction=''", "concurrency=1", *overrides)
    with standing_in(says) as server:
        job = read_job(
            EvaluateOptions(
                server.url, (str(folder / "rows.jsonl"),), model="m", output=str(folder / "out"), overrides=settings
            )
        )
        evaluate_server(job, EvaluationProgress(Console(file=shown, width=500)))
    return shown.getvalue()


def test_an_exception_counts_as_wrong_and_is_told_once(folder):
    said = evaluated(folder)
    problem = f"{folder / 'rows.jsonl'}:2: the grader '{folder / 'judge.py'}:grade' raised KeyError: 'units'."
    assert said.count("raised") == 1
    assert f"{problem} It counts as wrong, as later ones will without a word." in said
    rows = [json.loads(line) for line in (folder / "out" / "completions.jsonl").read_text().splitlines()]
    assert [row["correct"] for row in rows] == [True, None, None]
    assert rows[1]["reason"] == problem and rows[2]["reason"] == problem.replace(":2:", ":3:")


def test_or_it_ends_the_evaluation_with_what_to_do(folder):
    with pytest.raises(DataError) as caught:
        evaluated(folder, "grader_errors=raise")
    message = str(caught.value)
    assert "rows.jsonl:2: the grader" in message and "raised KeyError: 'units'. Fix the record or" in message
    assert " set grader_errors=count_wrong " in message
