"""What it costs to add something: in a copy of the tree, files added and lines changed are counted, and it is run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
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
    """What is added: files, and lines after given ones, and a class of settings at the end of a file; the settings that
    use it; what shows that it was used; settings that are refused beside it, with words of the message."""

    files: dict[str, str]
    lines: dict[str, tuple[str, str]]
    settings: tuple[str, ...]
    sign: Callable[[Path, str], bool]
    dataclass: str = ""
    recipe: str = RECIPE
    refused: dict[str, str] = field(default_factory=dict)


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

    def tune(self, num_tokens, report=None): ...

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

HELLINGER = '''"""Squared Hellinger distance: sum_v (sqrt p_S - sqrt p_T)^2 / 2, between 0 and 1."""


def terms(student_logp, teacher_logp, beta=0.0):
    student, teacher = student_logp.div(2).exp_(), teacher_logp.div(2).exp_()
    return (student - teacher).square_().div_(2), student.mul(student - teacher).div_(2)
'''

COUNTING = '''"""Problems of one digit, whose answer is the digit."""

from renio_megatron.data.sources.source import Source
from renio_megatron.types import Record


def counting_source(config, split):
    def read(index):
        digit = str(index % 10)
        return Record(f"^{digit}+0=", f"+0{digit}", digit, where=f"counting {index}")

    return Source("counting", read, grader="modchain", size=10, has_all_solutions=True)
'''


SETTINGS_OF_FIRST_TOKENS, FIRST_TOKENS = (
    block.partition("\n")[2]  # without the line that says where it goes
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs/guides/weightings.md").read_text(), flags=re.DOTALL)
)

SHARPER = '''"""The student of this step, surer of what it says."""

from renio_megatron.megatron.teacher.weights import LiveStudent
from renio_megatron.parallel.vocab import LmHead


class Sharper(LiveStudent):
    def __init__(self, part, factor):
        super().__init__(part)
        self.factor = factor

    @property
    def head(self):
        own = super().head
        return LmHead(own.weight.detach() * self.factor, own.shard)


def sharper(settings, student, build):
    return Sharper(student, settings.factor)
'''

SHARPER_SETTINGS = '''

@dataclass(frozen=True, kw_only=True)
class SharperTeacher(TeacherConfig):
    """The student with its logits times `factor`."""

    weights: ClassVar[str] = "renio_megatron.megatron.teacher.sharper:sharper"

    kind: str = "sharper"
    factor: float = 2.0
'''


def _metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _losses(run: Path) -> list[float]:
    return [row["loss"] for row in _metrics(run)]


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
    "divergence": Change(
        files={"objective/divergences/hellinger.py": HELLINGER},
        lines={
            "objective/divergences/__init__.py": (
                '    "jsd": DivergenceInfo(takes_beta=True),\n',
                '    "hellinger": DivergenceInfo(),\n',
            )
        },
        settings=("loss.divergence=hellinger",),
        sign=lambda run, _: all(0 < loss < 1 for loss in _losses(run)),
        refused={"loss.beta=0.3": "loss.beta is set but would be ignored: loss.divergence names a divergence without"},
    ),
    "source": Change(
        files={"data/sources/counting.py": COUNTING},
        lines={
            "config/sections/data.py": (
                "SOURCES: dict[str, SourceInfo] = {\n",
                '    "counting": SourceInfo(f"{_SOURCES}.counting:counting_source", has_records=True),\n',
            )
        },
        settings=("data.source=counting",),
        sign=lambda run, out: "^7+0=" in out or "+0=" in out,
        refused={"data.task=any": "data.task is set but would be ignored"},
    ),
    "weighting": Change(
        files={"objective/weightings/first_tokens.py": FIRST_TOKENS},
        lines={
            "config/sections/weighting.py": (
                '    "uniform": f"{_HERE}:UniformWeighting",\n',
                '    "first_tokens": f"{_HERE}:FirstTokensWeighting",\n',
            )
        },
        dataclass="\n\n" + SETTINGS_OF_FIRST_TOKENS,
        settings=("weighting=first_tokens", "weighting.count=2"),
        # Of at most 8 tokens two weigh 1, the others 0, and none of ReNIO's own metrics is there.
        sign=lambda run, out: (
            "weighting first_tokens" in out
            and all(0.2 < row["weight/token_mean"] < 0.8 and "renio/pivotal_frac" not in row for row in _metrics(run))
        ),
        refused={"weighting.cap=3": "weighting.cap is set but would be ignored: weighting.name is first_tokens, not"},
    ),
    "teacher": Change(
        files={"megatron/teacher/sharper.py": SHARPER},
        lines={
            "config/sections/teacher.py": (
                '    "current": f"{_HERE}:CurrentTeacher",\n',
                '    "sharper": f"{_HERE}:SharperTeacher",\n',
            )
        },
        dataclass=SHARPER_SETTINGS,
        settings=("teacher=sharper", "teacher.factor=3", "data.teacher_template={solution}{problem}"),
        sign=lambda run, out: "itself (sharper)" in out and all(loss > 0.01 for loss in _losses(run)),
        refused={"teacher.model=a": "teacher.model is set but would be ignored: teacher.kind is sharper, not separate"},
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
        (package / file).write_text(text.replace(after, after + line) + change.dataclass)
    found = subprocess.run(
        ["git", "diff", "--no-index", "--numstat", str(PACKAGE), str(package)], capture_output=True, text=True
    ).stdout.splitlines()
    rows = [row.split("\t") for row in found if "__pycache__" not in row]
    assert len(rows) == len(change.files) + len(change.lines), found
    changed = [row[:2] for row in rows if "dev/null" not in row[2]]
    assert changed == [[str(1 + change.dataclass.count("\n")), "0"]] * len(change.lines), found

    (tmp_path / "recipe.yaml").write_text(change.recipe)

    def train(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "renio_megatron.cli.main", "train", "recipe.yaml", *change.settings, *more],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(tmp_path / "tree"), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=200,
        )

    done = train()
    assert done.returncode == 0, done.stdout + done.stderr
    assert change.sign(tmp_path / "run", done.stdout), done.stdout
    for setting, words in change.refused.items():
        refused = train(setting, "output_dir=other")
        assert refused.returncode == 2 and words in refused.stderr, refused.stderr
