"""Judgement of a first step: each value at both sides of its bound, by hand; and steps of which less is known."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from renio_megatron.config import HeadConfig, LossConfig
from renio_megatron.errors import ConfigError, Scope
from renio_megatron.parallel.layout import ParallelLayout
from renio_megatron.runner.canaries import _boundary_remedy
from renio_megatron.training.canaries import Canaries
from renio_megatron.training.canary_findings import Expected, Level, Measured, findings
from renio_megatron.types import Prompt
from tests.data.test_prompts import characters
from tests.training.roles import PROMPTS, Roles
from tests.training.test_targets import SampledTokens

EXPECTED = Expected("fp32", is_same_model=False, boundary_remedy="Look.", ends="'$' (15)", teacher_ends="'-' (3)")
MEASURED = Measured(
    sequences=4,
    tokens=100,
    gap=1e-6,
    compared=100,
    other_tokens=0,
    divergence=0.5,
    earlier=2.0,
    later=3.0,
    fall=-10.0,
    is_same_prompt=True,
    first_student=-0.5,
    first_teacher=-1.0,
    rest=0.2,
    ended=3,
    inside=0,
)

CASES: list[tuple[str, dict[str, Any], dict[str, Any], Level]] = [
    ("sampler", {"gap": None}, {}, Level.OK),
    ("sampler", {"gap": 0.0009}, {}, Level.OK),
    ("sampler", {"gap": 0.002}, {}, Level.WARNING),
    ("sampler", {"gap": 0.02}, {}, Level.FAULT),
    ("sampler", {"gap": 0.02}, {"precision": "bf16"}, Level.OK),
    ("sampler", {"gap": 0.6}, {"precision": "bf16"}, Level.FAULT),
    ("sampler", {"gap": 0.6}, {"precision": "fp8"}, Level.WARNING),
    ("tokens", {}, {}, Level.OK),
    ("tokens", {"other_tokens": 1}, {}, Level.FAULT),
    ("rows", {}, {}, Level.OK),
    ("rows", {"later": 0.04, "fall": 1.0}, {}, Level.FAULT),
    ("rows", {"earlier": 0.04, "fall": 1.0}, {}, Level.FAULT),
    ("rows", {"later": 0.3, "fall": 7.0}, {}, Level.FAULT),
    ("rows", {"later": 0.3, "fall": 5.0}, {}, Level.OK),
    ("rows", {"later": 0.4, "fall": 7.0}, {}, Level.OK),
    ("rows", {"later": 0.04, "compared": 7}, {}, Level.OK),
    ("rows", {"divergence": 0.0, "earlier": 0.0, "later": 0.0, "fall": 0.0}, {}, Level.OK),
    ("same model", {"divergence": 9e-6}, {"is_same_model": True}, Level.OK),
    ("same model", {"divergence": 2e-5}, {"is_same_model": True}, Level.WARNING),
    ("same model", {"divergence": 9e-3}, {"is_same_model": True, "precision": "bf16"}, Level.OK),
    ("same model", {"divergence": 2e-2}, {"is_same_model": True, "precision": "bf16"}, Level.WARNING),
    ("boundary", {}, {}, Level.OK),
    ("boundary", {"first_teacher": -9.0}, {}, Level.WARNING),
    ("boundary", {"first_teacher": -5.0}, {}, Level.OK),
    ("boundary", {"first_teacher": -9.0, "rest": 7.0}, {}, Level.OK),
    ("ends", {"inside": 1}, {}, Level.WARNING),
    ("ends", {"ended": 0}, {}, Level.OK),
]


@pytest.mark.parametrize(("name", "seen", "known", "level"), CASES)
def test_each_value_at_both_sides_of_its_bound(name, seen, known, level):
    found = {one.name: one for one in findings(replace(MEASURED, **seen), replace(EXPECTED, **known))}
    assert found[name].level is level, found[name].text
    others = {one.level for one in found.values() if one.name not in (name, "rows")}
    assert others <= {Level.OK}


def test_the_texts_name_the_side_and_the_remedy():
    later = findings(replace(MEASURED, later=0.01), EXPECTED)[2].text
    earlier = findings(replace(MEASURED, earlier=0.01), EXPECTED)[2].text
    assert "belong to the tokens one earlier" in later and "belong to the tokens one later" in earlier
    assert findings(replace(MEASURED, first_teacher=-9.0), EXPECTED)[3].text.endswith("something else there. Look.")
    ends = findings(replace(MEASURED, inside=2), EXPECTED)[4].text
    assert "3 of 4 completions ended by themselves, at '$' (15); 2 went on behind '-' (3)" in ends


def test_other_prompts_or_unknown_distributions_are_not_compared():
    same = replace(EXPECTED, is_same_model=True)
    names = [one.name for one in findings(replace(MEASURED, is_same_prompt=False), same)]
    assert names == ["sampler", "tokens", "rows", "boundary", "ends"]
    assert [one.name for one in findings(replace(MEASURED, compared=0), same)] == ["sampler", "boundary", "ends"]


def canaries(**more: Any) -> Canaries:
    return Canaries(ParallelLayout(), LossConfig(), HeadConfig(), EXPECTED, **more)


def step_of(roles: Roles) -> tuple[Any, Any, Any]:
    rollouts = roles.sample(PROMPTS, None, rng_stream=(1,), on_group=None)
    learner = SimpleNamespace(score=lambda batches, more=None: {"student_logp": torch.full((8,), -0.5)})
    return rollouts, roles.make_micro_batches(rollouts), learner


def test_of_a_teacher_that_gives_the_sampled_tokens_alone_less_is_known():
    roles = Roles(2)
    rollouts, batches, learner = step_of(roles)
    known = torch.tensor([False, True, True, True, True, False, True, True])
    measured = canaries().measure(rollouts, batches, learner, SampledTokens(roles.teacher_logp, known))
    assert (measured.sequences, measured.tokens, measured.compared, measured.gap) == (4, 8, 0, 0.0)
    assert (measured.ended, measured.inside, measured.is_same_prompt) == (3, 0, True)
    # first tokens whose score is known: of the sequences 2, 3 and 4, with the log ratios 0.1, 5.0 and 0.75
    assert measured.first_student == pytest.approx(-0.5)
    assert measured.first_teacher == pytest.approx(-0.5 - (0.1 + 5.0 + 0.75) / 3, rel=1e-6)
    assert measured.rest == pytest.approx((0.2 + 1.5 - 1.0) / 3, rel=1e-6)


def test_ends_of_the_teachers_own_are_found_inside_only():
    roles = Roles(2)
    rollouts, batches, learner = step_of(roles)
    targets = SampledTokens(roles.teacher_logp, torch.ones(8, dtype=torch.bool))
    for ends, inside in (({1}, 1), ({0}, 1), ({2}, 1), ({0, 1, 2}, 3), (set(), 0)):
        found = canaries(teacher_ends={"": ends}).measure(rollouts, batches, learner, targets)
        assert found.inside == inside, ends


def test_a_fault_is_every_ranks_error_or_a_warning(caplog):
    roles = Roles(2)
    rollouts, batches, learner = step_of(roles)
    learner.score = lambda batches, more=None: {"student_logp": torch.full((8,), -0.9)}
    targets = SampledTokens(roles.teacher_logp, torch.ones(8, dtype=torch.bool))
    with pytest.raises(ConfigError, match=r"the first step, before any update: sampler: 0\.4 nats") as caught:
        canaries().look(rollouts, batches, learner, targets)
    assert caught.value.scope is Scope.ALL_RANKS
    shown: list[str] = []
    canaries(stops=False, report=shown.append).look(rollouts, batches, learner, targets)
    assert "the first step, sampler: 0.4 nats" in caplog.text
    assert shown[0].splitlines()[0] == "the first step's 4 completions, 8 tokens, before the update:"
    assert "sampler" not in shown[0]


def test_only_the_first_step_of_a_run_is_looked_at():
    seen: list[int] = []
    roles = Roles(2)
    algorithm = roles.distillation()
    algorithm._look_at_first = lambda rollouts, batches, learner, targets: seen.append(len(rollouts))
    algorithm.step(PROMPTS, 2)  # as after a resumption
    assert seen == []
    roles.parts.clear()
    metrics = algorithm.step(PROMPTS, 1)
    assert seen == [4] and metrics["time/teacher_s"] >= 0


THINKING = "<u>2?<a>"


@pytest.mark.parametrize(
    ("student", "teacher", "words"),
    [
        (f"{THINKING}<think></think>", THINKING, "The student's prompt closes its thought"),
        (f"{THINKING}<think></think>", f"{THINKING}<think>", "The student's prompt closes its thought"),
        (THINKING, f"{THINKING}<think></think>", "The teacher's prompt closes its thought"),
        (THINKING, THINKING, "See how both prompts end"),
        (f"{THINKING}<think>", f"{THINKING}<think>", "See how both prompts end"),
    ],
)
def test_the_remedy_at_the_boundary_follows_from_the_prompts(student, teacher, words):
    tokenizer = characters()
    tokenizer.add_tokens(["<think>", "</think>"], special_tokens=True)
    ids = [tuple(tokenizer(text, add_special_tokens=False).input_ids) for text in (student, teacher)]
    stream = SimpleNamespace(distinct=lambda count: [Prompt(0, *ids)])
    assert words in _boundary_remedy(SimpleNamespace(stream=stream, tokenizer=tokenizer))
