"""The page about evaluations: its commands are run, and its lists are those of the code."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest

from renio_megatron.config.sections.evaluation_job import EvaluationJobConfig
from renio_megatron.evaluation.benchmarks import NAMES
from renio_megatron.evaluation.results import FIELDS
from renio_megatron.evaluation.summary import BenchmarkSummary
from tests.e2e.test_evaluate import done
from tests.helpers.paths import ROOT

PAGE = (ROOT / "docs" / "guides" / "evaluate.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.mark.timeout(300)
def test_its_commands_run_and_end_with_its_table(tmp_path: Path):
    (problems,), (commands,), (table,) = (
        blocks("json"),
        blocks("bash"),
        re.findall(r"```\n(benchmark .*?)```", PAGE, re.S),
    )
    (tmp_path / "chain.jsonl").write_text(problems)
    for command in commands.splitlines():
        program, *arguments = shlex.split(command)
        assert program == "renio"
        said = done(*arguments, cwd=tmp_path)
    assert "20 of 30 drawn before" in said
    assert [line.split() for line in table.splitlines()] == [
        line.split() for line in said.splitlines() if line.startswith(("benchmark ", "chain "))
    ]
    assert json.loads((tmp_path / "figures" / "summary.json").read_text())["benchmarks"]["chain"]["n"] == 6


def test_its_lists_are_the_codes():
    settings = PAGE.partition("## Settings")[2]
    names = {field.name for field in dataclasses.fields(EvaluationJobConfig)} - {"concurrency", "timeout_s"}
    assert names <= {name.removesuffix(".*") for name in re.findall(r"`([a-z0-9_]+(?:\.\*)?)`", settings)}
    row = next(line for line in PAGE.splitlines() if line.startswith("| `completions.jsonl`"))
    assert tuple(re.findall(r"`([a-z_]+)`", row.partition("|")[2].partition("|")[2])) == FIELDS
    figures = [field.name for field in dataclasses.fields(BenchmarkSummary)]
    assert f"{{{', '.join(figures)}}}" in PAGE
    by_name = PAGE.partition("By name:")[2].partition("in any spelling")[0]
    assert set(re.findall(r"`([a-z0-9]+)`", by_name)) == set(NAMES)
