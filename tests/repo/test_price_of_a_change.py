"""What it costs to add something: in a copy of the tree, files added and lines changed are counted, and it is run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

PACKAGE = ROOT / "renio_megatron"
RECIPE = """
model: modchain/student
train: {train_iters: 2, global_batch_size: 4, micro_batch_size: 4}
rollout: {max_completion_length: 8}
teacher: {model: modchain/teacher}
output_dir: run
"""


@dataclass(frozen=True)
class Change:
    """What is added: files, and lines after given ones; the settings that use it; what shows that it was used."""

    files: dict[str, str]
    lines: dict[str, tuple[str, str]]
    settings: tuple[str, ...]
    sign: Callable[[Path, str], bool]
    recipe: str = RECIPE


ECHO = '''"""An algorithm that counts the tokens of given completions, and learns nothing."""

from dataclasses import dataclass
from typing import ClassVar

from renio_megatron.config.schema import JobConfig


@dataclass(frozen=True, kw_only=True)
class EchoConfig(JobConfig):
    builder: ClassVar[str] = "renio_megatron.training.algorithms.echo:build"
    algorithm: str = "echo"
    scale: float = 1.0


class Echo:
    def __init__(self, parts):
        self.scale, self.lr_at = parts.config.scale, parts.lr_at

    def tune(self, num_tokens, say=None): ...

    def step(self, prompts, step):
        tokens = sum(len(prompt.completion_ids) for prompt in prompts)
        return {"loss": self.scale * tokens, "lr": self.lr_at(step), "rollout/tokens": float(tokens)}

    def state(self):
        return {}

    def restore(self, state): ...

    def close(self): ...


def build(parts):
    return Echo(parts), ()
'''

CHANGES = {
    "algorithm": Change(
        files={"training/algorithms/echo.py": ECHO},
        lines={
            "config/schema.py": (
                "ALGORITHMS = {\n",
                '    "echo": "renio_megatron.training.algorithms.echo:EchoConfig",\n',
            )
        },
        settings=("algorithm=echo", "scale=0.5"),
        # A solution of the modular chain has 24 symbols and an end.
        sign=lambda run, _: '"loss": 50.0' in (run / "metrics.jsonl").read_text(),
        recipe="\n".join(line for line in RECIPE.splitlines() if not line.startswith(("rollout", "teacher"))),
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_a_file_and_a_line(name, tmp_path):
    change, package = CHANGES[name], tmp_path / "tree" / "renio_megatron"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    for file, text in change.files.items():
        assert not (package / file).exists()
        (package / file).write_text(text)
    for file, (after, line) in change.lines.items():
        text = (package / file).read_text()
        assert text.count(after) == 1
        (package / file).write_text(text.replace(after, after + line))
    found = subprocess.run(
        ["git", "diff", "--no-index", "--numstat", str(PACKAGE), str(package)], capture_output=True, text=True
    ).stdout.splitlines()
    rows = [row.split("\t") for row in found if "__pycache__" not in row]
    assert len(rows) == len(change.files) + len(change.lines), found
    changed = [row for row in rows if not row[2].split("/")[-1].startswith(tuple(Path(f).name for f in change.files))]
    assert [row[:2] for row in changed] == [["1", "0"]] * len(change.lines), found

    (tmp_path / "recipe.yaml").write_text(change.recipe)
    done = subprocess.run(
        [sys.executable, "-m", "renio_megatron.cli.main", "train", "recipe.yaml", *change.settings],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "tree"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert change.sign(tmp_path / "run", done.stdout), done.stdout
