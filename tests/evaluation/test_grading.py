"""Verdicts on rollouts: what the grader is given, one rank that decides, and a grader that raises."""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from renio_megatron.config import DataConfig
from renio_megatron.errors import ConfigError, DataError, Scope
from renio_megatron.evaluation.evaluator import Evaluator
from renio_megatron.evaluation.graders import Completion, Grader
from renio_megatron.evaluation.grading import RolloutGrader
from renio_megatron.parallel.layout import Axis, ParallelLayout
from renio_megatron.types import Prompt, Record, Rollout, SamplingParams, Verdict
from tests.training.test_trainer import PROMPTS, Roles

CHARACTERS = SimpleNamespace(decode=lambda ids, skip_special_tokens: "".join(map(chr, ids)))


def judge(completion: Completion, record: Record) -> Verdict:
    """Of four records the first is right, and the second breaks it."""
    if int(record.problem) % 4 == 1:
        raise KeyError("answer")
    return Verdict(int(record.problem) % 4 == 0, "its answer")


def graded(errors: str, layout: ParallelLayout | None = None) -> RolloutGrader:
    return RolloutGrader(Grader("judge", judge), CHARACTERS, errors=errors, layout=layout or ParallelLayout())


def rollouts(count: int = 8) -> list[Rollout]:
    return [Rollout(Prompt(index, (65,), (65,), Record(str(index))), (66, 67)) for index in range(count)]


def test_the_grader_sees_the_text_before_the_end_and_whether_the_prompt_opened_a_thought():
    seen: list[tuple[Completion, Record]] = []

    def look(completion: Completion, record: Record) -> Verdict:
        seen.append((completion, record))
        return Verdict(True)

    grade = RolloutGrader(Grader("look", look), CHARACTERS, errors="raise", layout=ParallelLayout())
    record = Record("2+2?", answer="4", where="here")
    for text, prompt, finished in (("4|", "A:", True), ("4", "A:<think>\n", False), ("4|", "<think></think>", True)):
        ids = tuple(map(ord, prompt))
        grade([Rollout(Prompt(0, ids, ids, record), tuple(map(ord, text)), finished=finished)])
    assert [completion for completion, _ in seen] == [
        Completion("4", True, False),
        Completion("4", False, True),
        Completion("4", True, False),
    ]
    assert all(one is record for _, one in seen)


def test_it_reads_what_lies_behind_a_prefix():
    seen: list[str] = []
    look = Grader("look", lambda completion, record: Verdict(bool(seen.append(completion.text))))
    grade = RolloutGrader(look, CHARACTERS, errors="raise", layout=ParallelLayout())
    whole = Rollout(Prompt(0, (65,), (65,), Record("2+2?")), tuple(map(ord, "so 4|")))
    grade([whole, whole.prefix(2), replace(whole, finished=False).prefix(2)])
    assert seen == ["so 4", "so 4", "so 4|"]


def test_it_raises_and_names_prompt_grader_and_cause():
    assert DataConfig().grader_errors == "raise"
    assert graded("raise")(rollouts()[:1]) == [Verdict(True, "its answer")]
    with pytest.raises(DataError) as caught:
        graded("raise")(rollouts())
    assert str(caught.value) == (
        "prompt 1: the grader 'judge' raised KeyError: 'answer'. Fix the record or the grader, or set "
        "data.grader_errors=count_wrong to count such completions as wrong."
    )
    assert isinstance(caught.value.__cause__, KeyError) and caught.value.scope is Scope.ALL_RANKS


def test_it_counts_as_wrong_and_is_told_once(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("renio_megatron"), "propagate", True)
    verdicts = graded("count_wrong")(rollouts())
    assert [verdict.correct for verdict in verdicts] == [True, None, False, False] * 2
    problem = "prompt 1: the grader 'judge' raised KeyError: 'answer'."
    assert verdicts[1].reason == problem
    assert [record.getMessage() for record in caplog.records] == [
        f"{problem} It counts as wrong, as later ones will without a word."
    ]


def test_the_metrics_of_a_step():
    prompts = [Prompt(one.index, one.student_ids, one.teacher_ids, Record(str(one.index))) for one in PROMPTS]
    metrics = Roles().distillation(grader=graded("count_wrong")).step(prompts, 1)
    assert (metrics["rollout/accuracy"], metrics["rollout/grader_error_frac"]) == (0.25, 0.25)
    assert metrics["rollout/no_answer_frac"] == 0.0
    with pytest.raises(DataError, match="prompt 9"):
        Roles().distillation(grader=graded("raise")).step(prompts, 1)


def test_completions_without_an_answer_are_counted():
    def nothing(found: Any) -> list[Verdict]:
        return [Verdict(False, None), Verdict(False, "5"), Verdict(None, None), Verdict(True, None)]

    metrics = Roles().distillation(grader=nothing).step(PROMPTS, 1)
    assert metrics["rollout/no_answer_frac"] == 0.25
    assert (metrics["rollout/accuracy"], metrics["rollout/grader_error_frac"]) == (0.25, 0.25)


def test_accuracies_count_it_as_wrong():
    sampler = SimpleNamespace(sample=lambda prompts, sampling_params, rng_stream, on_group: rollouts(len(prompts)))
    prompts = [rollout.prompt for rollout in rollouts()]
    found = Evaluator(sampler, prompts, graded("count_wrong"), SamplingParams(1.0, None, None, 4), ParallelLayout())(3)
    assert found == {"eval/accuracy_greedy": 0.25, "eval/accuracy_sampled": 0.25}


@pytest.mark.parametrize(("data_size", "expected"), [(1, [1, 3]), (2, [2, 6])])
def test_an_evaluation_tells_how_far_it_is(monkeypatch, data_size, expected):
    def sample(prompts, sampling_params, *, rng_stream, on_group):
        drawn = rollouts(len(prompts))
        on_group(drawn[:1])
        on_group(drawn[1:3])
        return drawn

    told = []
    monkeypatch.setattr("renio_megatron.evaluation.evaluator.reduce_metrics", lambda *_: {})  # there is one rank
    layout = ParallelLayout(data=Axis(size=data_size))
    prompts = [rollout.prompt for rollout in rollouts()]
    evaluator = Evaluator(
        SimpleNamespace(sample=sample),
        prompts,
        graded("count_wrong"),
        SamplingParams(1.0, None, None, 4),
        layout,
        lambda *what: told.append(what),
    )
    evaluator(3)
    of_greedy = [(3, "accuracy, greedy", done, 8) for done in expected]
    of_sampled = [(3, "accuracy, sampled", done, 8) for done in expected]
    assert told == of_greedy + of_sampled


def test_another_policy_is_refused():
    with pytest.raises(ConfigError, match=r"data\.grader_errors must be one of raise, count_wrong; got 'ignore'"):
        DataConfig(grader_errors="ignore")


@pytest.mark.parametrize("axis", ["tensor", "pipeline", "context"])
def test_one_rank_of_those_that_share_a_sequence_decides(two_ranks, axis):
    (first, asked), (second, not_asked) = two_ranks.once(_verdicts_of_two_minds, axis)
    assert first == second == [True, None, False] and (asked, not_asked) == (3, 0)


def _verdicts_of_two_minds(axis: str) -> tuple[list[bool | None], int]:
    """(verdicts, completions graded here) where the second rank's grader would say other things."""
    rank = dist.get_rank()
    asked: list[int] = []

    def grade(completion: Completion, record: Record) -> Verdict:
        asked.append(1)
        return Verdict([[True, None, False], [False, True, None]][rank][int(record.problem)])

    layout = ParallelLayout(rank=rank, world_size=2, **{axis: Axis(2, rank, dist.group.WORLD, (0, 1))})
    grader = RolloutGrader(Grader("own", grade), CHARACTERS, errors="raise", layout=layout)
    return [verdict.correct for verdict in grader(rollouts(3))], len(asked)


def test_an_error_of_the_rank_that_grades_is_raised_on_all(two_ranks):
    assert two_ranks.once(_errors_of_two) == ["prompt 1: ALL_RANKS"] * 2


def _errors_of_two() -> str:
    rank = dist.get_rank()
    layout = ParallelLayout(rank=rank, world_size=2, tensor=Axis(2, rank, dist.group.WORLD, (0, 1)))
    try:
        graded("raise", layout)(rollouts())
    except DataError as error:
        return f"{str(error)[:9]} {error.scope.name}"
    return "nothing"
