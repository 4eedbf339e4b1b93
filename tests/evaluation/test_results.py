"""The directory of an evaluation: rows, resumption, refusals, figures by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from renio_megatron.errors import CheckpointError, ConfigError, DataError
from renio_megatron.evaluation.graders.grader import UNCLOSED_THINKING
from renio_megatron.evaluation.results import FIELDS, Results, saved_date
from renio_megatron.evaluation.summary import pass_rates, summarize

SETTINGS = {"model": "abc", "temperature": 1.0}


def row(index: int, draw: int, correct: bool | None = True, **more: Any) -> dict[str, Any]:
    base = dict.fromkeys(FIELDS) | {"benchmark": "b", "index": index, "draw": draw, "correct": correct}
    return base | {"answer": "4" if correct else "5", "reason": "", "finish_reason": "stop", "tokens": 10} | more


def test_rows_are_kept_and_sorted_at_the_end(tmp_path):
    results = Results(tmp_path / "out", SETTINGS)
    results.add([row(1, 0), row(0, 1)])
    results.add([row(0, 0), row(0, 0, benchmark="a")])
    results.close()
    again = Results(tmp_path / "out", SETTINGS)
    assert set(again.rows) == {("b", 1, 0), ("b", 0, 1), ("b", 0, 0), ("a", 0, 0)}
    again.finish(["b"], {"benchmarks": {}}, [{"problem": "?", "pass_rate": 0.5}])
    kept = [json.loads(line) for line in again.completions.read_text().splitlines()]
    assert [(one["benchmark"], one["index"], one["draw"]) for one in kept] == [
        ("b", 0, 0),
        ("b", 0, 1),
        ("b", 1, 0),
        ("a", 0, 0),
    ]
    assert list(kept[0]) == list(FIELDS)
    assert json.loads((tmp_path / "out" / "problems.jsonl").read_text()) == {"problem": "?", "pass_rate": 0.5}
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == {"benchmarks": {}}


def test_a_half_written_row_is_drawn_again(tmp_path):
    Results(tmp_path, SETTINGS).add([row(0, 0), row(1, 0)])
    path = tmp_path / "completions.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    assert set(Results(tmp_path, SETTINGS).rows) == {("b", 0, 0)}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({**SETTINGS, "model": "xyz"}, ['model="abc"', 'now it is "xyz"', "--output"]),
        ({**SETTINGS, "temperature": 0.6}, ["temperature=1.0", "now it is 0.6"]),
        ({**SETTINGS, "date": "2026-11-27"}, ["date=null"]),
    ],
)
def test_another_model_or_other_sampling_is_refused(tmp_path, settings, words):
    Results(tmp_path, SETTINGS).add([row(0, 0)])
    with pytest.raises(ConfigError) as caught:
        Results(tmp_path, settings)
    assert all(word in str(caught.value) for word in words), caught.value


def test_what_is_no_evaluation_is_refused(tmp_path):
    (tmp_path / "completions.jsonl").write_text('{"text": "mine"}\n')
    with pytest.raises(ConfigError, match=r"without the settings\.json"):
        Results(tmp_path, SETTINGS)
    (tmp_path / "settings.json").write_text(json.dumps(SETTINGS))
    with pytest.raises(DataError, match=r"completions\.jsonl:1: it is no completion"):
        Results(tmp_path, SETTINGS)
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"settings\.json cannot be read"):
        Results(tmp_path, SETTINGS)


def test_other_problems_under_the_same_name_are_refused(tmp_path):
    results = Results(tmp_path, SETTINGS)
    results.require_same_problems("b", ["p", "q"])
    for more in (["p"], ["p", "q", "r"], ["p", "q"]):
        results.require_same_problems("b", more)
    results.require_same_problems("a", ["x"])
    with pytest.raises(ConfigError, match="problem 2 on"):
        results.require_same_problems("b", ["p", "q", "s"])


def test_two_processes_do_not_write_the_same_directory(tmp_path):
    results = Results(tmp_path, SETTINGS)
    program = (
        "import sys; from pathlib import Path\n"
        "from renio_megatron.evaluation.results import Results\n"
        f"Results(Path({str(tmp_path)!r}), {SETTINGS!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 1 and f"is being written by process {os.getpid()}" in done.stderr
    results.close()


def test_a_directory_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        Results(tmp_path / "file" / "out", SETTINGS)


def test_the_date_of_the_prompts_is_kept(tmp_path: Path):
    assert saved_date(tmp_path) is None
    Results(tmp_path, {**SETTINGS, "date": "2026-11-27T10:00:00"}).close()
    assert str(saved_date(tmp_path)) == "2026-11-27 10:00:00"


def test_figures_by_hand():
    rows = [
        *[row(0, draw, True) for draw in range(4)],
        *[row(1, draw, draw == 0) for draw in range(4)],
        row(2, 0, False, answer=None, finish_reason="length", tokens=30),
        row(2, 1, False, answer=None, reason=UNCLOSED_THINKING),
        row(2, 2, False, answer=None),
        row(2, 3, None, answer=None),
    ]
    found = summarize(rows, str.__eq__)
    assert (found.problems, found.n) == (3, 4)
    assert found.avg_at_k == pytest.approx((1 + 0.25 + 0) / 3)
    # Of problem 1's six pairs three hold the right one.
    assert found.pass_at_k == pytest.approx({"1": 1.25 / 3, "2": 1.5 / 3, "4": 2 / 3})
    assert found.majority_at_k == pytest.approx(1 / 3)  # of problem 1 "5" has three votes of four
    assert found.length == pytest.approx((11 * 10 + 30) / 12)
    assert found.cut_frac == pytest.approx(2 / 12)
    assert (found.unparsable_frac, found.ungraded_frac) == (pytest.approx(1 / 12), pytest.approx(1 / 12))
    assert 0 < found.interval[0] < found.avg_at_k < found.interval[1] < 1
    assert pass_rates(rows) == {0: 1.0, 1: 0.25, 2: 0.0}


def test_figures_of_programs_and_of_servers_that_count_no_tokens():
    found = summarize([row(0, 0, tokens=None), row(1, 0, False)], None)
    assert found.majority_at_k is None and found.length is None
    assert found.as_json()["pass_at_k"] == {"1": 0.5}
