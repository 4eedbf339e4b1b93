"""What a run says about its weights at the start, and when it warns; every expected text is written by hand."""

from __future__ import annotations

import io
import logging
import sys
from typing import Any

import pytest
import torch
from rich.console import Console

from renio_megatron.cli import worker
from renio_megatron.config import LossConfig, WeightingConfig
from renio_megatron.config.sections.weighting import RenioWeighting
from renio_megatron.training.metrics.progress import Progress
from renio_megatron.training.metrics.weights import renio_metrics
from renio_megatron.training.notices.observer import NOTICES, Notices
from renio_megatron.training.notices.rows import Watched
from renio_megatron.training.weights_line import weights_line, weights_price
from tests.fakes.strategies import SeenWeighting


@pytest.mark.parametrize(
    ("changes", "data_ranks", "expected"),
    [
        (
            {},
            4,
            "weights: renio, divided by the mean of all 64 sequences of the step (4 data-parallel ranks x 16), "
            "capped at 10",
        ),
        ({"cap": None}, 1, "weights: renio, divided by the mean of all 64 sequences of the step, not capped"),
        (
            {"normalize": "group", "group_size": 8},
            2,
            "weights: renio, divided by the mean of each group of 8 consecutive sequences (8 groups a step), "
            "capped at 10",
        ),
        (
            {"normalize": "group", "group_size": 64, "cap": 2.5},
            1,
            "weights: renio, divided by the mean of each group of 64 consecutive sequences (1 group a step), "
            "capped at 2.5",
        ),
        (
            {"normalize": "group", "group_size": 1},
            1,
            "weights: renio, divided by the mean of each group of 1 consecutive sequences (64 groups a step), so every "
            "weight is 1: plain distillation, capped at 10",
        ),
        (
            {"normalize": "ema", "ema_decay": 0.9},
            4,
            "weights: renio, divided by the moving average, decay 0.9, of batch means of 64 sequences, not capped",
        ),
        # exp(2.5) = 12.18
        ({"normalize": "none"}, 4, "weights: renio, raw: not divided by any mean, not capped, at most 12.18"),
        (
            {"normalize": "none", "ceiling": float("inf")},
            4,
            "weights: renio, raw: not divided by any mean, not capped, at most inf",
        ),
        ({"name": "uniform"}, 4, "weights: all 1 (uniform): plain distillation"),
        (
            {"name": "product", "factors": (WeightingConfig(name="uniform"), WeightingConfig())},
            1,
            "weights: renio, divided by the mean of all 64 sequences of the step, capped at 10",
        ),
        (
            {"name": "product", "factors": (WeightingConfig(name="uniform"),)},
            1,
            "weights: all 1 (uniform): plain distillation",
        ),
        (
            {"name": "student_entropy"},
            4,
            "weights: student_entropy of each token, divided by the mean over its sequence",
        ),
        (
            {"name": "student_entropy", "normalize": "batch"},
            1,
            "weights: student_entropy of each token, divided by the mean of all tokens of 64 sequences of the step",
        ),
        (
            {"name": "permuted", "of": WeightingConfig(cap=3.0)},
            1,
            "weights: permuted renio, divided by the mean of all 64 sequences of the step, capped at 3",
        ),
        (
            {"name": "product", "factors": (WeightingConfig(), WeightingConfig(name="length", cap=None))},
            1,
            "weights: renio, divided by the mean of all 64 sequences of the step, capped at 10; times length, divided "
            "by the mean of all 64 sequences of the step, not capped; their product divided by its mean once more",
        ),
    ],
)
def test_the_line_at_the_start(changes, data_ranks, expected):
    assert weights_line(WeightingConfig(**changes), 64, data_ranks) == expected


def test_the_price_of_what_a_weighting_needs():
    assert weights_price(WeightingConfig()) is weights_price(WeightingConfig(name="length")) is None
    price = weights_price(WeightingConfig(name="permuted", of=WeightingConfig(name="student_entropy")))
    assert price == (
        "weights: student_entropy of each token: the student reads every step's completions once more before the "
        "update, with the LM head (time/score_s)"
    )
    both = weights_price(SeenWeighting(wants=("divergence", "student_entropy", "position")))
    assert (
        "divergence and student_entropy of each token" in both
        and "the student reads" in both
        and "with both LM heads" in both
    )
    again = weights_price(SeenWeighting(wants=("teacher_entropy",)), teacher_reads_again=True)
    assert "student and teacher read every step's completions once more" in again


@pytest.mark.parametrize(
    "around",
    [
        {"name": "product", "factors": (WeightingConfig(threshold=0.5), WeightingConfig(name="student_entropy"))},
        {"name": "permuted", "of": WeightingConfig(threshold=0.5)},
    ],
)
def test_renio_inside_another_weighting_is_watched_as_well(around):
    ((step, text),) = told([NOBODY] * 30, **around)
    assert step == 5 and "weighting.threshold=0.5 nats" in text
    ((_, text),) = told([{"renio/ceiling_frac": 1.0}] * 30, **around)
    assert text.startswith("every raw weight was at the ceiling")
    ((_, text),) = told([{"weight/cap_frac": 0.5}] * 30, **around)
    assert "can reach a cap of 10" in text and "lower weighting.ceiling" in text


def test_a_step_in_which_everything_weighs_nothing():
    rows = [{"weight/max": 0.5}, {"weight/max": 0.0}, {"weight/max": 0.0}]
    ((step, text),) = told(rows, name="length")
    assert step == 2
    assert text.startswith("every sequence of step 2 weighs 0: weighting=length found nothing in it that counts")


QUIET = {"renio/unit_weight_frac": 0.5, "renio/ceiling_frac": 0.5, "weight/cap_frac": 0.0, "weight/mean": 1.0}


def told(
    rows: list[dict[str, float]],
    *,
    first: int = 1,
    loss: LossConfig | None = None,
    num_sequences: int = 64,
    **weighting: Any,
) -> list:
    """(step, text) of each warning that a run with these steps gives."""
    said: list[tuple[int, str]] = []
    step = 0
    watched = Watched(WeightingConfig(**weighting), loss or LossConfig(), num_sequences)
    notices = Notices(watched, lambda text: said.append((step, text)))
    notices.update(0, {"eval/accuracy_greedy": 0.5})
    for step, row in enumerate(rows, first):
        notices.update(step, {**QUIET, **row})
    return said


def test_a_healthy_run_is_told_nothing():
    assert told([{}] * 50) == []
    assert told([{"loss/entry_clip_frac": 0.9}] * 50, loss=LossConfig(entry_clip=0.05)) == []


NOBODY = {"renio/unit_weight_frac": 1.0, "loss/kl": 0.25}


def test_five_steps_without_a_pivotal_token_are_told_once():
    assert told([NOBODY] * 30, first=3) == [
        (
            7,
            "no token was pivotal in steps 3 to 7: every raw weight was 1, and the weights change nothing against "
            "plain distillation. No log ratio reached weighting.threshold=0.8 nats (divergence in step 7: 0.25 "
            "nats/token). Lower weighting.threshold; where the divergence is close to 0, teacher and student agree: "
            "check teacher.model and data.teacher_template, or stop, if the student has learned what the teacher "
            "knows.",
        )
    ]


def test_steps_that_were_left_out_say_nothing_about_pivotal_tokens():
    assert told([{**NOBODY, "train/skipped_frac": 1.0}] * 30) == []
    assert [step for step, _ in told([{**NOBODY, "train/skipped_frac": 0.0}] * 30)] == [5]


@pytest.mark.parametrize("name", ["renio/unit_weight_frac", "renio/ceiling_frac"])
def test_steps_must_follow_each_other(name):
    full = {name: 1.0}
    assert told([full] * 4) == []
    assert told(([full] * 4 + [{name: 63 / 64}]) * 10) == []
    assert [step for step, _ in told([full] * 4 + [{name: 0.99}] + [full] * 5)] == [10]


def test_plain_distillation_has_no_weights_to_warn_about():
    rows = [{"renio/unit_weight_frac": 1.0, "renio/ceiling_frac": 1.0, "weight/cap_frac": 0.5}] * 40
    assert told(rows, name="uniform") == []


def test_weights_that_are_all_at_the_ceiling():
    rows = [{"renio/ceiling_frac": 1.0, "loss/kl": 7.5}] * 9
    # exp(3 / 1.5) = e^2 = 7.389
    ((step, text),) = told(rows, ceiling=3.0, temperature=1.5)
    assert step == 5
    assert text == (
        "every raw weight was at the ceiling in steps 1 to 5: exp(3 / 1.5) = 7.389. So equal weights become 1 when "
        "they are divided by their mean, as in plain distillation (divergence in step 5: 7.5 nats/token). Raise "
        "weighting.ceiling, and check that teacher and student belong together: one tokenizer, one chat template, "
        "loss.temperature."
    )
    ((_, text),) = told(rows, ceiling=3.0, temperature=1.5, normalize="none")
    assert "every sequence weighs 7.389, which is a larger learning rate and nothing else" in text


def test_a_cap_that_cuts_often():
    # Of weights with mean 1 a tenth can reach a cap of 10; the warning begins above a fifth of that, 2 %.
    assert told([{"weight/cap_frac": 0.02}] * 60, cap=10.0) == []
    assert told([{"weight/cap_frac": 0.1}] * 19, cap=10.0) == []
    assert told([{"weight/cap_frac": 0.1}] * 40, cap=None) == []
    assert told([{"weight/cap_frac": 0.1}] * 40, cap=10.0, normalize="ema") == []
    # A mean of (0.01 + 0.05) / 2 = 3 %.
    rows = [{"weight/cap_frac": share, "weight/mean": 0.9} for share in (0.01, 0.05)] * 20
    assert told(rows, cap=10.0) == [
        (
            20,
            "the cap cut 3.0% of the weights in steps 1 to 20 and left a mean weight of 0.9; at most 10.0% of weights "
            "with mean 1 can reach a cap of 10. The sequences that stand out most are held back, and the mean weight "
            "below 1 makes every step smaller. Raise weighting.cap or set it to null, lower weighting.ceiling, or "
            "raise weighting.temperature.",
        )
    ]
    assert told(rows, cap=2.0) == [], "3 % of at most 50 %"


def test_an_entry_clip_that_removes_the_pivots():
    name, loss = "renio/pivot_gradient_frac", LossConfig(entry_clip=0.05)
    assert told([{name: 0.5}] * 40, loss=loss) == []
    assert told([{name: 0.1}] * 40) == [], "without a clip there is nothing to change"
    # In steps without a pivotal token the metric is not there; (0.1 + 0.2 + 0.3 + 0.2 + 0.2) / 5 = 20 %.
    rows = [{name: 0.1}, {}, {name: 0.2}, {}, {name: 0.3}, {name: 0.2}, {}, {name: 0.2}, {name: 0.2}]
    assert told(rows, loss=loss) == [
        (
            8,
            "loss.entry_clip=0.05 and loss.entry_floor=0 left 20.0% of the gradient's norm at pivotal tokens in steps "
            "1 to 8: the tokens that give a sequence its weight hardly teach the student. Raise loss.entry_clip, or "
            "set it to null, which removes both bounds.",
        )
    ]
    ((_, text),) = told(rows, loss=LossConfig(entry_clip=0.05, entry_floor=None), name="uniform")
    assert text.startswith("loss.entry_clip=0.05 left 20.0% of")


CUT = {"rollout/truncated_frac": 1.0, "rollout/length": 48.0}


def test_completions_that_are_nearly_all_cut_are_told_after_three_steps():
    rows = [{**CUT, "rollout/truncated_frac": share} for share in (1.0, 0.94, 1.0, 0.95, 0.99, 1.0)]
    ((step, text),) = told(rows)
    assert step == 5
    # (1 + 0.95 + 0.99) / 3 = 98 %
    assert text.startswith("98.0% of the completions were cut in steps 3 to 5, at 48 tokens on average: ")
    for words in ("rollout.max_completion_length", "rollout.stop_token_ids", "rollout.prefix=true"):
        assert words in text
    assert told([{**CUT, "rollout/truncated_frac": 0.94}] * 30) == []


def test_a_run_on_prefixes_is_not_told_that_they_are_cut():
    said: list[str] = []
    notices = Notices(Watched(WeightingConfig(), LossConfig(), is_prefix=True), said.append)
    for step in range(1, 9):
        notices.update(step, CUT)
    assert said == []


def test_failures_of_the_grader_are_told_at_the_first():
    rows = [{"rollout/grader_error_frac": share} for share in (0.0, 0.125, 0.5)]
    ((step, text),) = told(rows)
    assert step == 2
    assert text.startswith("the grader failed on 12.5% of the completions of step 2; they count as wrong")


@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_the_share_at_the_ceiling(temperature):
    # Mean log ratios: at the ceiling; less than rounding below it; clearly below; at the threshold; none.
    log_ratio = torch.tensor([2.3, 2.3 - 1e-6, 2.29, 0.8])
    raw = torch.cat(((log_ratio / temperature).exp(), torch.ones(1)))
    metrics = renio_metrics(raw, RenioWeighting(ceiling=2.3, temperature=temperature))
    assert metrics["renio/ceiling_frac"] == 2 / 5
    assert metrics["renio/unit_weight_frac"] == 1 / 5
    low = RenioWeighting(threshold=-1.0, ceiling=-0.5)
    assert renio_metrics(torch.ones(4), low)["renio/ceiling_frac"] == 0.0


@pytest.mark.parametrize("terminal", [False, True])
def test_a_warning_is_seen_beside_the_progress(terminal, monkeypatch, capsys):
    package = logging.getLogger("renio_megatron")
    monkeypatch.setattr(package, "handlers", [])
    monkeypatch.setattr(package, "propagate", True)
    worker.show_warnings()
    console = Console(file=io.StringIO(), width=200, force_terminal=terminal)
    stderr = sys.stderr
    with Progress("OPD", 3, console) as progress:
        progress.update(1, {"loss": 0.5})
        Notices(Watched()).update(1, {"rollout/grader_error_frac": 0.25})
        progress.update(2, {"loss": 0.25})
    assert sys.stderr is stderr
    seen = console.file.getvalue() if terminal else capsys.readouterr().err
    assert seen.count("warning: the grader failed on 25.0% of the completions of step 1") == 1
    monkeypatch.setenv("RANK", "3")
    logging.getLogger("renio_megatron.evaluation.graders").warning("text %d", 7)
    assert capsys.readouterr().err == "[rank 3] warning: text 7\n"


ALIKE = {"weight/max": 1.0, "weight/mean": 1.0}


def test_weights_that_are_all_equal_are_told_where_the_strategy_is_not_uniform():
    ((step, text),) = told([ALIKE] * 9, name="length")
    assert step == 5
    assert text.startswith("all sequences had the same weight in steps 1 to 5, so weighting=length changes nothing")
    assert "weighting.group_size" in text
    assert told([ALIKE] * 9, name="uniform") == []
    assert told([ALIKE] * 9, name="student_entropy") == [], "its weights are of tokens"
    assert told([{"weight/max": 1.00001, "weight/mean": 1.0}] * 9, name="length") == []
    assert [step for step, _ in told([{"weight/max": 1.0000005, "weight/mean": 1.0}] * 9, name="length")] == [5]


@pytest.mark.parametrize("name", ["renio/unit_weight_frac", "renio/ceiling_frac"])
def test_equal_weights_are_told_once_by_the_notice_that_knows_why(name):
    ((_, text),) = told([{**ALIKE, name: 1.0}] * 9)
    assert not text.startswith("all sequences had the same weight")


def test_completions_that_are_all_equal():
    rows = [{"rollout/distinct": float(count)} for count in (1, 1, 2, 1, 1, 1, 1, 1)]
    ((step, text),) = told(rows)
    assert step == 8 and text.startswith("all completions of a step were equal in steps 4 to 8")
    assert "rollout.temperature" in text and "renio preview" in text
    assert told(rows, num_sequences=1) == [], "one is always equal to itself"


@pytest.mark.parametrize(("value", "words"), [(0.0, "no completion was right"), (1.0, "every completion was right")])
def test_an_accuracy_that_stands_for_fifty_steps(value, words):
    row = {"rollout/accuracy": value}
    assert told([row] * 49) == []
    assert told(([row] * 49 + [{"rollout/accuracy": 0.5}]) * 3) == []
    ((step, text),) = told([row] * 120)
    assert step == 50 and text.startswith(f"{words} in steps 1 to 50")


def test_answers_that_no_grader_reads():
    ((step, text),) = told([{"rollout/no_answer_frac": share} for share in (1.0, 0.9, *[1.0] * 6)])
    assert step == 7
    assert text.startswith("no grader read an answer in any completion in steps 3 to 7 (rollout/no_answer_frac)")
    row = {"rollout/no_answer_frac": 0.5, "teacher/math/no_answer_frac": 0.0, "teacher/code/no_answer_frac": 1.0}
    ((step, text),) = told([row] * 9)
    assert step == 5
    assert "in any completion of the records of 'code' in steps 1 to 5 (teacher/code/no_answer_frac)" in text


def test_a_student_that_stands_still():
    def rows(*losses, gradient=0.0):
        return [{"loss": loss, "grad_norm": gradient} for loss in losses]

    # The losses of examples/modchain.yaml at train.lr=1000, from its third step on.
    flat = [2.716, 2.719, 2.724, 2.731, 2.719, 2.723, 2.725, 2.726, 2.721, 2.708, 2.726]
    ((step, text),) = told([*rows(0.17, 2e5, gradient=3.0), *rows(*flat)])
    assert step == 12
    assert text.startswith("the gradient was exactly 0 in steps 3 to 12, and the loss stays near 2.71: ")
    assert "train.lr" in text and "checkpoint.load" in text
    assert told(rows(*flat, gradient=1e-9)) == []
    assert told(rows(*[2.5, 2.7] * 8)) == [], "losses that differ by more than 5 %"
    ((_, text),) = told(rows(*[0.0] * 10))
    assert "With a loss of 0 student and teacher agree" in text


def test_each_notice_has_a_threshold_for_the_page():
    assert len({notice.what for notice in NOTICES}) == len(NOTICES) == 12
    assert all(notice.when.startswith(("in ", "at least", "more than", "it leaves")) for notice in NOTICES)
