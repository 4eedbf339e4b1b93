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
from renio_megatron.runner.digests import digest_of, file_parts
from renio_megatron.runner.inputs import read_inputs
from renio_megatron.runner.origins import origins
from renio_megatron.runner.run_directory import RunDirectory
from renio_megatron.runner.saved_run import read_run

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
    whole = digest_of(file_parts(folder / "data"))
    (folder / "data" / "train" / "rows.arrow").write_bytes(b"2")
    assert digest_of(file_parts(folder / "data")) != whole


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


@pytest.fixture
def begun(folder):
    """A run with a checkpoint, and what it began with."""
    _recipe(folder)
    run, recipe = RunDirectory(folder / "run"), load_recipe("train", folder / "recipe.yaml")
    with_digests = origins(recipe.config, read_inputs(recipe.config))
    assert run.open(recipe, False, with_digests) == "new"
    (run.checkpoints / "iter_0000002").mkdir(parents=True)
    run.close()
    return run


def _recipe(folder: Path) -> None:
    (folder / "recipe.yaml").write_text(
        f"model: {folder}/student\nteacher: {{model: {folder}/teacher}}\noutput_dir: {folder}/run\n"
        f"data: {{source: jsonl, path: {folder}/train.jsonl}}\nevaluate: {{every: 0}}\n"
        "train: {global_batch_size: 4}\nrollout: {max_completion_length: 8}\n"
    )


def _resumed(folder: Path, *changes: str) -> str:
    recipe = load_recipe("train", folder / "recipe.yaml", changes)
    run = RunDirectory(folder / "run")
    try:
        return run.open(recipe, False, origins(recipe.config, read_inputs(recipe.config)))
    finally:
        run.close()


@pytest.mark.parametrize(
    ("setting", "name"), [("model", "student"), ("teacher.model", "teacher"), ("data.path", "train.jsonl")]
)
def test_what_was_moved_is_the_same_and_other_contents_are_not(folder, begun, caplog, setting, name):
    (folder / "elsewhere").mkdir()
    place = shutil.move(folder / name, folder / "elsewhere")
    assert _resumed(folder, f"{setting}={place}") == "unfinished"
    assert f"{setting}: was '{folder / name}', is now '{place}'" in caplog.text
    assert f"{place}" in begun.config.read_text(), "the settings say where it is now"
    if setting == "data.path":
        _one_answer(Path(place))
    elif setting == "teacher.model":
        _one_weight(Path(place))
    else:
        (Path(place) / "chat_template.jinja").write_text("{{ 1 }}")
    with pytest.raises(ConfigError, match=f"began with other files: .* since: {setting}"):
        _resumed(folder, f"{setting}={place}")


def test_a_place_of_which_the_run_knows_no_contents_is_refused(folder, begun):
    known = json.loads(begun.origins.read_text())
    begun.origins.write_text(json.dumps({key: value for key, value in known.items() if key != "teacher.model"}))
    shutil.copytree(folder / "teacher", folder / "other")
    assert _resumed(folder) == "unfinished"
    with pytest.raises(ConfigError, match=r"does not know whether these name the same: teacher.model: was .* Put back"):
        _resumed(folder, f"teacher.model={folder}/other")


def test_the_start_of_a_student_that_has_learned_may_lie_anywhere(folder, begun):
    settings = begun.config.read_text()
    begun.config.write_text(settings.replace("pretrained_checkpoint: null", "pretrained_checkpoint: a", 1))
    recipe = load_recipe("train", folder / "recipe.yaml", ["pretrained_checkpoint=b"])
    known = json.loads(begun.origins.read_text())
    assert RunDirectory(folder / "run").state(recipe, False, known) == "unfinished"


def test_a_finished_run_goes_on_where_it_is_lengthened(folder, begun):
    begun.mark_finished({"step": 100})
    assert _resumed(folder) == "finished"
    (begun.checkpoints / "iter_0000002").rename(begun.path / "aside")
    with pytest.raises(CheckpointError, match="a finished run without checkpoints, which cannot go on"):
        _resumed(folder, "train.train_iters=120")
    (begun.path / "aside").rename(begun.checkpoints / "iter_0000002")
    assert _resumed(folder, "train.train_iters=120") == "unfinished"
    assert not begun.is_finished() and "train_iters: 120" in begun.config.read_text()
    with pytest.raises(ConfigError, match=r"train.train_iters: was 120, is now 100(.|\n)*may become more, not fewer"):
        _resumed(folder)


def test_the_model_of_an_export_is_the_one_that_the_run_began_with(folder, begun):
    with pytest.raises(ConfigError, match="`renio export --model` names its new place"):
        shutil.move(folder / "student", folder / "moved")
        read_run(folder / "run")
    assert read_run(folder / "run", moved_to=str(folder / "moved")).model == folder / "moved"
    with pytest.raises(ConfigError, match=r"--model '.*teacher' is not the model that the run began with"):
        read_run(folder / "run", moved_to=str(folder / "teacher"))
