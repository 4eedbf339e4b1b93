"""Damaged files around a run, and places that cannot be written: named, with what to do."""

from __future__ import annotations

import os

import pytest

from renio_megatron.cli import launch
from renio_megatron.errors import CheckpointError, ConfigError
from renio_megatron.runner.export import export_checkpoint
from renio_megatron.runner.run_directory import RunDirectory


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", r"config\.yaml cannot be read: .*Restore it from a copy"),
        ("- 1", r"config\.yaml cannot be read: it holds no `model` and `train`"),
        ("model: a\n", r"config\.yaml cannot be read: it holds no `model` and `train`"),
        ("\x00", r"config\.yaml cannot be read: "),
    ],
)
def test_settings_of_a_run_that_are_damaged_cannot_be_exported(tmp_path, text, words):
    (tmp_path / "run" / "checkpoints" / "iter_0000002").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text(text)
    with pytest.raises(CheckpointError, match=words):
        export_checkpoint(tmp_path / "run", tmp_path / "model", None)
    assert not (tmp_path / "model").exists()


def test_a_link_to_nowhere_is_no_file(tmp_path):
    (tmp_path / "run").symlink_to(tmp_path / "disk" / "run")
    with pytest.raises(CheckpointError, match=r"is a link to '.*/disk/run', which is not there"):
        RunDirectory(tmp_path / "run").state(None, False)  # type: ignore[arg-type]
    (tmp_path / "disk" / "run").mkdir(parents=True)
    (tmp_path / "disk" / "run" / "thesis.tex").write_text("x")
    with pytest.raises(CheckpointError, match=r"thesis\.tex"):
        RunDirectory(tmp_path / "run").state(None, False)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["abc", "", "-1", "1.5"])
def test_seconds_to_shut_down_are_a_number(monkeypatch, text):
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", text)
    with pytest.raises(ConfigError, match=rf"whole number of seconds; got '{text}'"):
        launch.start_ranks(["train", "none.yaml"], 1)


def test_the_launcher_is_named_to_its_ranks_alone(monkeypatch):
    monkeypatch.delenv("RENIO_LAUNCHER_PID", raising=False)
    assert launch.launcher() is None
    with launch._named_to_ranks():
        assert launch.launcher() == os.getpid()
    assert launch.launcher() is None
