"""A grader that raises: the run stops and names the prompt, or the completion counts as wrong and is counted."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from renio_megatron.config import DataConfig
from renio_megatron.errors import ConfigError, DataError
from renio_megatron.evaluation import graders
from renio_megatron.evaluation.evaluator import Evaluator
from renio_megatron.evaluation.graders import accuracy, build_grader
from renio_megatron.parallel.layout import ParallelLayout
from renio_megatron.types import Prompt, Rollout, SamplingParams
from tests.training.test_trainer import PROMPTS, Roles


def _judge(text: str, prompt: Prompt, finished: bool, source: Any) -> bool:
    if prompt.index % 4 == 1:
        raise KeyError("answer")
    return prompt.index % 4 == 0


def rollouts(count: int = 8) -> list[Rollout]:
    return [Rollout(Prompt(index, (1,), (1,)), (2, 3)) for index in range(count)]


@pytest.fixture
def grader(monkeypatch: pytest.MonkeyPatch) -> Any:
    """grader_errors -> the grader; of four prompts the first is right and the second breaks the judge."""
    monkeypatch.setitem(graders.GRADERS, "modchain", _judge)
    source = SimpleNamespace(name="modchain", grader="modchain", has_answers=True, score=None)
    decoder = SimpleNamespace(decode=lambda token_ids, skip_special_tokens: "")
    return lambda errors: build_grader(DataConfig(grader_errors=errors), source, decoder)


def test_it_raises_and_names_prompt_grader_and_cause(grader):
    assert DataConfig().grader_errors == "raise"
    grade = grader("raise")
    assert grade(rollouts()[0]) is True
    with pytest.raises(DataError) as caught:
        grade(rollouts()[5])
    assert str(caught.value) == (
        "prompt 5: the grader 'modchain' raised KeyError: 'answer'. Fix the record or the grader, or set "
        "data.grader_errors=count_wrong to count such completions as wrong."
    )
    assert isinstance(caught.value.__cause__, KeyError)


def test_it_counts_as_wrong_and_is_told_once(grader, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("renio_megatron"), "propagate", True)
    grade = grader("count_wrong")
    assert [grade(rollout) for rollout in rollouts()] == [True, None, False, False] * 2
    assert [record.getMessage() for record in caplog.records] == [
        "prompt 1: the grader 'modchain' raised KeyError: 'answer'. It counts as wrong, as later ones will without a "
        "word."
    ]


def test_the_metrics_of_a_step(grader):
    metrics = Roles().distillation(grader=grader("count_wrong")).step(PROMPTS, 1)
    assert (metrics["rollout/accuracy"], metrics["rollout/grader_error_frac"]) == (0.25, 0.25)
    with pytest.raises(DataError, match="prompt 9"):
        Roles().distillation(grader=grader("raise")).step(PROMPTS, 1)


def test_accuracies_count_it_as_wrong(grader):
    grade = grader("count_wrong")
    assert accuracy(rollouts(), grade) == 0.25
    sampler = SimpleNamespace(sample=lambda prompts, sampling_params, rng_stream: rollouts(len(prompts)))
    prompts = [rollout.prompt for rollout in rollouts()]
    found = Evaluator(sampler, prompts, grade, SamplingParams(1.0, None, None, 4), ParallelLayout())()
    assert found == {"eval/accuracy_greedy": 0.25, "eval/accuracy_sampled": 0.25}


def test_another_policy_is_refused():
    with pytest.raises(ConfigError, match=r"data\.grader_errors must be one of raise, count_wrong; got 'ignore'"):
        DataConfig(grader_errors="ignore")
