"""What a run began with on the disk: any change of it is found, and nothing else is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from renio_megatron.config.load import load_recipe
from renio_megatron.config.schema import DistillationConfig
from renio_megatron.errors import CheckpointError, ConfigError
from renio_megatron.models.shipped import model_directory
from renio_megatron.runner.digests import _digest, _files, origins
from renio_megatron.runner.inputs import read_inputs
from renio_megatron.runner.run_directory import RunDirectory

ROWS = [{"problem": f"^{a}+1=", "solution": f"{a + 1}", "answer": f"{a + 1}"} for a in range(1, 8)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A student, a teacher, and problems to train on and to evaluate with."""
    for name in ("student", "teacher"):
        shutil.copytree(model_directory(f"modchain/{name}", "model"), tmp_path / name)
    for name in ("train", "eval"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


def settings(folder: Path, *changes: str) -> DistillationConfig:
    recipe = folder / "recipe.yaml"
    recipe.write_text(f"model: {folder}/student\nteacher: {{model: {folder}/teacher}}\noutput_dir: {folder}/run\n")
    data = ["data.source=jsonl", f"data.path={folder}/train.jsonl", f"data.eval_path={folder}/eval.jsonl"]
    batch = ["train.global_batch_size=4", "evaluate.every=1", "rollout.max_completion_length=8"]
    return load_recipe("train", recipe, [*data, *batch, *changes]).config  # type: ignore[return-value]


def found(folder: Path, *changes: str) -> dict[str, str]:
    config = settings(folder, *changes)
    return origins(config, read_inputs(config))


def _one_weight(folder: Path) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    save_file({name: tensor + 1e-3 * (tensor.ndim == 1) for name, tensor in state.items()}, path, {"format": "pt"})


def _one_answer(path: Path) -> None:
    path.write_text(path.read_text().replace('"answer": "3"', '"answer": "4"'))


CHANGES: dict[str, Any] = {
    "data.path": lambda folder: _one_answer(folder / "train.jsonl"),
    "data.eval_path": lambda folder: _one_answer(folder / "eval.jsonl"),
    "teacher.model": lambda folder: _one_weight(folder / "teacher"),
    "model (its tokenizer and config)": lambda folder: (folder / "student" / "chat_template.jinja").write_text(
        "{{ 1 }}"
    ),
}


@pytest.mark.parametrize("setting", CHANGES)
def test_a_change_is_seen_under_the_setting_that_names_the_file(setting, folder):
    before = found(folder)
    assert found(folder) == before
    assert set(before) == set(CHANGES)
    CHANGES[setting](folder)
    after = found(folder)
    assert [name for name in before if after[name] != before[name]] == [setting]


def test_the_students_own_weights_come_from_the_checkpoint(folder):
    before = found(folder)
    _one_weight(folder / "student")
    assert found(folder) == before
    itself = ["teacher=initial", "data.teacher_template={problem}{solution}"]
    before = found(folder, *itself)
    assert "model" in before, "a frozen copy of the student is read again"
    _one_weight(folder / "student")
    assert found(folder, *itself)["model"] != before["model"]
    for kind in ("ema", "current"):
        assert set(found(folder, f"teacher={kind}", itself[1])) == set(CHANGES) - {"teacher.model"}


def test_each_of_several_teachers_is_named(folder):
    (folder / "train.jsonl").write_text("".join(json.dumps({**row, "who": "b"}) + "\n" for row in ROWS))
    recipe = folder / "routes.yaml"
    recipe.write_text(
        f"model: {folder}/student\noutput_dir: {folder}/run\n"
        f"data: {{source: jsonl, path: {folder}/train.jsonl, teacher_key: who}}\n"
        f"teacher: {{routes: {{a: {{model: {folder}/teacher}}, b: {{model: {folder}/student}}}}}}\n"
        "train: {global_batch_size: 4}\nrollout: {max_completion_length: 8}\n"
    )
    config = load_recipe("train", recipe).config
    named = origins(config, read_inputs(config))
    assert {"teacher.routes.a.model", "teacher.routes.b.model"} < set(named)
    assert named["teacher.routes.a.model"] != named["teacher.routes.b.model"]


def test_a_file_of_any_size_and_a_directory_are_read(folder, monkeypatch):
    before = found(folder)
    monkeypatch.setattr(
        "renio_megatron.runner.digests._MAX_BYTES_READ", 100
    )  # train.jsonl is larger: blocks of it are read
    sampled = found(folder)
    assert sampled["data.path"] != before["data.path"]
    _one_answer(folder / "train.jsonl")
    assert found(folder)["data.path"] != sampled["data.path"]
    (folder / "data" / "train").mkdir(parents=True)  # as datasets.save_to_disk writes it
    (folder / "data" / "train" / "rows.arrow").write_bytes(b"1")
    whole = _digest(_files(folder / "data"))
    (folder / "data" / "train" / "rows.arrow").write_bytes(b"2")
    assert _digest(_files(folder / "data")) != whole


def test_a_run_directory_refuses_other_files_once_there_is_a_checkpoint(folder):
    settings(folder)
    recipe = load_recipe("train", folder / "recipe.yaml", ["train.global_batch_size=4"])
    run = RunDirectory(folder / "run")
    assert run.open(recipe, False, {"data.path": "1", "teacher.model": "2"}) == "new"
    assert run.open(recipe, False, {"data.path": "3", "teacher.model": "2"}) == "unfinished", "nothing was learned yet"
    (run.checkpoints / "iter_0000002").mkdir(parents=True)
    assert run.state(recipe, False, {"data.path": "3", "teacher.model": "2"}) == "unfinished"
    assert run.state(recipe, False) == "unfinished", "the parent has read no file"
    with pytest.raises(ConfigError, match=r"began with other files: .* since: data\.path\. Put back .*--fresh"):
        run.open(recipe, False, {"data.path": "1", "teacher.model": "2"})
    assert run.state(recipe, True, {"data.path": "1"}) == "new"
    run.origins.write_text("{")
    with pytest.raises(CheckpointError, match=r"origins\.json cannot be read"):
        run.state(recipe, False, {"data.path": "3"})
    run.origins.unlink()
    assert run.state(recipe, False, {"data.path": "1"}) == "unfinished", "a run of an earlier version"
