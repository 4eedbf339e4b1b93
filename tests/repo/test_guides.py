"""What the guides show is what happens: every piece of a recipe is read, and commands are run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys

import pytest
import yaml

from renio_megatron.config.load import load_recipe
from renio_megatron.config.sections import weighting
from renio_megatron.objective.weightings import INPUTS
from tests.helpers.paths import ROOT

GUIDES = ROOT / "docs" / "guides"
WEIGHTINGS = (GUIDES / "weightings.md").read_text()
OWN_LOOP = (GUIDES / "your-own-loop.md").read_text()
START = {"model": "student", "output_dir": "run", "teacher": {"model": "teacher"}}


def _blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)


PIECES = [(page.name, block) for page in sorted(GUIDES.glob("*.md")) for block in _blocks(page.read_text(), "yaml")]


def test_there_are_pieces():
    assert len(PIECES) > 8 and len({name for name, _ in PIECES}) > 4


@pytest.mark.parametrize(("page", "block"), PIECES, ids=[f"{name}-{i}" for i, (name, _) in enumerate(PIECES)])
def test_a_piece_of_a_recipe_is_read(page, block, write):
    values = yaml.safe_load(block)
    if "base" in values:  # parts of the recipes that ship
        values["base"] = [str(ROOT / "examples" / "paper" / name) for name in values["base"]]
    else:
        values = {**START, **values}
    assert load_recipe("train", write(yaml.safe_dump(values))).config.output_dir == values["output_dir"]


def test_weightings_run_and_say_what_they_are(tmp_path):
    (commands,), (said,) = (
        _blocks(WEIGHTINGS, "bash"),
        re.findall(r"```\n(weights: .*?)```", WEIGHTINGS, flags=re.DOTALL),
    )
    told = []
    for command in commands.splitlines():
        _, *arguments = shlex.split(command.replace("examples/", f"{ROOT}/examples/"))
        done = subprocess.run(
            [sys.executable, "-m", "renio_megatron.cli.main", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        told.append(done.stdout)
    assert len(told) == 3 and said in told[1]


def test_every_strategy_has_a_row():
    names = re.findall(r"^\| `(\w+)` \|", WEIGHTINGS.partition("## Adding")[0], flags=re.MULTILINE)
    assert {*names, "product"} == set(weighting.WEIGHTINGS)
    inputs = re.findall(
        r"`([a-z_]+)`", "".join(re.findall(r"^\| (.*?) \|", WEIGHTINGS.partition("| `needs`")[2], re.MULTILINE))
    )
    assert set(inputs) == set(INPUTS)


def test_a_loop_of_ones_own_runs_and_prints_what_the_page_says():
    (commands,) = _blocks(OWN_LOOP, "bash")
    (said,) = re.findall(r"```\n(step .*?)```", OWN_LOOP, flags=re.DOTALL)
    told = []
    for command in commands.splitlines():
        launcher, *arguments = shlex.split(command)
        assert launcher == "torchrun"
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", *arguments],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        told.append([_loss_of(line) for line in done.stdout.splitlines()])
    for losses in told:
        assert len(losses) == 6 and losses[-1] < 0.6 * losses[0]
    assert len(told) == 3 and told[1] == pytest.approx(told[2], rel=1e-4)
    assert told[2][-1] == pytest.approx(_loss_of(said.strip()), rel=1e-3), "other versions round otherwise"
    assert len((ROOT / "examples" / "megatron_loop.py").read_text().splitlines()) <= 150


def _loss_of(line: str) -> float:
    found = re.fullmatch(r"step \d loss (\S+) largest weight \S+", line)
    assert found is not None, line
    return float(found[1])
