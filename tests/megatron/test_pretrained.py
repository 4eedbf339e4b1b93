"""Weights from checkpoints that Megatron wrote: any layout, bit for bit as from Hugging Face's files; fingerprints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from renio_megatron.config.load import load_recipe
from renio_megatron.errors import ConfigError
from renio_megatron.megatron.checkpoint.directory import find_pretrained
from renio_megatron.megatron.weights.pretrained import fingerprint
from renio_megatron.models.architecture import Architecture
from tests.helpers.multiprocess import Ranks
from tests.helpers.resuming import rows
from tests.helpers.training_cases import save_models
from tests.megatron.pretrained_cases import READ, WRITTEN, describe, read, refused, runs, write

pytestmark = pytest.mark.timeout(600)
SPECIAL = [("TP2", "bf16"), ("TP2", "adapters"), ("PP2 tied", "fewer tokens")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    save_models(folder)
    describe(folder)
    return folder


@pytest.mark.matrix(5)
@pytest.mark.parametrize(("written", "read_as"), [*((w, r) for w in WRITTEN for r in READ), *SPECIAL])
def test_a_checkpoint_gives_the_bits_of_hugging_faces_files(
    written: str, read_as: str, folder: Path, two_ranks: Ranks
) -> None:
    two_ranks.once(write, folder, written)
    for same in two_ranks(read, written, read_as, folder):
        assert len(same) > 8
        assert all(same.values()), [key for key, is_same in same.items() if not is_same]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tied", ["holds 'output_layer.weight'", "does not ask for"]),
        ("untied", ["lacks 'output_layer.weight'", "config.json asks for"]),
        ("shape", ["in the shape", "config.json asks for"]),
        ("layers", ["in the shape (4, ", "asks for (2, "]),
        ("vocabulary", ["has 256 rows of 'embedding.word_embeddings.weight'", "a vocabulary of 300"]),
    ],
)
def test_other_models_are_named(name: str, words: list[str], folder: Path, two_ranks: Ranks) -> None:
    for written in ("TP2", "PP2 tied", "TP2 teacher"):
        two_ranks.once(write, folder, written)
    for found in two_ranks.once(refused, folder):
        assert found[name].startswith("ConfigError"), found[name]
        for word in words:
            assert word in found[name], found[name]


@pytest.fixture(scope="module")
def from_checkpoints(folder: Path, two_ranks: Ranks) -> list[dict[str, Any]]:
    for written in ("PP2", "TP2 teacher"):
        two_ranks.once(write, folder, written)
    return two_ranks.once(runs, folder)


def test_a_run_from_checkpoints_is_the_run_from_hugging_face(folder: Path, from_checkpoints: Any) -> None:
    assert all(found["same"] for found in from_checkpoints)
    assert rows(folder, "given") == rows(folder, "plain")


def test_a_run_starts_from_another_runs_checkpoint_and_notices_a_change(from_checkpoints: Any) -> None:
    for found in from_checkpoints:
        assert found["own"] > 8
        assert "holds adapters and not the model" in found["adapters"]
        assert "trained beside other weights" in found["other base"]
        assert "`pretrained_checkpoint`" in found["other base"]


def test_what_is_no_checkpoint_of_the_format_is_refused(tmp_path: Path) -> None:
    def problem(path: Path) -> str:
        with pytest.raises(ConfigError) as caught:
            find_pretrained(path, "teacher.pretrained_checkpoint")
        assert str(caught.value).startswith("teacher.pretrained_checkpoint: ")
        return str(caught.value)

    assert "there is no directory" in problem(tmp_path / "nowhere")
    assert "holds no checkpoint of Megatron's format torch_dist" in problem(tmp_path)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7\n")
    assert "names '7', which is not beside it" in problem(tmp_path)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release")
    (tmp_path / "release" / "mp_rank_00").mkdir(parents=True)
    assert "--ckpt-convert-format torch_dist" in problem(tmp_path)
    shutil.rmtree(tmp_path / "release" / "mp_rank_00")
    (tmp_path / "release" / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr"}))
    assert "is of the format 'zarr'" in problem(tmp_path)
    (tmp_path / "release" / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    assert ".metadata is missing" in problem(tmp_path)


@pytest.mark.parametrize(
    ("kind", "overrides", "words"),
    [
        ("train", ["teacher=initial", "teacher.pretrained_checkpoint=x"], ["teacher.pretrained_checkpoint is set but"]),
        ("sft", ["init=random", "pretrained_checkpoint=x"], ["pretrained_checkpoint is set but", "init is random"]),
        ("sft", ["checkpoint.load=y", "pretrained_checkpoint=x"], ["the weights come from checkpoint.load"]),
    ],
)
def test_a_checkpoint_that_is_not_read_is_an_error(kind: str, overrides: list[str], words: list[str], tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    more = "data: {teacher_template: '{problem}{solution}'}\n"
    path.write_text("model: student\noutput_dir: runs/a\n" + (more if kind == "train" else ""))
    with pytest.raises(ConfigError) as caught:
        load_recipe(kind, path, overrides)
    for word in words:
        assert word in str(caught.value)


def test_a_fingerprint_is_of_the_values_and_not_of_the_files(folder: Path, tmp_path: Path) -> None:
    architecture = Architecture.from_directory(folder / "deep")
    state = load_file(folder / "deep" / "model.safetensors")
    narrow = {name: tensor.to(torch.bfloat16) for name, tensor in state.items()}

    def named(name: str, tensors: dict[str, torch.Tensor], num_files: int = 1) -> str:
        directory, names = tmp_path / name, sorted(tensors)
        directory.mkdir()
        files = {key: f"model-{number % num_files}.safetensors" for number, key in enumerate(names)}
        for file in set(files.values()):
            save_file({key: tensors[key].contiguous() for key in names if files[key] == file}, directory / file)
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
        return fingerprint(directory, architecture)

    given = fingerprint(folder / "deep", architecture)
    assert len(given) == 32
    assert named("three files", state, 3) == given
    assert named("rounded", narrow) != given
    assert named("wide again", {name: tensor.float() for name, tensor in narrow.items()}) == fingerprint(
        tmp_path / "rounded", architecture
    )
    for number, name in enumerate(sorted(state)):
        changed = state[name].clone()
        changed.view(-1)[-1] += 0.25  # the last row is looked at
        assert named(f"changed {number}", {**state, name: changed}) != given, name
