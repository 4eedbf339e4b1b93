"""Names that people bring from other programs are answered with the name here."""

from __future__ import annotations

import pytest

from renio_megatron.config.foreign_names import FOREIGN
from renio_megatron.config.load import load_recipe
from renio_megatron.config.places import place_of
from renio_megatron.config.schema import DistillationConfig
from renio_megatron.errors import ConfigError

RECIPE = "model: modchain/student\nteacher: {kind: ema}\ndata: {teacher_template: '{solution}'}\noutput_dir: run\n"


@pytest.mark.parametrize("name", FOREIGN)
def test_each_stands_for_a_key_that_there_is_and_for_nothing_of_ours(name, write):
    key, note = FOREIGN[name]
    assert place_of(DistillationConfig, key) is not None and place_of(DistillationConfig, name) is None
    for place in (name, f"train.{name}", name.replace("_", "-")):
        with pytest.raises(ConfigError) as caught:
            load_recipe("train", write(RECIPE), [f"{place}=1"])
        assert f"unknown key {place!r}. Its name here is {key}" in str(caught.value) and note in str(caught.value)


def test_in_a_file_too(write):
    with pytest.raises(ConfigError, match=r"recipe\.yaml: unknown key 'learning_rate'. Its name here is train\.lr\."):
        load_recipe("train", write(RECIPE + "learning_rate: 1.0e-5\n"))
