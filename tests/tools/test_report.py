"""Progress, the closing table and the curves."""

import io
import struct

import pytest
from rich.console import Console

from renio_megatron.errors import CheckpointError
from renio_megatron.tools.report.curves import centered_mean, plot_curves
from renio_megatron.tools.report.table import NOTE, RunSummary, comparison_table, summarize
from renio_megatron.training.metrics.progress import Progress, format_duration

ROW = {
    "loss": 0.5,
    "grad_norm": 1.25,
    "weight/mean": 1.0,
    "weight/max": 3.5,
    "rollout/accuracy": 0.25,
    "time/step_s": 1.0,
}


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def plain_lines(total, steps, evaluated=(), seconds=1.0, fail=False):
    """Lines that a non-terminal shows of `steps`, each taking `seconds`."""
    console, clock = Console(file=io.StringIO(), width=40, force_terminal=False), Clock()
    try:
        with Progress("[OPD]", total, console, clock=clock) as progress:
            for step in steps:
                values = {**ROW, "eval/accuracy_greedy": 0.75} if step in evaluated else ROW
                progress.update(step, values)
                clock.now += seconds
            if fail:
                raise RuntimeError
    except RuntimeError:
        pass
    return console.file.getvalue().splitlines()


def steps_of(lines):
    return [line.split("/")[0].split()[-1] for line in lines]


def test_a_log_file_gets_a_line_every_two_seconds_at_most():
    lines = plain_lines(total=8, steps=range(1, 9))
    assert steps_of(lines) == ["1", "3", "5", "7", "8"]


def test_evaluations_and_the_last_step_are_always_shown():
    lines = plain_lines(total=20, steps=range(21), evaluated={0, 7}, seconds=0.01)
    assert steps_of(lines) == ["0", "7", "20"]
    assert "greedy accuracy 0.750" in lines[1]
    assert "greedy" not in lines[2]


def test_last_step_is_shown_when_it_is_done_and_once():
    console, clock = Console(file=io.StringIO(), width=40, force_terminal=False), Clock()
    with Progress("OPD", 2, console, clock=clock) as progress:
        progress.update(1, ROW)
        progress.update(2, ROW)
        assert steps_of(console.file.getvalue().splitlines()) == ["1", "2"]
    assert steps_of(console.file.getvalue().splitlines()) == ["1", "2"]


def test_a_run_that_ends_early_shows_its_last_step():
    lines = plain_lines(total=20, steps=range(1, 4), seconds=0.01, fail=True)
    assert steps_of(lines) == ["1", "3"]


def test_plain_line_holds_every_number():
    # Three steps of 4 s done, 17 to go: 68 s. The console is narrower than the line, which must stay one line.
    lines = plain_lines(total=20, steps=range(1, 4), seconds=4.0)
    assert lines[2] == "[OPD] step  3/20 loss 0.500 grad 1.25 w 1.00/3.50 acc 0.25 1.00s/step eta 1:08"


def test_resumed_run_measures_its_own_pace():
    assert "eta 0:16" in plain_lines(total=20, steps=[15, 16], seconds=4.0)[1]


def test_terminal_shows_one_moving_line():
    console = Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None, legacy_windows=False)
    with Progress("ReNIO", 10, console) as progress:
        progress.update(0, {"eval/accuracy_greedy": 0.1, "eval/accuracy_sampled": 0.05, "eval/aime25/avg_at_n": 0.25})
        progress.update(10, ROW)
    text = console.file.getvalue()
    assert "ReNIO step 0: greedy accuracy 0.100, sampled accuracy 0.050, aime25 avg@n 0.250\n" in text
    assert "10/10 loss 0.500 grad 1.25 w 1.00/3.50 acc 0.25" in text
    # One line break after the evaluation, one at the end: nothing else scrolls.
    assert text.count("\n") == 2


def test_a_terminal_shows_how_far_an_evaluation_is():
    console = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None, legacy_windows=False)
    with Progress("ReNIO", 10, console) as progress:
        progress.evaluating(0, "accuracy, greedy", 8, 64)
    assert " 0/10 evaluating accuracy, greedy: 8/64 completions" in console.file.getvalue()


def test_a_log_says_every_ten_seconds_how_far_an_evaluation_is():
    console, now = Console(file=io.StringIO(), width=120, color_system=None), [0.0]
    with Progress("ReNIO", 10, console, clock=lambda: now[0]) as progress:
        for done in range(1, 8):
            progress.evaluating(5, "aime25", done, 30)
            now[0] += 4.0
        progress.evaluating(5, "gsm8k", 1, 30)  # another one, which has only begun
    assert console.file.getvalue().splitlines() == [
        "ReNIO step 5: evaluating aime25: 4/30 completions",
        "ReNIO step 5: evaluating aime25: 7/30 completions",
    ]


@pytest.mark.parametrize("width", [30, 80])
def test_narrow_terminal_keeps_one_line(width):
    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None, legacy_windows=False)
    with Progress("ReNIO", 1000, console) as progress:
        progress.update(1, ROW)
    assert console.file.getvalue().count("\n") == 1


def test_duration():
    assert [format_duration(seconds) for seconds in (0, 59.6, 3661)] == ["0:00", "1:00", "1:01:01"]


def rows_of_twelve_steps():
    rows = [{"step": 0, "eval/accuracy_greedy": 0.1, "eval/accuracy_sampled": 0.05}]
    for step in range(1, 13):
        row = {"step": step, "loss": 13.0 - step, "weight/mean": 1.0, "weight/max": 2.0, "time/step_s": 0.5}
        row["renio/auc_wrong"] = 0.0 if step <= 6 else 0.8
        rows.append(row)
    del rows[9]["renio/auc_wrong"]
    rows[4]["weight/max"] = 7.0
    rows[6]["eval/accuracy_greedy"] = 0.4
    rows[12]["eval/accuracy_greedy"] = 0.6
    return rows


def test_summary_of_a_run():
    assert summarize(rows_of_twelve_steps(), "ReNIO") == RunSummary(
        name="ReNIO",
        greedy_before=0.1,
        greedy_after=0.6,
        sampled_before=0.05,
        sampled_after=None,
        loss_first=10.0,  # 12, 11, 10, 9, 8
        loss_last=3.0,  # 5, 4, 3, 2, 1
        weight_mean=1.0,
        weight_max=7.0,
        auc_wrong=pytest.approx(0.8),
        seconds=6.0,
    )


def test_summary_of_an_empty_run_has_no_values():
    assert summarize([], "OPD") == RunSummary(name="OPD")


def test_table_has_a_column_a_run_and_dashes_for_missing_values():
    console = Console(file=io.StringIO(), width=120, color_system=None)
    console.print(comparison_table([RunSummary(name="OPD"), summarize(rows_of_twelve_steps(), "ReNIO")]))
    text = console.file.getvalue()
    cells = {}
    for line in text.splitlines():
        if line.startswith("│"):
            label, *rest = (cell.strip() for cell in line.strip("│").split("│"))
            cells[label] = rest
    assert cells == {
        "greedy accuracy, before / after": ["- / -", "0.100 / 0.600"],
        "sampled accuracy, before / after": ["- / -", "0.050 / -"],
        "loss, first / last 5 steps (nats/token)": ["- / -", "10 / 3"],
        "mean weight": ["-", "1.00"],
        "largest weight": ["-", "7.00"],
        "AUC, raw weight against wrong answers": ["-", "0.800"],
        "seconds": ["-", "6.0"],
    }
    assert NOTE in " ".join(text.split())


@pytest.mark.parametrize(
    "runs",
    [
        {"OPD": rows_of_twelve_steps(), "ReNIO": rows_of_twelve_steps() * 5},
        {"one step": rows_of_twelve_steps()[:2]},
        {"only a step": [{"step": 1}], "empty": []},
        {"losses around 0": [{"step": 1, "loss": -0.1}, {"step": 2, "loss": 5.0}, {"step": 3, "loss": None}]},
        {},
    ],
    ids=["full", "one step", "no values", "negative loss", "no run"],
)
def test_curves_are_a_png_of_the_promised_size(tmp_path, runs):
    path = tmp_path / "new" / "curves.png"
    plot_curves(runs, path)
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    rows = 2 if "OPD" in runs or "one step" in runs else 1
    assert struct.unpack(">II", header[16:24]) == (1200, 400 * rows)
    assert [file.name for file in path.parent.iterdir()] == ["curves.png"]


def test_curves_that_cannot_be_written_leave_nothing(tmp_path):
    (tmp_path / "curves.png").mkdir()
    with pytest.raises(CheckpointError, match=r"curves\.png"):
        plot_curves({}, tmp_path / "curves.png")
    assert [file.name for file in tmp_path.iterdir()] == ["curves.png"]


def test_centred_mean_keeps_the_ends():
    assert centered_mean([0.0, 4.0, 8.0, 0.0], 3) == [2.0, 4.0, 4.0, 4.0]
    assert centered_mean([1.0, 5.0], 1) == [1.0, 5.0]


def drawn(monkeypatch, tmp_path, runs):
    """The figure's axes by their titles, caught before it is saved; the right one of the weights has none."""
    from renio_megatron.tools.report import curves

    caught = []
    monkeypatch.setattr(curves, "save_figure", lambda figure, path: caught.append(figure))
    plot_curves(runs, tmp_path / "x.png")
    return {axes.get_title(loc="left"): axes for axes in caught[0].axes}


@pytest.mark.parametrize(("losses", "scale"), [([11.0, 1.0], "log"), ([9.0, 1.0], "linear"), ([9.0, 0.0], "linear")])
def test_loss_axis_is_logarithmic_over_a_decade(monkeypatch, tmp_path, losses, scale):
    rows = [{"step": step, "loss": loss} for step, loss in enumerate(losses, 1)]
    panel = drawn(monkeypatch, tmp_path, {"OPD": rows})["Training loss"]
    assert panel.get_yscale() == scale
    assert panel.lines[0].get_ydata().tolist() == losses
    assert panel.get_ylabel() == "loss [nats/token]"


def test_weights_that_are_all_one_are_left_out(monkeypatch, tmp_path):
    uniform = [{"step": step, "weight/max": 1.0, "weight/ess_frac": 1.0} for step in (1, 2)]
    weighted = [{"step": step, "weight/max": 2.0 * step, "weight/ess_frac": 0.5} for step in (1, 2)]
    axes = drawn(monkeypatch, tmp_path, {"OPD": uniform, "ReNIO": weighted})
    assert [line.get_ydata().tolist() for line in axes["Sample weights"].lines] == [[2.0, 4.0]]
    assert [line.get_ydata().tolist() for line in axes[""].lines] == [[0.5, 0.5]]


def test_detection_panel_marks_chance(monkeypatch, tmp_path):
    rows = [{"step": 1, "renio/auc_wrong": 0.9, "rollout/accuracy": 0.3}]
    panel = drawn(monkeypatch, tmp_path, {"ReNIO": rows})["Does the raw weight find wrong completions?"]
    curves = [list(line.get_ydata()) for line in panel.lines]
    assert curves == [[0.9], [0.3], [0.5, 0.5]]


def test_only_panels_of_what_a_run_has_are_drawn(monkeypatch, tmp_path):
    rows = [
        {"step": 0, "eval/aime25/avg_at_n": 0.25},
        {"step": 1, "loss": 0.5},
        {"step": 2, "eval/aime25/avg_at_n": 1.0},
    ]
    axes = drawn(monkeypatch, tmp_path, {"fine-tuning": rows})
    assert set(axes) == {"Accuracy on held-out problems", "Training loss"}
    (line,) = axes["Accuracy on held-out problems"].lines
    assert (line.get_label(), line.get_ydata().tolist()) == ("fine-tuning, aime25 avg@n", [0.25, 1.0])
