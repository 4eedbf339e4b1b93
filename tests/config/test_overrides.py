"""Settings of the command line: text as it is given, and parts of a recipe that are switched off."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from renio_megatron.config.load import load_recipe
from renio_megatron.config.parser import read_recipe
from renio_megatron.config.resume import differences, to_yaml
from renio_megatron.config.schema import DistillationConfig
from renio_megatron.errors import ConfigError
from tests.config.test_config import TRAIN


@pytest.fixture
def train(write: Callable[[str], Path]) -> Callable[..., Any]:
    return lambda more="", *overrides: load_recipe("train", write(TRAIN + more), overrides)


TEXTS = [
    "Question #1: {problem}",
    "Q: {problem} A: ",
    "  {problem}",
    "Solve ${x}$ {problem}",
    "$x$ {problem}",
    "{problem} ${oc.env:HOME}",
    "{problem}\\${a}",
    "{problem}: [a, b",
    "- {problem}",
    "{problem}  # a comment",
    "'{problem}' or 'x'",
    "{problem} & *anchor !tag",
    "{problem}=a=b",
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_on_the_command_line_is_literal(train, write, text):
    config = train("", f"output_dir={text}").config
    assert config.output_dir == text
    assert train("", f"rollout.stop_strings=[{json.dumps(text)}]").config.rollout.stop_strings == [text]
    # What a run directory holds reads as the same settings again.
    assert differences(to_yaml(config), config) == []
    assert read_recipe(DistillationConfig, write(to_yaml(config))).config == config


def test_a_template_on_the_command_line_is_literal(train):
    for text in ("Question #1: {problem}", "Q: {problem} A: ", "Solve $x$ {problem}", "${{x}}$ {problem}"):
        assert train("", f"data.student_template={text}").config.data.student_template == text


def test_null_and_quoted_text_are_read(train):
    config = train("", "data.path=null", "data.student_template='# {problem}'", r'output_dir="a\tb"').config
    assert (config.data.path, config.data.student_template, config.output_dir) == (None, "# {problem}", "a\tb")


def test_an_override_that_switches_a_part_off_drops_the_recipes_keys_of_it(train):
    recipe = train("evaluate: {every: 5, samples: 7, temperature: 0.5}\n", "evaluate.every=0")
    assert recipe.dropped_lines() == [
        "left out of the recipe: evaluate.samples, evaluate.temperature: evaluate.every is 0 and nothing is evaluated"
    ]
    assert (recipe.config.evaluate.samples, recipe.config.evaluate.temperature) == (512, 1.0)
    assert "evaluate.samples" not in recipe.explicit


def test_several_parts_may_be_switched_off(train):
    more = "data: {source: reasoning_gym, task: chess, size: 5}\nlora: {r: 4, alpha: 8, targets: [q_proj]}\n"
    recipe = train(more, "data.source=modchain", "lora.r=null")
    assert set(recipe.dropped) == {"data.task", "data.size", "lora.alpha", "lora.targets"}
    assert len(recipe.dropped_lines()) == 2
    assert train(more).dropped == {}


def test_another_source_drops_what_the_old_one_read(train):
    data = "data: {source: datasets, path: a, subset: b, split: c, eval_split: d, teacher_prompt_key: e}\n"
    recipe = train(data + "evaluate: {every: 5}\n", "data.source=modchain")
    keys = ("path", "subset", "split", "eval_split", "teacher_prompt_key")
    assert set(recipe.dropped) == {f"data.{key}" for key in keys}


def test_a_system_turn_that_every_route_has_of_its_own_is_refused(write):
    route = "{model: modchain/teacher, system: One.}"
    recipe = write(
        f"model: modchain/student\nteacher: {{routes: {{a: {route}, b: {route}}}}}\n"
        "data: {source: jsonl, path: x, teacher_key: k, chat: true, teacher_system: Two.}\noutput_dir: run\n"
    )
    with pytest.raises(ConfigError, match=r"data\.teacher_system is set .* each of teacher\.routes has a system turn"):
        load_recipe("train", recipe)


def test_what_the_command_line_gives_without_effect_stays_an_error(train):
    more = "evaluate: {every: 5, samples: 7}\n"
    with pytest.raises(ConfigError, match=r"evaluate\.temperature is set but would be ignored") as caught:
        train(more, "evaluate.every=0", "evaluate.temperature=0.5")
    assert "evaluate.samples" not in str(caught.value)


def test_so_does_a_mistake_of_the_recipe_alone(train):
    with pytest.raises(ConfigError, match=r"evaluate\.samples is set but would be ignored"):
        train("evaluate: {samples: 7}\n", "train.lr=1")


def test_fine_tuning_on_a_recipe_with_a_teacher_names_the_other_command(write):
    with pytest.raises(ConfigError, match="names a teacher, so it is a recipe of `renio train`"):
        load_recipe("sft", write(TRAIN))
