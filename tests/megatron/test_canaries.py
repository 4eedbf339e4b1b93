"""Canaries of a first step: their values by transformers in every layout; each sees the fault planted for it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.helpers.multiprocess import Ranks
from tests.helpers.training_cases import recipe
from tests.megatron.canary_cases import FAULTS, VALUES, by_transformers, planted, values_in


@pytest.mark.parametrize("name", VALUES)
def test_values_are_those_of_transformers_in_every_layout(models: Path, two_ranks: Ranks, name: str) -> None:
    (measured, rollouts), (second, _) = two_ranks(values_in, models, name)
    assert measured == second
    expected = by_transformers(recipe(models), rollouts)
    if name in ("CP2", "DP2"):  # a rank's rows have other neighbors at the ends of its pieces
        del expected["earlier"], expected["later"]
    for key, value in expected.items():
        assert measured[key] == pytest.approx(value, rel=2e-5, abs=1e-6), key
    assert measured["gap"] < 1e-5 and measured["other_tokens"] == 0
    assert (measured["sequences"], measured["is_same_prompt"]) == (8, True)
    assert min(measured["earlier"], measured["later"]) > 0.9 * measured["divergence"]


ERRORS = {
    "none": "",
    "sampler": "sampler: .* nats a token .* other weights than those that are trained",
    "rows before": "rows: .*: the teacher's rows belong to the tokens one earlier",
    "rows behind": "rows: .*: the teacher's rows belong to the tokens one later",
    "ids": r"tokens: at \d+ of \d+ tokens the teacher's log-probability is not that of the student's token",
    "ends": "",
    "boundary": "",
    "same model": "",
    "only warned of": "",
    "not looked for": "",
}
WARNINGS = {
    "ends": r"ends: 8 of 8 completions ended .*; 8 went on behind '-' \(\d+\), where the teacher ends its own",
    "boundary": "boundary: .* which expects something else there. See how both prompts end",
    "only warned of": "tokens: at .* not that of the student's token",
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_seen_before_anything_is_learned(tmp_path: Path, two_ranks: Ranks, name: str) -> None:
    (first, told), (second, told_second) = two_ranks(planted, tmp_path, name)
    assert first == second and not told_second
    if ERRORS[name]:
        assert first.startswith("the first step, before any update: ") and "Nothing was learned" in first
        assert re.search(ERRORS[name], first), first
    else:
        assert first == ""
    assert len(told) == (name in WARNINGS), told
    if name in WARNINGS:
        assert re.search(WARNINGS[name], told[0]), told
