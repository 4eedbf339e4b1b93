"""The section `lora` of a recipe: types, defaults, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from renio_megatron.config import LoraConfig
from renio_megatron.config.load import load_recipe
from renio_megatron.config.sections.lora import TARGETS
from renio_megatron.errors import ConfigError
from renio_megatron.megatron.model.lora import check_backend

TEXTS = {
    "train": "model: student\noutput_dir: runs/a\nteacher: {model: teacher}\n",
    "initial": "model: student\noutput_dir: a\nteacher: initial\ndata: {teacher_template: '{problem}{solution}'}\n",
    "sft": "model: student\noutput_dir: runs/a\n",
}


def load(tmp_path: Path, kind: str, *overrides: str, more: str = "") -> Any:
    path = tmp_path / "recipe.yaml"
    path.write_text(TEXTS[kind] + more)
    return load_recipe("sft" if kind == "sft" else "train", path, overrides).config


@pytest.mark.parametrize("kind", TEXTS)
def test_there_are_no_adapters_by_default(kind, tmp_path):
    lora = load(tmp_path, kind).lora
    assert (lora.r, lora.names) == (None, ())


def test_every_target_is_the_default(tmp_path):
    lora = load(tmp_path, "train", "lora.r=8").lora
    assert (lora.names, lora.alpha, lora.scale) == (TARGETS, 16.0, 2.0)


@pytest.mark.parametrize(
    ("more", "override"),
    [
        ("lora: {r: 4, targets: [v_proj, q_proj]}\n", ()),
        ("", ("lora={r: 4, targets: [v_proj, q_proj]}",)),
        ("", ("lora.r=4", "lora.targets=[v_proj, q_proj]")),
    ],
)
def test_targets_are_a_list_in_the_file_and_on_the_command_line(more, override, tmp_path):
    assert load(tmp_path, "sft", *override, more=more).lora.names == ("q_proj", "v_proj")


@pytest.mark.parametrize(
    ("kind", "overrides", "words"),
    [
        ("train", ["lora.r=0"], ["lora.r must be above 0"]),
        ("train", ["lora.r=4", "lora.alpha=0"], ["lora.alpha must be above 0"]),
        ("train", ["lora.r=4", "lora.targets=[q_proj, lm_head]"], ["lora.targets: 'lm_head'", *TARGETS]),
        ("train", ["lora.r=4", "lora.targets=[]"], ["at least one target"]),
        ("train", ["lora.r=4", "lora.targets=[q_proj, q_proj]"], ["each once"]),
        ("train", ["lora.r=4", "lora.targets=q_proj"], ["lora.targets must be a list of words, or null"]),
        ("train", ["lora.r=4", "lora.dropout=1"], ["lora.dropout must lie in [0, 1); got 1.0"]),
        ("train", ["lora.r=4", "lora.dropout=-0.1"], ["lora.dropout must lie in [0, 1); got -0.1"]),
        ("train", ["lora.dropout=0.1"], ["lora.dropout is set but would be ignored", "lora.r is null"]),
        ("train", ["lora.rank=4"], ["unknown key 'lora.rank'"]),
        ("train", ["lora.alpha=8"], ["lora.alpha is set but would be ignored", "lora.r is null"]),
        ("sft", ["lora.targets=[q_proj]"], ["lora.targets is set but would be ignored"]),
        ("sft", ["lora.r=4", "init=random"], ["init=random", "would stay random"]),
        ("train", ["lora.r=4", "precision.backend=te"], ["precision.backend=te", "precision.backend=local"]),
        ("train", ["lora.r=4", "precision={fp8: e4m3, emulate_fp8: true}"], ["precision.fp8=e4m3", "fp8=null"]),
        ("initial", ["lora.r=4", "lora.adapter=runs/a"], ["lora.adapter='runs/a' with teacher.kind=initial", "Merge"]),
        ("initial", ["lora.r=4", "teacher.payload_device=recompute"], ["one model", "Choose host"]),
        ("initial", ["lora.r=4", "teacher_precision.backend=local"], ["teacher_precision.backend is set but would"]),
    ],
)  # fmt: skip
def test_mistakes_are_named(kind, overrides, words, tmp_path):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, kind, *overrides)
    for word in words:
        assert word in str(caught.value)


def test_layers_of_transformer_engine_are_refused():
    with pytest.raises(ConfigError, match=r"precision\.backend=local"):
        check_backend(LoraConfig(r=2), "te")
    check_backend(LoraConfig(), "te")
    check_backend(LoraConfig(r=2), "local")
