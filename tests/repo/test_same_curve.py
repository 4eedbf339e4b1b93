"""What scripts/same_curve.sh calls the same, and that a learning rate changed in its seventh digit is seen."""

from __future__ import annotations

import math
import subprocess

import pytest

from tests.helpers import same_curve, warm
from tests.helpers.commits import tree_of
from tests.helpers.paths import ROOT
from tests.helpers.same_curve import BASE, compare, differences, in_words_of, main

LR = BASE["train"]["lr"]


def test_a_learning_rate_changed_by_1e_6_is_seen_in_the_loss(capsys):
    assert compare(ROOT, ROOT, ["tp1"], start=warm.run)
    assert "same: tp1: 11 rows of metrics.jsonl and 160 rows of rollouts.jsonl" in capsys.readouterr().out
    assert not compare(ROOT, ROOT, ["tp1"], changes={"train": {"lr": LR * (1 + 1e-6)}}, start=warm.run)
    out = capsys.readouterr().out
    assert out.startswith("differs: tp1: 11 rows")
    assert "metrics.jsonl: row 2 (step 2): loss " in out, out


ROWS = [{"step": 0, "loss": 0.5}, {"step": 1, "loss": math.nan, "ids": [1, 2]}]


@pytest.mark.parametrize(
    ("after", "relative", "expected"),
    [
        (ROWS, 0.0, []),
        (ROWS[:1], 0.0, ["2 rows -> 1"]),
        ([{"step": 0, "loss": 0.5 + 2**-53}, ROWS[1]], 0.0, ["row 0 (step 0): loss 0.5 -> 0.5000000000000001"]),
        ([{"step": 0, "loss": 0.5 + 2**-53}, ROWS[1]], 1e-15, []),
        ([{"step": 0, "loss": 0.5 + 2**-49}, ROWS[1]], 1e-15, ["row 0 (step 0): loss 0.5 -> 0.5000000000000018"]),
        ([{"step": 0}, ROWS[1]], 0.0, ["row 0 (step 0): loss 0.5 -> (nothing)"]),
        ([{**ROWS[0], "new": 1}, ROWS[1]], 0.0, ["row 0 (step 0): new (nothing) -> 1"]),
        ([ROWS[0], {**ROWS[1], "ids": [1, 3]}], 1.0, ["row 1 (step 1): ids [1, 2] -> [1, 3]"]),
        ([ROWS[0], {**ROWS[1], "loss": 0.5}], 1.0, ["row 1 (step 1): loss nan -> 0.5"]),
    ],
)
def test_rows_are_compared_value_by_value(after, relative, expected):
    assert differences(ROWS, after, relative) == expected


def test_a_recipe_is_written_in_the_words_of_its_tree(tmp_path, monkeypatch):
    monkeypatch.setattr(same_curve, "RENAMED_KEYS", {"weighting.normalize": "weighting.normalise"})
    recipe = {"weighting": {"normalize": "batch"}}
    for tree, word in (("old", "normalise"), ("new", "normalize")):
        (tmp_path / tree / "renio_megatron").mkdir(parents=True)
        (tmp_path / tree / "renio_megatron" / "settings.py").write_text(f'class A:\n    {word}: str = "batch"\n')
        assert in_words_of(tmp_path / tree, recipe) == {"weighting": {word: "batch"}}
    assert recipe == {"weighting": {"normalize": "batch"}}


def test_renamed_metrics_are_read_under_their_new_names_and_the_clock_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(same_curve, "RENAMED_METRICS", {"weight/max": "weight/max"})
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "weight/max": 2.0, "time/step_s": 1.0, "tokens_per_s": 9.0}\n')
    assert same_curve.read_rows(path) == [{"step": 1, "weight/max": 2.0}]


def test_an_unknown_commit_or_set_up_is_refused(capsys):
    with pytest.raises(SystemExit) as error, tree_of("no-such-commit"):
        pass
    assert error.value.code == 2
    assert "there is no commit 'no-such-commit' here" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["HEAD", "tp7"])
    assert "there is no set-up 'tp7'; there are tp1, tp2-pp2" in capsys.readouterr().err


def test_a_run_that_fails_shows_its_message(tmp_path):
    with pytest.raises(SystemExit, match=r"(?s)train\.lr must be.*'tp1' does not run in"):
        same_curve.run(ROOT, "tp1", tmp_path / "run", {"train": {"lr": -1.0}}, start=warm.run)


def test_the_tree_of_a_commit_is_its_own_and_is_gone_afterwards():
    if subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True).returncode:
        pytest.skip("not a git checkout")
    with tree_of("HEAD") as tree:
        assert (tree / "renio_megatron" / "__init__.py").is_file()
    assert not tree.exists()
