"""The loop and its two algorithms on fakes: shares, cursor, what is due when, weights, metrics; the learning rate."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from renio_megatron import distillation_loss
from renio_megatron.config import LossConfig, TrainConfig, WeightingConfig
from renio_megatron.config.sections.weighting import RenioWeighting
from renio_megatron.errors import NumericsError
from renio_megatron.parallel.layout import ParallelLayout
from renio_megatron.training.algorithms.sft import Sft
from renio_megatron.training.lr_schedule import learning_rate
from renio_megatron.training.trainer import Trainer
from renio_megatron.types import Prompt, Rollout, Verdict
from tests.training.roles import (
    CAP,
    DECODING,
    MEAN,
    PROMPTS,
    RIGHT,
    TOKENS,
    WEIGHTS,
    Roles,
    divergences,
    prompts,
)


class Algorithm:
    """Counts its steps; `bad` names the step at which a metric becomes `value`."""

    def __init__(self, bad: int = 0, value: float = math.nan) -> None:
        self.seen: list[tuple[int, list[int]]] = []
        self.restored: Any = None
        self._bad, self._value = bad, value

    def step(self, prompts: list[Prompt], step: int) -> dict[str, float]:
        self.seen.append((step, [prompt.index for prompt in prompts]))
        return {"loss": self._value if step == self._bad else 1.0 / step, "grad_norm": 1.0}

    def state(self) -> dict[str, Any]:
        return {"steps": len(self.seen)}

    def restore(self, state: dict[str, Any]) -> None:
        self.restored = state


class Checkpointer:
    """Checkpoints in a list."""

    poll = finish = lambda self: None

    def __init__(self, found: tuple[int, dict[str, Any]] | None = None) -> None:
        self.saved, self._found = list[tuple[int, dict[str, Any]]](), found

    def save(self, step: int, state: dict[str, Any]) -> None:
        self.saved.append((step, state))

    def load(self) -> tuple[int, dict[str, Any]] | None:
        return self._found


def trainer(**changes: Any) -> Trainer:
    settings: dict[str, Any] = {"train_iters": 5, "global_batch_size": 4, "save_interval": 2}
    return Trainer(
        **{"algorithm": Algorithm(), "prompts": prompts, "checkpointer": Checkpointer(), **settings, **changes}
    )


@pytest.mark.parametrize(
    ("rank", "size", "shares"),
    [(0, 1, [[0, 1, 2, 3], [4, 5, 6, 7]]), (0, 2, [[0, 1], [4, 5]]), (1, 2, [[2, 3], [6, 7]]), (3, 4, [[3], [7]])],
)
def test_each_data_rank_gets_consecutive_prompts_of_each_step(rank, size, shares):
    run = trainer(train_iters=2, data_rank=rank, data_size=size)
    run.run()
    assert run.algorithm.seen == [(1, shares[0]), (2, shares[1])]
    assert (run.step, run.cursor) == (2, 8)


def test_the_steps_of_a_run_and_what_observers_are_told():
    told: list[tuple[int, dict[str, float]]] = []
    again: list[int] = []
    run = trainer(observers=[lambda *row: told.append(row), lambda step, _: again.append(step)])
    last = run.run()
    assert [step for step, _ in told] == again == [1, 2, 3, 4, 5]
    assert [row["step"] for _, row in told] == [1, 2, 3, 4, 5]
    assert [row["loss"] for _, row in told] == [1.0, 1 / 2, 1 / 3, 1 / 4, 1 / 5]
    assert last["loss"] == 1 / 5
    assert "tokens_per_s" not in last


@pytest.mark.parametrize(("interval", "steps"), [(2, [2, 4, 5]), (5, [5]), (100, [5]), (1, [1, 2, 3, 4, 5]), (0, [])])
def test_checkpoints_are_due_at_every_interval_and_at_the_end(interval, steps):
    run = trainer(save_interval=interval)
    run.run()
    assert run.checkpointer.saved == [(step, {"cursor": 4 * step, "algorithm": {"steps": step}}) for step in steps]


@pytest.mark.parametrize(("every", "steps"), [(2, [0, 2, 4, 5]), (5, [0, 5]), (3, [0, 3, 5]), (7, [0, 5])])
def test_evaluations_are_due_before_training_at_every_interval_and_at_the_end(every, steps):
    told: dict[int, dict[str, float]] = {}
    run = trainer(
        evaluate=lambda step: {"eval/accuracy_greedy": 0.5}, evaluate_every=every, observers=[told.__setitem__]
    )
    last = run.run()
    assert [step for step, row in told.items() if "eval/accuracy_greedy" in row] == steps
    assert told[0] == {"step": 0, "eval/accuracy_greedy": 0.5}, "the state before training, and nothing else"
    assert sorted(told) == [0, 1, 2, 3, 4, 5]
    assert last["eval/accuracy_greedy"] == 0.5


def test_the_first_evaluation_is_of_the_untrained_student():
    algorithm, steps_done = Algorithm(), []

    def evaluate(step):
        assert step == len(algorithm.seen)
        steps_done.append(step)
        return {}

    trainer(algorithm=algorithm, evaluate=evaluate, evaluate_every=2).run()
    assert steps_done == [0, 2, 4, 5]


def test_a_resumed_run_goes_on_where_the_checkpoint_stands():
    told, checkpointer = list[int](), Checkpointer((3, {"cursor": 12, "algorithm": {"steps": 3}}))
    half = {"eval/accuracy_greedy": 0.5}
    settings = {"data_rank": 1, "data_size": 2, "evaluate": lambda step: half, "evaluate_every": 2}
    run = trainer(checkpointer=checkpointer, observers=[lambda step, _: told.append(step)], **settings)
    assert run.resume() == 3
    assert run.algorithm.restored == {"steps": 3}
    run.run()
    assert run.algorithm.seen == [(4, [14, 15]), (5, [18, 19])]
    assert told == [4, 5], "no row of step 0 after a resumption"
    assert [(step, state["cursor"]) for step, state in checkpointer.saved] == [(4, 16), (5, 20)]


def test_without_a_checkpoint_nothing_is_restored_and_after_the_last_one_nothing_is_left_to_do():
    run = trainer()
    assert run.resume() == 0
    assert (run.step, run.cursor, run.algorithm.restored) == (0, 0, None)
    checkpointer = Checkpointer((5, {"cursor": 20, "algorithm": {"steps": 5}}))
    run = trainer(checkpointer=checkpointer, evaluate=lambda step: {"eval/accuracy_greedy": 0.5})
    assert (run.resume(), run.run()) == (5, {})
    assert run.algorithm.seen == run.checkpointer.saved == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_metric_that_is_not_finite_names_step_and_metric_and_is_not_saved(value):
    told: list[int] = []
    run = trainer(algorithm=Algorithm(bad=4, value=value), observers=[lambda step, _: told.append(step)])
    with pytest.raises(NumericsError, match="step 4: loss is not finite"):
        run.run()
    assert [step for step, _ in run.checkpointer.saved] == [2]
    assert told == [1, 2, 3]


def test_an_evaluation_that_is_not_finite_is_found_before_training():
    run = trainer(evaluate=lambda step: {"eval/accuracy_greedy": math.nan}, evaluate_every=1)
    with pytest.raises(NumericsError, match="step 0: eval/accuracy_greedy is not finite"):
        run.run()
    assert run.algorithm.seen == []


def test_the_token_rate_is_tokens_over_the_seconds_of_the_step(monkeypatch):
    clock = iter([10.0, 14.0, 20.0, 20.5])
    monkeypatch.setattr("renio_megatron.training.trainer.time", SimpleNamespace(perf_counter=clock.__next__))
    told: list[dict[str, float]] = []
    algorithm = SimpleNamespace(step=lambda prompts, step: {"rollout/tokens": 600.0}, state=dict)
    trainer(algorithm=algorithm, train_iters=2, observers=[lambda _, row: told.append(row)]).run()
    assert [(row["time/step_s"], row["tokens_per_s"]) for row in told] == [(4.0, 150.0), (0.5, 1200.0)]


HALF = math.sqrt(0.5)


@pytest.mark.parametrize(
    ("style", "warmup", "min_lr", "expected"),
    [
        ("constant", 0, 0.0, [2, 2, 2, 2, 2, 2]),
        ("constant", 3, 0.0, [2 / 3, 4 / 3, 2, 2, 2, 2]),
        ("linear", 0, 0.0, [2, 10 / 6, 8 / 6, 1, 4 / 6, 2 / 6]),
        ("linear", 2, 0.4, [1, 2, 2, 1.6, 1.2, 0.8]),
        # 4 steps of decay: the cosine is taken at 0, 45, 90 and 135 degrees.
        ("cosine", 2, 0.0, [1, 2, 2, 1 + HALF, 1, 1 - HALF]),
        ("cosine", 2, 0.4, [1, 2, 2, 0.4 + 0.8 * (1 + HALF), 1.2, 0.4 + 0.8 * (1 - HALF)]),
        ("linear", 5, 0.4, [0.4, 0.8, 1.2, 1.6, 2, 2]),
    ],
)
def test_learning_rate_by_hand(style, warmup, min_lr, expected):
    train = TrainConfig(train_iters=6, lr=2.0, min_lr=min_lr, lr_warmup_iters=warmup, lr_decay_style=style)
    assert [learning_rate(train, step) for step in range(1, 7)] == pytest.approx(expected, rel=1e-12)


def test_a_step_samples_scores_and_updates_in_this_order():
    roles = Roles()
    roles.distillation().step(PROMPTS, 7)
    sampled, scored = ("sample", [8, 9, 10, 11], DECODING, (7,)), ("teacher", list(TOKENS))
    assert roles.asked == [sampled, scored, ("update", 7, 0.07), {"skipped": False}]


def test_recomputed_scores_take_the_place_of_the_samplers():
    roles = Roles()
    # The sampler's own numbers would make no token pivotal: all ratios shift by -7.
    roles.sampled_logp -= 7.0
    roles.recomputed_logp = torch.full((8,), -0.5)
    metrics = roles.distillation(recompute=True).step(PROMPTS, 1)
    assert [name for name, *_ in roles.asked] == ["sample", "teacher", "student", "update", "skipped"]
    assert metrics["weight/max"] == pytest.approx(max(WEIGHTS))
    assert metrics["renio/pivotal_frac"] == 3 / 8


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_micro_batch_is_weighted_by_its_own_slice(size):
    roles = Roles(size)
    roles.distillation().step(PROMPTS, 1)
    terms = [weight * value for weight, value in zip(WEIGHTS, divergences(roles), strict=True)]
    expected = [sum(terms[i : i + size]) for i in range(0, 4, size)]
    assert [value for value, _ in roles.parts] == pytest.approx(expected, rel=1e-6)
    assert [count for _, count in roles.parts] == [len(terms[i : i + size]) for i in range(0, 4, size)]


@pytest.mark.parametrize("report", [RenioWeighting(), None])
def test_plain_distillation_weighs_every_sequence_1_and_still_shows_the_raw_weights(report):
    roles = Roles(4)
    metrics = roles.distillation(name="uniform", report=report).step(PROMPTS, 1)
    assert roles.parts[0][0] == pytest.approx(sum(divergences(roles)), rel=1e-6)
    assert metrics["weight/mean"] == metrics["weight/max"] == metrics["weight/ess_frac"] == 1.0
    assert metrics["weight/cap_frac"] == 0.0
    if report is None:
        assert not [name for name in metrics if name.startswith("renio/")], "nobody asked for them"
    else:
        assert metrics["renio/raw_weight_mean"] == pytest.approx(MEAN)


NEVER_HERE = ("loss/entry_clip_frac", "renio/ceiling_frac", "rollout/grader_error_frac", "rollout/no_answer_frac")


def right_and_wrong(rollouts):
    return [Verdict(RIGHT[rollout.prompt.index - 8], "its answer") for rollout in rollouts]


def test_metrics_of_a_batch_by_hand():
    roles = Roles()
    metrics = roles.distillation(grader=right_and_wrong).step(PROMPTS, 1)
    kl, lengths = divergences(roles), (2, 1, 3, 2)
    expected = {
        "loss": sum(weight * value for weight, value in zip(WEIGHTS, kl, strict=True)) / 4,
        "loss/kl": sum(value * length for value, length in zip(kl, lengths, strict=True)) / 8,
        **dict.fromkeys(NEVER_HERE, 0.0),
        "weight/mean": sum(WEIGHTS) / 4,
        "weight/max": CAP,
        "renio/raw_weight_mean": MEAN,
        "renio/unit_weight_frac": 0.5,
        "weight/ess_frac": sum(WEIGHTS) ** 2 / (4 * sum(weight**2 for weight in WEIGHTS)),
        "weight/cap_frac": 0.25,
        "renio/pivotal_frac": 3 / 8,
        # Wrong e^2 and 1, right e and 1: of the four pairs 1 + 1 + 0 + 1/2.
        "renio/auc_wrong": 0.625,
        "rollout/accuracy": 0.5,
        "rollout/length": 2.0,
        "rollout/truncated_frac": 0.25,
        "rollout/distinct": 4.0,
        "memory/teacher_payload_mb": 0.0,
        "rollout/tokens": 8.0,
    }
    times = {"time/rollout_s", "time/teacher_s", "time/train_s"}
    assert set(metrics) == set(expected) | times
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    assert all(metrics[name] >= 0 for name in times)


def test_no_auc_where_all_are_right_and_no_accuracy_where_nothing_is_graded():
    all_right = Roles().distillation(grader=lambda rollouts: [Verdict(True)] * len(rollouts))
    assert "renio/auc_wrong" not in all_right.step(PROMPTS, 1)
    assert "rollout/accuracy" not in Roles().distillation().step(PROMPTS, 1)


@pytest.mark.parametrize("normalize", ["none", "ema"])
def test_no_weight_is_reported_as_capped_where_no_cap_applies(normalize):
    metrics = Roles().distillation(normalize=normalize, cap=1.5).step(PROMPTS, 1)
    assert metrics["weight/max"] == pytest.approx(math.e**2 / (MEAN if normalize == "ema" else 1)), "not cut"
    assert metrics["weight/cap_frac"] == 0.0


@pytest.mark.parametrize("of", [{}, {"of": WeightingConfig(cap=1.5)}])
def test_a_weight_at_the_cap_is_reported_whoever_has_it(of):
    changes = {"name": "permuted", **of} if of else {"cap": 1.5}
    metrics = Roles().distillation(**changes).step(PROMPTS, 1)
    assert metrics["weight/max"] == 1.5 and metrics["weight/cap_frac"] == 0.25


def test_the_moving_average_goes_on_from_a_restored_state():
    first, second = Roles(4), Roles(4, ratios=[[1.0] * 8])  # the second's raw weights are all e
    algorithm = first.distillation(normalize="ema", ema_decay=0.75)
    assert algorithm.state() == {"weighting": None}
    algorithm.step(PROMPTS, 1)
    resumed = second.distillation(normalize="ema", ema_decay=0.75)
    resumed.restore(algorithm.state())
    metrics = resumed.step(PROMPTS, 2)
    average = 0.75 * MEAN + 0.25 * math.e
    assert metrics["weight/max"] == pytest.approx(math.e / average, rel=1e-6)
    assert float(resumed.state()["weighting"]) == pytest.approx(average, rel=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_sum_over_micro_batches_is_the_loss_of_the_whole_batch(size, beta):
    roles, loss = Roles(size), LossConfig(beta=beta, temperature=1.1, entry_clip=0.05)
    token_ids = torch.tensor([token for row in TOKENS for token in row])
    owner = torch.tensor([0, 0, 1, 2, 2, 2, 3, 3])
    student = roles.student.detach().clone().requires_grad_()
    whole = distillation_loss(
        student.clone(), roles.teacher_rows, token_ids, owner, 4, loss, WeightingConfig(threshold=0.3, cap=CAP)
    )
    whole.loss.backward()
    assert whole.raw_weights.unique().numel() > 2, "the weights matter"
    rows = ((logits.detach() / 1.1).log_softmax(-1) for logits in (student, roles.teacher_rows))
    roles.recomputed_logp, roles.teacher_logp = (logp.gather(1, token_ids[:, None])[:, 0] for logp in rows)
    metrics = roles.distillation(recompute=True, loss=loss, threshold=0.3).step(PROMPTS, 1)
    assert sum(value for value, _ in roles.parts) / 4 == pytest.approx(float(whole.loss.detach()), rel=1e-12)
    assert metrics["loss"] == pytest.approx(float(whole.loss.detach()), rel=1e-12)
    torch.testing.assert_close(roles.student.grad, student.grad, rtol=1e-12, atol=1e-15)
    assert metrics["loss/entry_clip_frac"] == float((whole.clipped_entries > 0).double().mean()) > 0


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_fine_tuning_is_cross_entropy_over_the_batchs_tokens(size):
    roles = Roles(size)
    given = [Prompt(i, (1,), (1,), completion_ids=tokens) for i, tokens in enumerate(TOKENS)]
    learner = SimpleNamespace(make_micro_batches=roles.make_micro_batches, update=roles.update)
    metrics = Sft(learner, layout=ParallelLayout(), lr_at=lambda step: step / 10).step(given, 2)
    student = roles.student.detach().clone().requires_grad_()
    expected = torch.nn.functional.cross_entropy(student, torch.tensor([t for row in TOKENS for t in row]))
    expected.backward()
    total, tokens = (sum(column) for column in zip(*roles.parts, strict=True))
    assert roles.asked == [("update", 2, 0.2)]
    assert tokens == 8
    assert [total / tokens, metrics["loss"]] == pytest.approx([float(expected.detach())] * 2, rel=1e-12)
    torch.testing.assert_close(roles.student.grad, student.grad, rtol=1e-12, atol=1e-15)
    assert metrics["rollout/tokens"] == 8


def test_prompts_that_are_learned_are_given_behind_their_first_token():
    asked: list[Rollout] = []
    learner = SimpleNamespace(make_micro_batches=asked.extend, update=lambda *args, **more: {})
    given = [Prompt(0, (5, 6, 7), (5, 6, 7), completion_ids=(8, 1)), Prompt(1, (5,), (5,), completion_ids=(1,))]
    metrics = Sft(learner, layout=ParallelLayout(), lr_at=float, learns_prompts=True).step(given, 1)
    assert [(one.prompt.student_ids, one.completion_ids) for one in asked] == [((5,), (6, 7, 8, 1)), ((5,), (1,))]
    assert metrics["rollout/tokens"] == 5
