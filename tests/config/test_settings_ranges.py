"""Numbers that a setting cannot be: refused when the recipe is read, with the range."""

from __future__ import annotations

import os
import stat

import pytest
import torch

from renio_megatron.config import RolloutConfig, TrainConfig, WeightingConfig
from renio_megatron.config.parser import read_recipe
from renio_megatron.config.schema import DistillationConfig
from renio_megatron.errors import ConfigError, LayoutError
from renio_megatron.files import as_others_are
from renio_megatron.objective.normalize import moving_average

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("clip_grad", -1.0, "train.clip_grad must be a number of at least 0; got -1.0"),
        ("clip_grad", NAN, "train.clip_grad must be a number of at least 0; got nan"),
        ("lr", INF, "train.lr must be above 0 and finite; got inf"),
        ("weight_decay", NAN, "train.weight_decay"),
        ("min_lr", -1e-3, "train.min_lr"),
        ("adam_beta1", 2.0, r"train.adam_beta1 must lie in \[0, 1\); got 2.0"),
        ("adam_beta2", 1.0, "train.adam_beta2 must lie in"),
        ("seed", 2**63, "train.seed must lie in"),
        ("seed", -1, "train.seed must lie in"),
    ],
)
def test_a_number_of_training_has_a_range(name, value, words):
    with pytest.raises(ConfigError, match=words):
        TrainConfig(**{name: value})


def test_a_temperature_is_finite():
    for value, words in ((INF, "above 0 and finite; got inf"), (NAN, "above 0; got nan"), (0.0, "above 0; got 0.0")):
        with pytest.raises(ConfigError, match=rf"rollout\.temperature must be {words}"):
            RolloutConfig(temperature=value)


def test_the_largest_weight_is_a_number():
    WeightingConfig(ceiling=2.5, temperature=2.5 / 80)
    for settings in ({"temperature": 0.02}, {"ceiling": 100.0}):
        with pytest.raises(ConfigError, match=r"weighting\.ceiling / weighting\.temperature is"):
            WeightingConfig(**settings)


def test_a_key_without_a_value_is_refused(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: a\noutput_dir: b\nteacher: {model: c}\n")
    with pytest.raises(ConfigError, match=r"train\.lr= has no value. Write train\.lr=null"):
        read_recipe(DistillationConfig, recipe, ["train.lr="])
    assert read_recipe(DistillationConfig, recipe, ["data.path=''"]).config.data.path == ""


def test_the_state_of_an_average_is_one_number():
    with pytest.raises(LayoutError, match=r"one number; got a tensor of shape \(3,\)"):
        moving_average(torch.tensor(2.0), torch.ones(3), decay=0.5)


def test_files_have_the_permissions_of_others(tmp_path):
    path = tmp_path / "weights"
    path.touch(mode=0o600)
    mask = os.umask(0o022)
    try:
        as_others_are(path)
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
