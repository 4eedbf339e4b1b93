"""Whether two commits train alike, to the last bit: scripts/same_curve.sh.

Each set-up is ten steps on the CPU by `renio` of either tree. Compared are the rows of metrics.jsonl, without what the
clock says, and those of rollouts.jsonl: every sequence with its tokens and its weight.
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from renio_megatron.training.metrics import registry
from tests.helpers.commits import tree_of
from tests.helpers.paths import ROOT

LIMIT = 600.0  # seconds of one run

Recipe = dict[str, Any]
Row = dict[str, Any]
Start = Callable[..., "subprocess.CompletedProcess[str]"]
FRESH: Start = functools.partial(subprocess.run, capture_output=True, text=True, check=False)
"""Starts a command in a process of its own; `tests.helpers.warm.run` saves the imports where the tree is this one."""

RENAMED_KEYS: dict[str, str] = {"weighting.normalize": "weighting.normalise"}
"""Key of a recipe ("section.key") -> the name that it had before; a tree gets the one that its settings hold."""
RENAMED_METRICS = {new: old for old, new in registry.RENAMED_METRICS.items()}
"""Name of a metric -> the name that it had before."""
NEW_METRICS = ("rollout/tokens", "rollout/no_answer_frac", "teacher/*/weight_mean")
"""Metrics (fnmatch's patterns) that an older commit does not have: where only the newer one has them, no difference."""
OF_THE_CLOCK = ("time/", "tokens_per_s", "memory/")


@dataclass(frozen=True)
class SetUp:
    """A run of ten steps: `renio COMMAND` with these settings, on so many ranks."""

    ranks: int
    recipe: Recipe
    command: str = "train"
    routed: bool = False
    """Whether its records name teachers; they are written for it."""


BASE: Recipe = {
    "model": "modchain/student",
    "teacher": {"model": "modchain/teacher"},
    "data": {"source": "modchain", "seed": 1},
    "rollout": {"temperature": 1.1, "max_completion_length": 32, "log": True},
    "loss": {"temperature": 1.1},
    "weighting": {"name": "renio", "threshold": 0.8, "ceiling": 2.5},
    "train": {"train_iters": 10, "global_batch_size": 16, "micro_batch_size": 4, "lr": 1.0e-3},
    "evaluate": {"every": 10, "samples": 32},
}


def _with(base: Recipe, **sections: Any) -> Recipe:
    """`base` with these sections merged in; None takes a section, or a key of one, away."""
    merged = {**base}
    for name, section in sections.items():
        both = {**base.get(name, {}), **section} if isinstance(section, Mapping) else section
        merged[name] = {k: v for k, v in both.items() if v is not None} if isinstance(both, Mapping) else both
    return {name: section for name, section in merged.items() if section is not None}


SET_UPS: dict[str, SetUp] = {
    "tp1": SetUp(1, BASE),
    "tp2-pp2": SetUp(4, _with(BASE, parallel={"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2})),
    "dp2": SetUp(2, _with(BASE, parallel={"use_distributed_optimizer": True}, rollout={"student_scores": "recompute"})),
    "cp2-packed-jsd-clip": SetUp(
        2,
        _with(
            BASE,
            parallel={"context_parallel_size": 2},
            data={"max_prompt_length": 64},
            train={"micro_batch_size": None, "max_tokens_per_micro_batch": 256},
            loss={"beta": 0.5, "entry_clip": 0.05},
        ),
    ),
    "two-teachers": SetUp(
        2,
        _with(
            BASE,
            teacher={
                "model": None,
                "routes": {
                    "plain": {"model": "modchain/teacher"},
                    "shown": {"kind": "initial", "template": "{problem}{solution}"},
                },
            },
            parallel={"tensor_model_parallel_size": 2},
        ),
        routed=True,
    ),
    "lora": SetUp(2, _with(BASE, parallel={"tensor_model_parallel_size": 2}, lora={"r": 4, "alpha": 8})),
    "sft": SetUp(
        2,
        _with(
            BASE,
            teacher=None,
            rollout=None,
            loss=None,
            weighting=None,
            parallel={"tensor_model_parallel_size": 2},
            evaluate={"max_completion_length": 32},
        ),
        command="sft",
    ),
}


def speaks(tree: Path, key: str) -> bool:
    """Whether the settings of a tree hold a field of this name (the last part of "section.key")."""
    field_of_a_class = re.compile(rf"^    {re.escape(key.rpartition('.')[2])}: ", re.MULTILINE)
    return any(field_of_a_class.search(path.read_text()) for path in (tree / "renio_megatron").rglob("*.py"))


def in_words_of(tree: Path, recipe: Recipe) -> Recipe:
    """The recipe with the keys that this tree knows."""
    told = json.loads(json.dumps(recipe))
    for new, old in RENAMED_KEYS.items():
        (section, key), old_key = new.split("."), old.rpartition(".")[2]
        if key in told.get(section, {}) and not speaks(tree, key):
            told[section][old_key] = told[section].pop(key)
    return told


def write_records(path: Path, teachers: Sequence[str], count: int = 64) -> None:
    """A file of the modular chain's problems that name their teachers in turn."""
    from renio_megatron.data.sources.modchain import make_problem

    problems = [make_problem(1, "train", index) for index in range(count)]
    records = [
        {
            "problem": one.prompt,
            "solution": one.solution,
            "answer": one.answer,
            "who": teachers[index % len(teachers)],
        }
        for index, one in enumerate(problems)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def run(
    tree: Path, name: str, folder: Path, changes: Recipe | None = None, start: Start = FRESH
) -> dict[str, list[Row]]:
    """File -> its rows: what a set-up gives with the package of `tree`.

    Args:
        folder: where the run is made.
        changes: sections merged into the set-up's recipe.

    Raises:
        SystemExit: the run failed; its messages are shown.
    """
    set_up = SET_UPS[name]
    recipe = _with(set_up.recipe, **(changes or {}), output_dir=str(folder / "run"))
    folder.mkdir(parents=True)
    if set_up.routed:
        write_records(folder / "records.jsonl", tuple(recipe["teacher"]["routes"]))
        data = {"source": "jsonl", "path": str(folder / "records.jsonl"), "teacher_key": "who", "grader": "modchain"}
        recipe = _with(recipe, data={**data, "eval_path": data["path"]})
    (folder / "recipe.yaml").write_text(yaml.safe_dump(in_words_of(tree, recipe)))
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, "-m", "renio_megatron.cli.main", set_up.command, "recipe.yaml"]
    done = start(
        [*command, "--nproc", str(set_up.ranks)],
        cwd=folder,
        env={**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree), "CUDA_VISIBLE_DEVICES": ""},
        timeout=LIMIT,
    )
    if done.returncode != 0:
        raise SystemExit(f"{done.stdout[-2000:]}{done.stderr[-4000:]}\nerror: '{name}' does not run in {tree}.")
    files = ("metrics.jsonl", *(["rollouts.jsonl"] if recipe.get("rollout", {}).get("log") else []))
    return {file: read_rows(folder / "run" / file) for file in files}


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, in today's names, without what the clock says."""
    today = {old: new for new, old in RENAMED_METRICS.items()}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        {today.get(key, key): value for key, value in row.items() if not key.startswith(OF_THE_CLOCK)} for row in rows
    ]


def differences(before: Sequence[Row], after: Sequence[Row], relative: float = 0.0) -> list[str]:
    """A line for each value that is not the same; floats may differ by `relative` of the larger.

    >>> differences([{"step": 1, "loss": 0.5}], [{"step": 1, "loss": 0.25}])
    ['row 0 (step 1): loss 0.5 -> 0.25']
    """
    if len(before) != len(after):
        return [f"{len(before)} rows -> {len(after)}"]
    found = []
    for number, (old, new) in enumerate(zip(before, after, strict=True)):
        for key in dict.fromkeys([*old, *new]):
            if key not in old and any(fnmatch.fnmatchcase(key, pattern) for pattern in NEW_METRICS):
                continue
            values = [row.get(key, "(nothing)") for row in (old, new)]
            if not _alike(*values, relative):
                found.append(f"row {number} (step {new.get('step')}): {key} {values[0]} -> {values[1]}")
    return found


def _alike(old: Any, new: Any, relative: float) -> bool:
    if isinstance(old, float) and isinstance(new, float) and not math.isnan(old):
        return math.isclose(old, new, rel_tol=relative, abs_tol=0.0)
    return repr(old) == repr(new)


def compare(
    before: Path,
    after: Path,
    names: Sequence[str],
    *,
    changes: Recipe | None = None,
    relative: float = 0.0,
    start: Start = FRESH,
) -> bool:
    """Whether the set-ups give the same in both trees; prints a line for each, and what differs.

    Args:
        before, after: the trees.
        changes: sections merged into the recipes of `after` alone.
    """
    all_same = True
    with tempfile.TemporaryDirectory() as where:
        for name in names:
            began = time.monotonic()
            sides = [(before, Path(where) / name / "before", None), (after, Path(where) / name / "after", changes)]
            old, new = (run(tree, name, folder, changed, start) for tree, folder, changed in sides)
            found = [f"{file}: {line}" for file in old for line in differences(old[file], new[file], relative)]
            found += [f"{file} is empty" for file, rows in new.items() if not rows]
            counts = " and ".join(f"{len(rows)} rows of {file}" for file, rows in new.items())
            print(f"{'differs' if found else 'same'}: {name}: {counts} ({time.monotonic() - began:.0f} s)", flush=True)
            for line in [*found[:10], *([f"and {len(found) - 10} more"] if len(found) > 10 else [])]:
                print(f"  {line}", flush=True)
            all_same = all_same and not found
    return all_same


def _check_imports(tree: Path) -> None:
    """Raises SystemExit unless a process with this tree on its path imports the package from there."""
    command = [sys.executable, "-c", "import renio_megatron; print(renio_megatron.__file__)"]
    found = FRESH(command, cwd="/", env={**os.environ, "PYTHONPATH": str(tree)}).stdout.strip()
    if not found.startswith(f"{tree}{os.sep}"):
        raise SystemExit(f"error: with {tree} on the path, the package comes from '{found}'.")


def main(arguments: Sequence[str]) -> int:
    """0 where all is the same, 1 where something differs, 2 where it cannot be looked at."""
    parser = argparse.ArgumentParser(prog="scripts/same_curve.sh", description=__doc__)
    parser.add_argument("revision", help="the commit to compare the working tree with")
    parser.add_argument("set_ups", nargs="*", metavar="SET-UP", help=f"of {', '.join(SET_UPS)}; none: all")
    parser.add_argument(
        "--relative", type=float, default=0.0, help="by how much a float may differ (default: not at all)"
    )
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.set_ups if name not in SET_UPS]:
        parser.error(f"there is no set-up '{unknown[0]}'; there are {', '.join(SET_UPS)}")
    with tree_of(options.revision) as tree:
        _check_imports(tree)
        return 0 if compare(tree, ROOT, options.set_ups or tuple(SET_UPS), relative=options.relative) else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
