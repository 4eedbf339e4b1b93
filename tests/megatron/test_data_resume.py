"""Rows in each kind of file: a run that was stopped within an epoch ends bit for bit like one of JSON lines."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from renio_megatron.config import DataConfig
from renio_megatron.data.sources.modchain import make_problem
from tests.helpers.multiprocess import Ranks
from tests.helpers.resuming import rows, run, run_config, same
from tests.helpers.row_files import write_rows

SETTINGS = {"jsonl": {"path": "rows.jsonl"}, "gz": {"path": "rows.jsonl.gz"}, "array": {"path": "rows.json"}}
SETTINGS |= {"parquet": {"path": "rows.parquet"}, "datasets": {"path": "rows", "source": "datasets"}}
COUNT = 20
"""Rows: of 5 steps of 8 prompts, the third, which comes after the checkpoint, ends one epoch and begins the next."""


@pytest.fixture(scope="module")
def rows_of(models: Path) -> Path:
    """The folder of the models, with the same rows in each kind of file."""
    problems = [make_problem(1, "train", index) for index in range(COUNT)]
    found = [{"problem": one.prompt, "solution": one.solution, "answer": one.answer} for one in problems]
    for settings in SETTINGS.values():
        write_rows(models / settings["path"], found, row_group_size=3)
    return models


def _run(folder: Path, format_: str, stop_before: int | None = None, name: str | None = None) -> dict[str, Any]:
    settings = {"source": "jsonl", "seed": 5, "grader": "modchain", **SETTINGS[format_]}
    path = str(folder / settings.pop("path"))
    config = run_config(folder, name or f"parts, {format_}", data=DataConfig(path=path, eval_path=path, **settings))
    return run(replace(config, rollout=replace(config.rollout, log=True)), stop_before=stop_before)


def _all(folder: Path) -> dict[str, dict[str, Any]]:
    """Format -> what its resumed run ended with; `whole`: a run of JSON lines that was not stopped."""
    found = {"whole": _run(folder, "jsonl", name="whole")}
    for format_ in SETTINGS:
        stopped = _run(folder, format_, 4)
        assert (stopped["outcome"], stopped["step"]) == ("stopped", 3)
        found[format_] = _run(folder, format_)
    return found


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("format_", SETTINGS)
def test_a_run_stopped_within_an_epoch_ends_like_a_whole_one_of_json_lines(
    rows_of: Path, two_ranks: Ranks, format_: str
) -> None:
    for rank in two_ranks.once(_all, rows_of):
        found, whole = rank[format_], rank["whole"]
        assert (found["outcome"], found["step"], whole["step"]) == ("resumed", 5, 5)
        assert same(found["parameters"], whole["parameters"])
    assert rows(rows_of, f"parts, {format_}") == rows(rows_of, "whole")
    drawn = [_rollouts(rows_of / name) for name in (f"parts, {format_}", "whole")]
    assert drawn[0] == drawn[1] and len(drawn[0]) == 5 * 8


def _rollouts(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "rollouts.jsonl").read_text().splitlines()]
