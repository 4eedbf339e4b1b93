"""What a weighting declares, as it is brought together for a rank's rollouts."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from renio_megatron.config import HeadConfig, LossConfig
from renio_megatron.config.sections.combined_weighting import ProductWeighting
from renio_megatron.config.sections.weighting import StudentEntropyWeighting, UniformWeighting
from renio_megatron.errors import ConfigError, DataError
from renio_megatron.objective.weightings import INPUTS
from renio_megatron.parallel.layout import ParallelLayout
from renio_megatron.training.algorithms.weighing import Weighing
from renio_megatron.types import Prompt, Record, Rollout, Verdict
from tests.fakes.strategies import SeenWeighting, shown

LENGTHS = (2, 1, 3)
FLAT = 6


def rollouts_of_three(numbers):
    """Completions of 2, 1 and 3 tokens, of prompts with these numbers."""
    return [
        Rollout(
            Prompt(index, (1, index), (1,), Record("", metadata={"level": level, "name": "x", "flag": True})),
            (2,) * count,
            torch.arange(count) - 5.0,
            finished,
        )
        for index, level, count, finished in zip(numbers, (3, 0.5, 2), LENGTHS, (True, False, True), strict=True)
    ]


def no_verdicts():
    raise AssertionError("nobody wants verdicts")


def weigh_rollouts(weighting, *, seed=5, step=7, verdicts=no_verdicts, prompts=(9, 4, 9), **scores):
    """Through `Weighing`, of three rollouts."""
    weighing = Weighing(weighting, None, LossConfig(), HeadConfig(), recompute=False, seed=seed)
    targets = SimpleNamespace(logp=torch.full((FLAT,), -2.0), has_logp=None)
    scores = {"student_logp": torch.full((FLAT,), -1.0), **scores}
    rollouts = rollouts_of_three(prompts)
    return weighing.weights(rollouts, scores, targets, ParallelLayout(), step=step, state=None, verdicts=verdicts)


KNOWN = {
    "position": [0, 1, 0, 0, 1, 2],
    "finished": [True, False, True],
    "sampler_logp": [-5.0, -4.0, -5.0, -5.0, -4.0, -3.0],
    "step": 7,
    "column level": [3.0, 0.5, 2.0],
    "student_logp": [-1.0] * 6,
    "teacher_logp": [-2.0] * 6,
}


@pytest.mark.parametrize("name", KNOWN)
def test_what_is_known_of_rollouts(name):
    seen = shown([name], weigh_rollouts)
    value = seen.values[name]
    assert (value.tolist() if isinstance(value, torch.Tensor) else value) == KNOWN[name]
    assert seen.values.keys() == {name}
    if name in INPUTS:
        assert getattr(seen, name) is value
    else:
        assert seen.column("level") is value
    assert seen.owner.tolist() == [0, 0, 1, 2, 2, 2] and seen.lengths.tolist() == [2.0, 1.0, 3.0]


def test_a_prompt_group_is_a_prompt_wherever_it_is():
    first, other, again = shown(["prompt_group"], weigh_rollouts).prompt_group.tolist()
    assert first == again != other and min(first, other) >= 0
    alone = shown(["prompt_group"], lambda weighting: weigh_rollouts(weighting, prompts=(4, 9, 7)))
    assert alone.prompt_group.tolist()[:2] == [other, first]


def test_what_is_declared_together_is_there_together():
    names = [name for name in KNOWN if name != "step"]
    seen = shown(names, weigh_rollouts)
    assert seen.values.keys() == set(names)
    for name in names:
        assert seen.values[name].tolist() == KNOWN[name], name


def test_a_factor_is_shown_what_it_declares_itself():
    def run(weighting):
        weigh_rollouts(ProductWeighting(factors=(weighting, UniformWeighting(), SeenWeighting(wants=("finished",)))))

    seen = shown(["position"], run)
    assert seen.values.keys() == {"position"}


def test_nothing_is_there_that_is_not_declared():
    seen = shown([], weigh_rollouts)
    assert not seen.values
    for name in INPUTS:
        with pytest.raises(AttributeError, match=f"reads {name} and does not declare it.*needs"):
            getattr(seen, name)
    with pytest.raises(AttributeError, match="'other'"):
        shown(["column level"], weigh_rollouts).column("other")


def test_verdicts_are_asked_once_and_one_that_failed_is_no_number():
    asked = []

    def verdicts():
        asked.append(1)
        return [Verdict(True), Verdict(None), Verdict(False)]

    seen = shown(["verdict"], lambda weighting: weigh_rollouts(weighting, verdicts=verdicts))
    assert seen.verdict[[0, 2]].tolist() == [1.0, 0.0] and seen.verdict[1].isnan() and asked == [1]


def test_a_generator_follows_from_the_run_the_step_and_the_numbers():
    def draw(*numbers, **settings):
        seen = shown(["generator"], lambda weighting: weigh_rollouts(weighting, **settings))
        return torch.rand(4, generator=seen.generator(*numbers)).tolist()

    draws = [draw(seed=seed, step=step) for seed in (5, 6) for step in (7, 8)]
    draws += [draw(3), draw(4), draw(3, 4), draw(4, 3)]
    assert all(draws[a] != draws[b] for a in range(8) for b in range(a))
    assert draw(seed=5, step=7) == draws[0] and draw(3) == draws[4]


def test_the_number_zero_is_a_number():
    """Else the first sequence's tokens are permuted as the batch's sequences are."""
    draw = shown(["generator"], weigh_rollouts).generator
    first = [torch.rand(4, generator=draw(*numbers)).tolist() for numbers in ((), (0,), (0, 0))]
    assert first[0] != first[1] != first[2] != first[0]


def test_sequences_have_numbers_wherever_they_are():
    seen = shown(["sequence"], lambda weighting: weigh_rollouts(weighting, prompts=(7, 12, 3)))
    assert seen.sequence.tolist() == [7, 12, 3] and seen.sequence.dtype == torch.int64


@pytest.mark.parametrize("column", ["name", "flag", "missing"])
def test_a_column_that_holds_no_number_is_named(column):
    with pytest.raises(DataError, match=f"prompt 9: its record has .* in the column '{column}'"):
        weigh_rollouts(SeenWeighting(wants=(f"column {column}",)))


def test_what_the_scoring_pass_told_is_handed_on():
    entropies = torch.tensor([1.0, 3.0, 8.0, 0.0, 0.0, 0.0])
    found = weigh_rollouts(StudentEntropyWeighting(), student_entropy=entropies)
    assert found.token_weights.tolist() == [0.5, 1.5, 1.0, 1.0, 1.0, 1.0]
    with pytest.raises(ConfigError, match="'student_entropy' needs student_entropy"):
        weigh_rollouts(StudentEntropyWeighting())
