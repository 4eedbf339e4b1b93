"""The grader `code`: from a completion to a verdict, in a sandbox."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from renio_megatron.config import DataConfig
from renio_megatron.config.load import load_recipe
from renio_megatron.data.sources import build_source
from renio_megatron.errors import ConfigError, DataError
from renio_megatron.evaluation import sandbox
from renio_megatron.evaluation.graders import Completion, Grader, build_grader, grader_name
from renio_megatron.evaluation.graders import code as code_module
from renio_megatron.evaluation.graders.code import code_grader
from renio_megatron.evaluation.graders.grader import CUT, NO_ANSWER, UNCLOSED_THINKING
from renio_megatron.types import Record

pytestmark = pytest.mark.skipif(
    all(sandbox.sandbox_problem(name) is not None for name in ("namespaces", "landlock")),
    reason="no sandbox works here",
)
TESTS = {"inputs": ["2 3\n", "5 5\n"], "outputs": ["5\n", "10\n"]}
RECORD = Record("Add two numbers.", metadata={"test_cases": json.dumps(TESTS)}, where="sums.jsonl:1")
RIGHT = "```python\nprint(sum(map(int, input().split())))\n```"


@pytest.fixture(scope="module")
def grader() -> Grader:
    return code_grader(DataConfig(source="jsonl", grader="code"))


@pytest.mark.parametrize(
    ("text", "right", "reason"),
    [
        (RIGHT, True, ""),
        (f"<think>```python\nprint(0)\n```</think>{RIGHT}", True, ""),
        (f"```python\nprint(0)\n```\nNo, better:\n{RIGHT}", True, ""),
        ("```python\nprint(5)\n```", False, "test 2: expected '10\\n', got '5\\n'"),
        ("```python\nimport os\nprint(5)\nos._exit(0)\n```", False, "test 1"),
        ("I cannot do that.", False, NO_ANSWER),
        (f"<think>{RIGHT}", False, UNCLOSED_THINKING),
    ],
)
def test_verdicts(grader, text, right, reason):
    verdict = grader.grade(Completion(text), RECORD)
    assert verdict.correct is right and verdict.reason.startswith(reason), verdict
    assert (verdict.answer is None) == (reason in (NO_ANSWER, UNCLOSED_THINKING))


def test_a_completion_that_was_cut(grader):
    assert grader.grade(Completion("Let us", finished=False), RECORD).reason == CUT
    assert grader.grade(Completion(RIGHT, finished=False), RECORD).correct


def test_a_body_continues_the_prompt_of_its_record(grader):
    row = {
        "task_id": "HumanEval/9001", "entry_point": "double", "canonical_solution": "    return 2 * x\n",
        "base_input": [[1]], "plus_input": [[-4]], "atol": 0,
    }  # fmt: skip
    record = Record("def double(x):\n", metadata=row)  # the prompt is the problem, and no longer among the columns
    assert grader.grade(Completion("    return x + x\n"), record).correct
    assert not grader.grade(Completion("    return abs(2 * x)\n"), record).correct


@pytest.fixture
def records(tmp_path: Path) -> Any:
    def made(*tests: Any, **settings: Any) -> tuple[DataConfig, Any]:
        path = tmp_path / "sums.jsonl"
        path.write_text("".join(json.dumps({"problem": "Add.", "test_cases": one}) + "\n" for one in tests))
        config = DataConfig(source="jsonl", path=str(path), **settings)
        return config, build_source(config, "train")

    return made


def test_records_with_tests_are_graded_by_it(records):
    assert grader_name(*records(TESTS, json.dumps(TESTS))) == ("code", None)
    grader = build_grader(*records(TESTS))
    assert grader is not None and grader.name == "code" and grader.same_answer is None
    assert build_grader(*records(TESTS, grader="none")) is None


@pytest.mark.parametrize("tests", ["no JSON", {"inputs": ["1"], "outputs": []}, None])
def test_tests_that_cannot_be_read_are_refused_with_their_line(records, tests):
    with pytest.raises(DataError, match=r"sums\.jsonl:2: .*data\.grader=code could never find a completion right"):
        build_grader(*records(TESTS, tests, grader="code"))


def test_without_a_sandbox_nothing_is_run(records, monkeypatch):
    def nothing_works(name: str | None) -> None:
        raise ConfigError("no sandbox for programs works here")

    monkeypatch.setattr(code_module, "open_sandbox", nothing_works)
    with pytest.raises(ConfigError, match="no sandbox"):
        build_grader(*records(TESTS))


def test_the_setting_names_the_sandbox(records, write, monkeypatch):
    asked: list[str | None] = []
    monkeypatch.setattr(code_module, "open_sandbox", lambda name: asked.append(name))
    build_grader(*records(TESTS, sandbox="unsafe"))
    build_grader(*records(TESTS))
    assert asked == ["unsafe", None]
    with pytest.raises(ConfigError, match=r"data\.sandbox must be one of namespaces, landlock, unsafe; got 'docker'"):
        DataConfig(sandbox="docker")
    recipe = "model: a\noutput_dir: b\nteacher: {model: c}\ndata: {grader: number, sandbox: unsafe}\n"
    with pytest.raises(ConfigError, match=r"data\.sandbox .*only data\.grader=code runs programs"):
        load_recipe("train", write(recipe))
