"""Each input of `tests/cli/bad_inputs.py` ends with one message, a code that is not 0, and no traceback."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cli.bad_inputs import EARLY, LATE, Case
from tests.helpers import warm
from tests.helpers.jobs import python_path
from tests.helpers.training_cases import save_models

pytest.importorskip("peft")
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, an adapter, a recipe that runs, and a run of it that was cut off."""
    from tests.megatron.peft_cases import save_adapter

    folder = tmp_path_factory.mktemp("good")
    save_models(folder)
    save_adapter(folder / "teacher", folder / "adapter")
    recipe: dict[str, Any] = {
        "model": str(folder / "student"),
        "teacher": {"model": str(folder / "teacher")},
        "rollout": {"max_completion_length": 4},
        "train": {"train_iters": 2, "global_batch_size": 8, "micro_batch_size": 4},
        "output_dir": str(folder / "cut off"),
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = command(folder / "recipe.yaml", ["train.train_iters=4", "checkpoint.save_interval=2"])
    assert done.returncode == 0, done.stderr
    run = folder / "cut off"
    (run / "finished.json").unlink()
    shutil.rmtree(run / "checkpoints" / "iter_0000004")
    (run / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("2")
    return folder


def command(recipe: Path, settings: list[str], *, limit: int | None = None, **variables: str) -> Any:
    """`renio train`, as a user starts it."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return warm.run(
        [sys.executable, "-m", "renio_megatron.cli.main", "train", str(recipe), *settings],
        env={**kept, "PYTHONPATH": python_path(), **variables},
        timeout=200,
        **({} if limit is None else {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))}),
    )


def given(case: Case, models: Path, folder: Path) -> tuple[Path, list[str]]:
    """The recipe and the settings of a case; its folder sees the models."""
    (folder / "models").symlink_to(models)
    settings = case[0](folder)
    recipe = next((text.partition("=")[2] for text in settings if text.startswith("RECIPE=")), models / "recipe.yaml")
    settings = [text for text in settings if not text.startswith("RECIPE=")]
    if not any(text.startswith("output_dir=") for text in settings) and str(recipe).endswith("recipe.yaml"):
        settings.append(f"output_dir={folder / 'run'}")
    return Path(recipe), settings


def check(code: int, error: str, words: tuple[str, ...]) -> None:
    assert code != 0
    assert "Traceback" not in error
    lines = [line for line in error.splitlines() if "warning: " not in line]
    assert sum("error: " in line for line in lines) == 1, error
    for word in words:
        assert word in error, (word, error)


ONE_PROCESS = """
import contextlib, io, json, sys
from renio_megatron.cli.main import main

found = {}
for name, (recipe, settings) in json.load(open(sys.argv[1])).items():
    told, code = io.StringIO(), 0
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = main(["train", recipe, *settings])
        except BaseException as error:
            told.write(f"Traceback of {error!r}")
    found[name] = [code, told.getvalue(), "torch" in sys.modules]
json.dump(found, open(sys.argv[2], "w"))
"""


@pytest.fixture(scope="module")
def early(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What `renio train` says in one process, which has to do without torch for all of them."""
    cases = {}
    for kind, named in EARLY.items():
        for name, case in named.items():
            recipe, settings = given(case, models, tmp_path_factory.mktemp("case"))
            cases[f"{kind}: {name}"] = [str(recipe), settings]
    folder = tmp_path_factory.mktemp("early")
    (folder / "cases.json").write_text(json.dumps(cases))
    subprocess.run(
        [sys.executable, "-c", ONE_PROCESS, str(folder / "cases.json"), str(folder / "found.json")],
        env={**os.environ, "PYTHONPATH": python_path()},
        check=True,
        timeout=200,
    )
    yield json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, named in EARLY.items() for name in named])
def test_settings_and_data_are_looked_at_before_torch_is_imported(kind: str, name: str, early: dict[str, Any]) -> None:
    code, error, has_torch = early[f"{kind}: {name}"]
    check(code, error, EARLY[kind][name][1])
    assert not has_torch


@pytest.mark.matrix(11)
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, named in LATE.items() for name in named])
def test_the_ranks_say_it_as_one(kind: str, name: str, models: Path, tmp_path: Path) -> None:
    recipe, settings = given(LATE[kind][name], models, tmp_path)
    variables = dict(text.removeprefix("ENV=").split(":", 1) for text in settings if text.startswith("ENV="))
    limit = next((int(text.removeprefix("LIMIT=")) for text in settings if text.startswith("LIMIT=")), None)
    settings = [text for text in settings if not text.startswith(("ENV=", "LIMIT="))]
    done = command(recipe, settings, limit=limit, **variables)
    check(done.returncode, done.stderr, LATE[kind][name][1])


def test_the_table_is_of_many_kinds() -> None:
    kinds = {**EARLY, **LATE}
    assert len(kinds) == len(EARLY) + len(LATE) >= 10
    assert sum(len(named) for named in kinds.values()) >= 60
    assert max(len(named) for named in kinds.values()) <= 6
