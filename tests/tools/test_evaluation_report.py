"""The table and the picture of an evaluation, and its progress."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib.image
import pytest
from rich.console import Console

from renio_megatron.errors import CheckpointError
from renio_megatron.evaluation.progress import EvaluationProgress
from renio_megatron.evaluation.summary import BenchmarkSummary
from renio_megatron.tools.report.evaluation import plot_summary, show

ONE = BenchmarkSummary(500, 4, 0.735, {"1": 0.735, "4": 0.84}, 0.78, (0.7, 0.768), 812.3, 0.125, 0.031, 0.0)
PROGRAMS = BenchmarkSummary(164, 1, 0.71, {"1": 0.71}, None, (0.63, 0.78), None, 0.0, 0.0, 0.0)


def console(width: int = 80) -> Console:
    return Console(file=io.StringIO(), width=width, color_system=None, legacy_windows=False)


def test_the_table_fits_a_terminal(tmp_path: Path):
    shown = console()
    show({"math500": ONE, "humanevalplus": PROGRAMS}, tmp_path / ("a long name that must not be wrapped" * 3), shown)
    lines = shown.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines[0].split() == ["benchmark", "problems", "avg@n", "pass@n", "maj@n", "tokens", "cut", "unread"]
    assert lines[1].split() == [
        "math500",
        "500",
        "x",
        "4",
        "0.735",
        "[0.700,",
        "0.768]",
        "0.840",
        "0.780",
        "812",
        "0.125",
        "0.031",
    ]
    assert lines[2].split() == [
        "humanevalplus",
        "164",
        "x",
        "1",
        "0.710",
        "[0.630,",
        "0.780]",
        "0.710",
        "-",
        "-",
        "0.000",
        "0.000",
    ]
    assert lines[-1].endswith("holds summary.json, summary.png, completions.jsonl and problems.jsonl")


def test_the_picture_is_written_or_says_why_not(tmp_path: Path):
    plot_summary({"math500": ONE, "humanevalplus": PROGRAMS}, tmp_path / "new" / "summary.png")
    assert matplotlib.image.imread(tmp_path / "new" / "summary.png").std() > 0.05
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write the picture"):
        plot_summary({"math500": ONE}, tmp_path / "file" / "summary.png")


def test_progress_in_a_log_is_a_line_now_and_then():
    shown, times = console(200), iter([0.0, 4.0, 20.0, 24.0])
    with EvaluationProgress(shown, clock=lambda: next(times)) as progress:
        progress.say("aime25: [30] problems")
        progress.expect(8)
        for _ in range(3):
            progress.add("aime25", [{"correct": True, "tokens": 100}, {"correct": None, "tokens": None}])
    assert shown.file.getvalue().splitlines() == [  # type: ignore[attr-defined]
        "aime25: [30] problems",
        "4/8 aime25, right 0.500, 10 tokens/s, 0 min left",
    ]


def test_progress_on_a_terminal_is_one_line():
    shown = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None, legacy_windows=False)
    with EvaluationProgress(shown) as progress:
        progress.expect(2)
        for _ in range(2):
            progress.add("aime25", [{"correct": True, "tokens": 100}])
    text = shown.file.getvalue()  # type: ignore[attr-defined]
    assert "2/2 aime25, right 1.000" in text and text.count("\n") == 1
