"""Names that people bring from other programs are answered with the name here."""

from __future__ import annotations

import re

import pytest

from renio_megatron.config.foreign_names import ABSENT, FOREIGN, NORMALIZATIONS
from renio_megatron.config.load import load_recipe
from renio_megatron.config.places import place_of
from renio_megatron.config.schema import DistillationConfig
from renio_megatron.errors import ConfigError
from tests.helpers.paths import ROOT

RECIPE = "model: modchain/student\nteacher: {kind: ema}\ndata: {teacher_template: '{solution}'}\noutput_dir: run\n"


def refused(write, *settings: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_recipe("train", write(RECIPE), settings)
    return str(caught.value)


@pytest.mark.parametrize("name", FOREIGN)
def test_each_stands_for_a_key_that_there_is_and_for_nothing_of_ours(name, write):
    key, note = FOREIGN[name]
    assert place_of(DistillationConfig, key) is not None and place_of(DistillationConfig, name) is None
    for place in (name, f"head.{name}", name.replace("_", "-")):
        message = refused(write, f"{place}=1")
        assert f"unknown key {place!r}. Its name here is {key}" in message and note in message


@pytest.mark.parametrize("name", ABSENT)
def test_what_is_not_here_is_told_with_what_to_do(name, write):
    assert name not in FOREIGN and place_of(DistillationConfig, name) is None
    for place in (name, f"train.{name}", name.replace("_", "-")):
        message = refused(write, f"{place}=1")
        assert message.endswith(f"unknown key {place!r}. It has no counterpart here: {ABSENT[name]}")
    assert "Leave it out" in ABSENT[name]


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("teacher.model_name_or_path", "teacher.model"),
        ("teacher.routes.a.model_name_or_path", "teacher.routes.a.model"),
        ("teacher.torch_dtype", "teacher.bf16"),
        ("teacher.tensor_parallel_size", "teacher.parallel.tensor_model_parallel_size"),
        ("teacher.parallel.tensor_parallel_size", "teacher.parallel.tensor_model_parallel_size"),
        ("evaluate.max_new_tokens", "evaluate.max_completion_length"),
        ("train.max_new_tokens", "rollout.max_completion_length"),
        ("loss.kd_sgo_tem", "weighting.temperature"),
        ("train.learning_rate", "train.lr"),
    ],
)
def test_a_key_of_the_section_in_which_it_was_written_is_preferred(name, key, write):
    assert f"unknown key {name!r}. Its name here is {key}" in refused(write, f"{name}=1")


@pytest.mark.parametrize("value", NORMALIZATIONS)
def test_the_releases_normalizations_are_answered_as_its_guide_does(value, write):
    message = refused(write, f"weighting.normalize={value}")
    assert message.endswith(f"must be one of batch, group, ema, none; got {value!r}: {NORMALIZATIONS[value]}")
    assert "must be one of" in refused(write, "weighting.normalize=x")


def test_every_flag_of_the_guide_is_answered(write):
    guide = (ROOT / "docs" / "guides" / "from-the-release.md").read_text()
    flags = set(re.findall(r"`--(\w+)", guide))
    assert len(flags) > 40
    for flag in flags - {"beta"}:  # a key's last part, which is found by likeness
        assert re.search("Its name here is|no counterpart here", refused(write, f"{flag}=1")), flag
    assert "Did you mean 'loss.beta'?" in refused(write, "beta=1")


def test_in_a_file_too(write):
    with pytest.raises(ConfigError, match=r"recipe\.yaml: unknown key 'learning_rate'. Its name here is train\.lr\."):
        load_recipe("train", write(RECIPE + "learning_rate: 1.0e-5\n"))
