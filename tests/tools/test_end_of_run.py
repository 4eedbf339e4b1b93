"""What a run says when it is complete."""

from __future__ import annotations

import json
import logging

from renio_megatron.tools.report.end_of_run import report_end

ROWS = [
    {"step": 0, "eval/accuracy_greedy": 0.25, "eval/accuracy_sampled": 0.125, "eval/gsm8k/avg_at_n": 0.5},
    {"step": 1, "loss": 4.0, "time/step_s": 2.0, "weight/max": 3.0, "weight/mean": 1.0},
    {"step": 2, "loss": 2.0, "time/step_s": 1.5, "weight/max": 2.5, "weight/mean": 1.0}
    | {"eval/accuracy_greedy": 0.5, "eval/accuracy_sampled": 0.375, "eval/gsm8k/avg_at_n": 0.75},
]


def _run(directory):
    (directory / "checkpoints").mkdir(parents=True)
    (directory / "config.yaml").write_text("")
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return directory


def test_before_and_after_curves_and_where_things_are(tmp_path, capsys):
    said = []
    report_end(_run(tmp_path / "run"), "$HOME/run", "renio", said.append)
    cells = [line.strip("│").split("│") for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert {name.strip(): value.strip() for name, value in cells} == {
        "gsm8k avg@n, before / after": "0.500 / 0.750",
        "greedy accuracy, before / after": "0.250 / 0.500",
        "sampled accuracy, before / after": "0.125 / 0.375",
        "loss, first / last 5 steps (nats/token)": "3 / 3",
        "mean weight": "1.00",
        "largest weight": "3.00",
        "seconds": "3.5",
    }
    assert said == [
        "done: $HOME/run holds config.yaml, metrics.jsonl, curves.png, checkpoints/",
        "the model: `renio export $HOME/run DIRECTORY`; more steps: the same command with a larger train.train_iters",
    ]
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_that_cannot_be_written_fails_no_run(tmp_path, caplog):
    (_run(tmp_path) / "curves.png").mkdir()
    said = []
    with caplog.at_level(logging.WARNING):
        report_end(tmp_path, "run", "renio", said.append)
    assert "cannot write the picture" in caplog.text
    assert said[0].startswith("done: run holds config.yaml, metrics.jsonl")
