"""`~` and environment variables in every path of a recipe."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from renio_megatron.config import CheckpointConfig, DataConfig, EvaluateConfig, LoraConfig, TeacherConfig
from renio_megatron.errors import ConfigError
from renio_megatron.files import user_path
from renio_megatron.models.shipped import model_directory
from tests.helpers.multiprocess import Ranks
from tests.helpers.training_cases import save_models


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("a/b", "a/b"),
        ("/a/b", "/a/b"),
        ("~/a", "/home/me/a"),
        ("$HOME/a", "/home/me/a"),
        ("${HOME}/a", "/home/me/a"),
        ("${oc.env:HOME}/a", "/home/me/a"),
        ("/x/$PLACE/a-${PLACE}", "/x/here/a-here"),
        ("a~/b", "a~/b"),
        ("100$", "100$"),
    ],
)
def test_what_stands_for_something_else(text: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("PLACE", "here")
    assert user_path(text) == Path(path)


def test_a_variable_that_is_not_set_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH", raising=False)
    with pytest.raises(ConfigError, match=r"holds \$NO_SUCH, which is not set"):
        user_path("$NO_SUCH/a")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "$NO_SUCH").mkdir()
    assert user_path("$NO_SUCH").is_dir()
    assert model_directory("modchain/student", "model").is_dir()


def run_by_variables(folder: Path) -> dict[str, Any]:
    """Runs all of whose paths are written with a variable or `~`; where they wrote."""
    import os

    from tests.helpers.resuming import run, run_config, train_config

    os.environ["RENIO_PLACE"] = os.environ["HOME"] = str(folder)
    place = "$RENIO_PLACE"
    data = DataConfig(source="jsonl", path=f"{place}/data.jsonl", eval_path="~/data.jsonl", max_prompt_length=64)
    common = {
        "model": f"{place}/deep",
        "data": data,
        "train": train_config(train_iters=2),
        "evaluate": EvaluateConfig(every=2, samples=2),
    }
    adapted = run_config(
        folder,
        "adapted",
        **common,
        teacher=TeacherConfig(model="~/deep", adapter=f"{place}/adapter"),
        lora=LoraConfig(r=4, alpha=8.0, adapter="~/adapter"),
    )
    found = {"adapted": run(replace(adapted, output_dir=f"{place}/adapted"))["outcome"]}
    plain = run_config(folder, "plain", **common, teacher=TeacherConfig(model="~/teacher"))
    found["plain"] = run(replace(plain, output_dir="~/plain"))["outcome"]
    checkpoint = CheckpointConfig(load=f"{place}/plain")
    longer = replace(plain, checkpoint=checkpoint, train=train_config(train_iters=3), output_dir=f"{place}/longer")
    found["longer"] = run(longer)["outcome"]
    whole = f"{place}/plain/checkpoints/iter_0000002"
    started = replace(
        plain,
        pretrained_checkpoint=whole,
        teacher=TeacherConfig(model="~/deep", pretrained_checkpoint="~/plain"),
        output_dir=f"{place}/started",
    )
    found["started"] = run(started)["outcome"]
    return found


@pytest.mark.matrix(2)
def test_every_path_of_a_recipe_may_hold_them(tmp_path: Path, two_ranks: Ranks) -> None:
    pytest.importorskip("peft")
    from tests.megatron.peft_cases import save_adapter

    save_models(tmp_path)
    save_adapter(tmp_path / "deep", tmp_path / "adapter")
    (tmp_path / "data.jsonl").write_text('{"problem": "^1+1=", "answer": "2"}\n{"problem": "^2+1=", "answer": "3"}\n')
    with Ranks(2, timeout=200) as ranks:  # of their own: HOME is changed
        for found in ranks(run_by_variables, tmp_path):
            assert found == {"adapted": "new", "plain": "new", "longer": "resumed", "started": "new"}
    for name in ("adapted", "plain", "longer", "started"):
        assert (tmp_path / name / "finished.json").is_file()
        shutil.rmtree(tmp_path / name)
