import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest

from renio_megatron.config.load import load_recipe
from renio_megatron.errors import CheckpointError, ConfigError
from renio_megatron.runner.run_directory import RunDirectory


@pytest.fixture
def recipe(tmp_path):
    def build(*overrides: str):
        path = tmp_path / "recipe.yaml"
        path.write_text("model: a\noutput_dir: b\n")
        return load_recipe("sft", path, overrides)

    return build


@pytest.fixture
def run(tmp_path):
    return RunDirectory(tmp_path / "run")


def test_a_run_goes_from_new_to_unfinished_to_finished(run, recipe):
    assert run.open(recipe(), fresh=False) == "new"
    assert run.open(recipe(), fresh=False) == "unfinished"
    assert not run.is_finished()
    run.mark_finished({"accuracy": 0.5})
    assert run.is_finished()
    assert run.open(recipe(), fresh=False) == "finished"
    assert json.loads((run.path / "finished.json").read_text()) == {"accuracy": 0.5}
    assert sorted(entry.name for entry in run.path.iterdir()) == [".lock", "config.yaml", "finished.json"]


HOLDER = """
import sys, time
from pathlib import Path
from renio_megatron.config.load import load_recipe
from renio_megatron.runner.run_directory import RunDirectory
run = RunDirectory(sys.argv[1])
run.open(load_recipe("sft", sys.argv[2]), fresh=False)
print("open", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("fresh", [False, True])
def test_a_second_job_is_refused_until_the_first_is_gone(run, recipe, tmp_path, fresh):
    recipe()
    command = [sys.executable, "-c", HOLDER, str(run.path), str(tmp_path / "recipe.yaml")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "open\n"
        before = sorted(path.name for path in tmp_path.iterdir())
        for ask in (run.state, run.open):
            with pytest.raises(CheckpointError, match=rf"another job writes to .*process {other.pid} on "):
                ask(recipe(), fresh=fresh)
        assert sorted(path.name for path in tmp_path.iterdir()) == before
        other.kill()
    assert run.open(recipe(), fresh=fresh) == ("new" if fresh else "unfinished")


def test_a_file_system_without_locks_refuses_nobody(run, recipe, monkeypatch):
    def unknown(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", unknown)
    assert run.open(recipe(), fresh=False) == "new"


def test_other_settings_are_refused_and_nothing_changes(run, recipe):
    run.open(recipe(), fresh=False)
    before = run.config.read_bytes()
    with pytest.raises(ConfigError) as caught:
        run.open(recipe("train.seed=7", "train.lr=1e-3"), fresh=False)
    assert "train.seed: was 1234, is now 7" in str(caught.value)
    assert "train.lr: was 5e-06, is now 0.001" in str(caught.value)
    assert "--fresh" in str(caught.value)
    assert run.config.read_bytes() == before


def test_settings_of_how_it_is_computed_may_change_and_are_named(run, recipe, caplog):
    run.open(recipe(), fresh=False)
    other = recipe(
        "parallel.tensor_model_parallel_size=2",
        "train.micro_batch_size=4",
        "checkpoint.keep_last=3",
    )
    before = run.config.read_bytes()
    assert run.state(other, fresh=False) == "unfinished"
    assert (run.config.read_bytes(), caplog.text) == (before, ""), "asking writes and says nothing"
    assert run.open(other, fresh=False) == "unfinished"
    (record,) = caplog.records
    assert record.getMessage() == (
        f"{run.path} resumes with other settings: parallel.tensor_model_parallel_size: was 1, is now 2; "
        "train.micro_batch_size: was 1, is now 4; checkpoint.keep_last: was None, is now 3"
    )
    assert "tensor_model_parallel_size: 2" in run.config.read_text()
    assert run.open(other, fresh=False) == "unfinished"
    assert len(caplog.records) == 1, "said once"
    run.mark_finished({})
    before = run.config.read_bytes()
    assert run.open(recipe("parallel.pipeline_model_parallel_size=2"), fresh=False) == "finished"
    assert run.config.read_bytes() == before, "a finished run was computed as it says"


@pytest.mark.parametrize("setting", ["train.global_batch_size=64", "checkpoint.load=elsewhere", "data.seed=2"])
def test_a_change_of_what_is_computed_is_refused_beside_one_that_is_not(setting, run, recipe):
    run.open(recipe(), fresh=False)
    before = run.config.read_bytes()
    with pytest.raises(ConfigError, match=setting.partition("=")[0]) as caught:
        run.open(recipe(setting, "parallel.tensor_model_parallel_size=2"), fresh=False)
    assert "tensor_model_parallel_size" not in str(caught.value)
    assert run.config.read_bytes() == before


def test_settings_that_a_version_added_are_no_difference_where_they_are_null(run, recipe):
    run.open(recipe(), fresh=False)
    old = "".join(line for line in run.config.read_text().splitlines(keepends=True) if "load: null" not in line)
    run.config.write_text(old)
    assert run.open(recipe(), fresh=False) == "unfinished"


def test_a_moved_run_directory_can_be_continued(run, recipe, tmp_path):
    run.open(recipe(), fresh=False)
    moved = RunDirectory(run.path.rename(tmp_path / "moved"))
    assert moved.open(recipe("output_dir=moved"), fresh=False) == "unfinished"


def test_fresh_moves_the_old_runs_aside(run, recipe, tmp_path, caplog):
    assert run.open(recipe("train.seed=1"), fresh=True) == "new"
    assert run.open(recipe("train.seed=2"), fresh=True) == "new"
    assert run.open(recipe("train.seed=3"), fresh=True) == "new"
    for name, seed in (("run.previous-1", 1), ("run.previous-2", 2), ("run", 3)):
        assert f"  seed: {seed}\n" in (tmp_path / name / "config.yaml").read_text()
    assert str(tmp_path / "run.previous-2") in caplog.text


def test_a_directory_of_something_else_is_refused_even_when_fresh(run, recipe):
    run.path.mkdir()
    (run.path / "thesis.tex").write_text("x")
    for fresh in (False, True):
        with pytest.raises(CheckpointError, match=r"thesis\.tex.*Choose another"):
            run.open(recipe(), fresh=fresh)
    assert [entry.name for entry in run.path.iterdir()] == ["thesis.tex"]


def test_a_directory_of_hidden_files_is_as_good_as_empty(run, recipe):
    run.path.mkdir()
    (run.path / ".nfs0001").write_text("")
    assert run.open(recipe(), fresh=False) == "new"


def test_places_where_no_directory_can_be_are_refused(recipe, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        RunDirectory(tmp_path / "file").open(recipe(), fresh=False)
    with pytest.raises(CheckpointError, match="does not exist"):
        RunDirectory(tmp_path / "missing" / "run").open(recipe(), fresh=False)
    with pytest.raises(CheckpointError, match="does not exist"):
        RunDirectory(tmp_path / "file" / "run").open(recipe(), fresh=False)
    assert not (tmp_path / "missing").exists()


def test_parents_of_a_relative_path_are_made(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert RunDirectory("runs/a").open(recipe(), fresh=False) == "new"
    assert (tmp_path / "runs" / "a" / "config.yaml").is_file()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a directory where nobody may write")
def test_a_place_that_is_not_writable_is_refused(recipe):
    with pytest.raises(CheckpointError, match="Give a directory that you may write to"):
        RunDirectory("/proc/renio").open(recipe(), fresh=False)


@pytest.mark.parametrize("text", ["- 1\n", "a: [", "\x00"])
def test_unreadable_settings_are_refused(run, recipe, text):
    run.path.mkdir()
    run.config.write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.yaml cannot be read"):
        run.open(recipe(), fresh=False)


def test_a_failed_write_leaves_the_old_file(run, monkeypatch):
    run.path.mkdir()
    run.mark_finished({"step": 1})
    before = run.finished.read_text()

    def fail(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(CheckpointError, match="No space left on device"):
        run.mark_finished({"step": 2})
    assert run.finished.read_text() == before
