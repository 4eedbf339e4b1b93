"""The page of SmolLM2 on GSM8K's format: its data are right, and its commands run and say what it promises."""

from __future__ import annotations

import ast
import json
import math
import operator
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from renio_megatron.config.load import load_recipe
from renio_megatron.config.schema import DistillationConfig
from tests.helpers import warm
from tests.helpers.jobs import python_path
from tests.helpers.packages import smollm2_directory
from tests.helpers.paths import ROOT

PAGE = (ROOT / "docs" / "guides" / "smollm2.md").read_text()
RECIPE = "examples/smollm2_gsm8k.yaml"
FILES = {name: ROOT / "examples" / "data" / f"gsm8k_format_{name}.jsonl" for name in ("train", "test")}
MARK = re.compile(r"<<([^<>=]+)=([^<>=]+)>>(\S+)")
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
SHORT = [
    "train.train_iters=2",
    "train.global_batch_size=4",
    "train.micro_batch_size=2",
    "rollout.max_completion_length=8",
    "evaluate.every=2",
    "evaluate.n=2",
    "evaluate.limit=6",
    "evaluate.max_completion_length=8",
    "checkpoint.save_interval=2",
]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def computed(expression: str) -> float:
    """The value of an expression of numbers and the four operations."""

    def value(node: ast.expr) -> float:
        if isinstance(node, ast.BinOp):
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        assert isinstance(node, ast.Constant)
        return node.value

    return value(ast.parse(expression, mode="eval").body)


@pytest.mark.parametrize(("name", "count"), [("train", 40), ("test", 20)])
def test_the_problems_are_in_the_format_and_their_arithmetic_is_right(name: str, count: int) -> None:
    rows = rows_of(FILES[name])
    assert len(rows) == count
    for row in rows:
        assert row.keys() == {"question", "answer"} and row["question"].endswith("?")
        work, answer = row["answer"].rsplit("\n#### ", 1)
        marks = MARK.findall(work)
        assert marks and work.count("<<") == len(marks)
        for expression, result, behind in marks:
            assert computed(expression) == float(result), row
            assert re.match(r"[\d.]*\d", behind)[0] == result, row
        assert answer == marks[-1][1], row


def test_no_problem_is_in_both_files() -> None:
    questions = [row["question"] for path in FILES.values() for row in rows_of(path)]
    assert len(set(questions)) == len(questions) == 60


def test_the_recipe_is_what_the_page_says() -> None:
    config = load_recipe("train", ROOT / RECIPE, []).config
    assert isinstance(config, DistillationConfig)
    assert (config.evaluate.limit, config.evaluate.n, config.evaluate.max_completion_length) == (20, 4, 96)
    assert (config.train.train_iters, config.train.global_batch_size) == (4, 8)
    assert config.rollout.prefix and config.lora.r
    assert "No gain is expected at this size" in PAGE


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_commands_of_the_page_run(tmp_path: Path) -> None:
    model = smollm2_directory()
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    commands = [
        shlex.split(line) for block in re.findall(r"```bash\n(.*?)```", PAGE, re.S) for line in block.splitlines()
    ]
    fetch, train = commands
    assert fetch == ["./scripts/get_smollm2.sh"] and train[:3] == ["renio", "train", RECIPE]
    got = subprocess.run(
        [str(ROOT / fetch[0]), str(model)],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert got.returncode == 0 and "already there" in got.stdout, got.stderr
    done = warm.run(
        [sys.executable, "-m", "renio_megatron.cli.main", *train[1:], f"model={model}", *SHORT],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": python_path()},
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the first step's 4 completions, " in done.stdout
    for name in ("sampler", "tokens", "rows", "boundary", "ends"):
        assert f"\n  {name} " in done.stdout
    assert "the first step, " not in done.stderr, "a canary warns"
    run = tmp_path / "runs" / "smollm2-gsm8k"
    name = "eval/gsm8k_format_test"
    steps = {row["step"]: row for row in rows_of(run / "metrics.jsonl")}
    assert done.stdout.count("gsm8k_format_test avg@n") == 3, "two evaluations, and the table at the end"
    assert all(math.isfinite(value) for row in steps.values() for value in row.values())
    for step in (0, 2):
        figures = steps[step]
        assert figures[f"{name}/interval_low"] <= figures[f"{name}/avg_at_n"] <= figures[f"{name}/interval_high"]
        assert figures[f"{name}/interval_low"] < figures[f"{name}/interval_high"]
        directory = run / "evaluations" / f"step-{step:07d}"
        assert len(rows_of(directory / "completions.jsonl")) == 12
        line = (
            f"gsm8k_format_test, step {step}: avg@2 {figures[f'{name}/avg_at_n']:.3f}, 95 % interval over 6 problems ["
        )
        assert line in done.stdout
        summary = json.loads((directory / "summary.json").read_text())["benchmarks"]["gsm8k_format_test"]
        assert (summary["problems"], summary["n"]) == (6, 2)
