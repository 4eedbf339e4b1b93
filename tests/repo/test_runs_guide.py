"""docs/guides/runs.md: each of its commands, in order, and the lines that it promises."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.helpers import warm
from tests.helpers.jobs import python_path
from tests.helpers.paths import ROOT
from tests.helpers.resuming import TIMES

TEXT = (ROOT / "docs" / "guides" / "runs.md").read_text()
FENCES = re.findall(r"```(\w*)\n(.*?)\n```", TEXT, flags=re.DOTALL)
BLOCKS = [content for language, content in FENCES if language == "bash"]
PROMISED = [content for language, content in FENCES if not language]
# Stands in the place of the page's pause, which is for a person: until a step was done.
UNTIL_A_STEP = """until grep -qs '"step": 2,' runs/stopped/metrics.jsonl; do sleep 0.1; done"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[int, str]]]:
    """The folder in which the commands ran, and the exit code and the output of each fence."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "examples").symlink_to(ROOT / "examples")
    program = folder / "bin" / "renio"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{warm.interpreter(folder)}" -m renio_megatron.cli.main "$@"\n')
    program.chmod(0o755)
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"}
    found = []
    for block in BLOCKS:
        done = subprocess.run(
            ["bash", "-euc", block.replace("sleep 20", UNTIL_A_STEP)],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=200,
            check=False,
        )
        found.append((done.returncode, done.stdout))
        if done.returncode not in (0, 143):
            break
    return folder, found


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_each_command_ends_as_the_page_says(said: tuple[Path, list[tuple[int, str]]]) -> None:
    _, found = said
    assert [code for code, _ in found] == [143 if "kill -TERM" in block else 0 for block in BLOCKS], found[-1]
    assert len(BLOCKS) == 9 and "Traceback" not in "".join(text for _, text in found)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_lines_of_the_page_are_those_that_are_printed(said: tuple[Path, list[tuple[int, str]]]) -> None:
    folder, found = said
    text = "".join(text for _, text in found)
    assert len(PROMISED) == 3
    stopped = re.search(r"stopped by SIGTERM after step (\d+); the same command resumes it", text)
    assert stopped is not None, text
    for line in PROMISED:
        if "runs/stopped" in line:  # where the moment decides which step it was
            line = re.sub(r"\b7\b", stopped[1], line).replace("iter_0000007", f"iter_{int(stopped[1]):07d}")
        assert line in text.splitlines()
    warnings = [line for line in text.splitlines() if line.startswith("warning: ")]
    assert all("resumes with other settings" in line for line in warnings), "no notice"
    whole, resumed = (_rows(folder / "runs" / name, 20) for name in ("mine", "stopped"))
    assert whole == resumed
    assert [row["step"] for row in _rows(folder / "runs" / "mine", 24)] == list(range(25))
    assert json.loads((folder / "runs" / "moved" / "finished.json").read_text())["step"] == 4
    assert (folder / "models" / "second" / "config.json").is_file()


def _rows(run: Path, last: int) -> list[dict[str, float]]:
    """Metrics of the steps up to `last`, without times."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows if row["step"] <= last]
