"""Batches at the edge, exact or refused: completions of 1 token and of the limit, nobody pivotal, a broken teacher."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from renio_megatron.config import ParallelConfig, WeightingConfig
from renio_megatron.config.schema import DistillationConfig
from renio_megatron.errors import DataError, NumericsError
from renio_megatron.types import Prompt, Rollout, SamplingParams
from tests.helpers.multiprocess import run_ranks
from tests.helpers.training_cases import VOCAB_SIZE, layout_of, one_step, recipe, save_models

TOLERANCE = 1e-5
LIMIT = 6  # of the recipe
LENGTHS = (LIMIT, 3, 1, 1, LIMIT, 1, LIMIT, 2)  # of the step's completions, one a prompt
LAYOUTS = {
    "TP2": layout_of(2),
    "PP2": layout_of(1, 2),
    "DP2": layout_of(),
    # With micro-batches of 2, one holds one-token completions only: one context rank has no token of them.
    "CP2": ParallelConfig(context_parallel_size=2),
}
BROKEN_TEACHERS = {"inf": float("inf"), "1e38": 1e38, "nan": float("nan")}


def _end_token(folder: Path) -> int:
    from transformers import AutoTokenizer

    return int(AutoTokenizer.from_pretrained(folder / "student").eos_token_id)


def draw_lengths(lengths: Sequence[int], end: int) -> Any:
    """A sampler's `sample`: prompt i gets lengths[i] tokens; below the limit the last one is the end token."""

    def sample(
        prompts: Sequence[Prompt], sampling_params: SamplingParams, *, rng_stream: tuple[int, ...], **_: Any
    ) -> list[Rollout]:
        rollouts = []
        for prompt in prompts:
            length, random_ = lengths[prompt.index % len(lengths)], random.Random(prompt.index)
            tokens = [random_.choice([token for token in range(VOCAB_SIZE) if token != end]) for _ in range(length)]
            finished = 0 < length < sampling_params.max_completion_length
            rollouts.append(Rollout(prompt, (*tokens[:-1], end) if finished else tuple(tokens), finished=finished))
        return rollouts

    return sample


def _refused(
    config: DistillationConfig, folder: Path, draw: Any = None, *, spoiled: float | None = None
) -> dict[str, Any]:
    """The error of a step, and whether a parameter of the student was changed by it."""
    from renio_megatron.megatron.runtime.initialize import start
    from renio_megatron.runner.build import build_trainer
    from renio_megatron.runner.inputs import read_inputs

    layout = start(config.parallel, seed=1)
    trainer = build_trainer(config, read_inputs(config), layout, folder / "unused")
    if draw is not None:
        trainer.algorithm.sampler.sample = draw
    if spoiled is not None:
        _spoil(trainer, spoiled)
    part = trainer.algorithm.learner.part
    before = {name: parameter.detach().clone() for name, parameter in part.named_parameters()}
    error = "no error"
    try:
        trainer.run()
    except (DataError, NumericsError) as problem:
        error = f"{type(problem).__name__}: {problem}"
    return {
        "error": error,
        "unchanged": all(torch.equal(before[name], parameter) for name, parameter in part.named_parameters()),
        "step": trainer.step,
    }


def _spoil(trainer: Any, value: float) -> None:
    """Puts an entry that cannot be used into the teacher's LM head, which no file could bring there: loading looks."""
    head = trainer.algorithm.teacher.head
    row = VOCAB_SIZE - 2 - head.shard.start  # the last tensor rank's
    if 0 <= row < head.shard.num_valid:
        head.weight.data[row] = value


def _all(folder: Path) -> dict[str, Any]:
    """Everything that wants two ranks, in one launch."""
    found: dict[str, Any] = {}
    end = _end_token(folder)
    base = recipe(folder)
    recompute = replace(base.rollout, student_scores="recompute")
    nobody = WeightingConfig(threshold=50.0, ceiling=60.0)
    for name, parallel in LAYOUTS.items():
        edge = replace(base, parallel=parallel, rollout=recompute)
        found[f"lengths, {name}"] = one_step(edge, folder, draw_lengths(LENGTHS, end))
        found[f"nobody, {name}"] = one_step(replace(base, parallel=parallel, weighting=nobody), folder)
        plain = replace(base, parallel=parallel, weighting=WeightingConfig(name="uniform"))
        found[f"plain, {name}"] = one_step(plain, folder)
    edge = replace(base, parallel=LAYOUTS["TP2"], rollout=recompute)
    found["empty"] = _refused(edge, folder, draw_lengths((LIMIT, 3, 0, 1), end))
    for name, value in BROKEN_TEACHERS.items():
        found[f"teacher {name}"] = _refused(replace(base, parallel=LAYOUTS["TP2"]), folder, spoiled=value)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("edge")
    save_models(folder)
    return run_ranks(_all, 2, folder, timeout=240)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", ["lengths", "nobody", "plain"])
def test_the_update_equals_the_single_process_reference(case: str, layout: str, found: Any) -> None:
    for rank in found:
        step = rank[f"{case}, {layout}"]
        for name in ("gradient_error", "grad_norm_error", "loss_error", "weight_error"):
            assert step[name] < TOLERANCE, step


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_shortest_and_the_longest_completions_were_there(layout: str, found: Any) -> None:
    step = found[0][f"lengths, {layout}"]
    assert [len(tokens) for tokens in step["tokens"]] == list(LENGTHS)
    assert len({tokens for tokens in step["tokens"] if len(tokens) == 1}) == 1, "the end token alone"
    assert step["raw_weights_not_1"] > 2, "weights were at work"
    assert max(step["weights"]) > 1.05


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_in_which_no_token_is_pivotal_is_plain_distillation(layout: str, found: Any) -> None:
    for rank in found:
        nobody, plain = rank[f"nobody, {layout}"], rank[f"plain, {layout}"]
        assert nobody["weights"] == [1.0] * 8
        assert nobody["raw_weights_not_1"] == 0
        assert nobody["tokens"] == plain["tokens"]
        assert nobody["loss"] == plain["loss"]


def test_an_empty_completion_is_refused_and_its_prompt_named(found: Any) -> None:
    for rank in found:
        assert rank["empty"] == {
            "error": "DataError: Prompt 2: the completion is empty; it needs at least the end token.",
            "unchanged": True,
            "step": 0,
        }


@pytest.mark.parametrize("name", BROKEN_TEACHERS)
def test_a_teacher_with_unusable_weights_is_named_and_nothing_is_updated(name: str, found: Any) -> None:
    for number, rank in enumerate(found):
        result = rank[f"teacher {name}"]
        assert result["error"].startswith(f"NumericsError: rank {number}: the teacher's log-probabilities hold NaN")
        assert (result["unchanged"], result["step"]) == (True, 0)
