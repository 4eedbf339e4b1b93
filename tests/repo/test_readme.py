"""The README's promises that a machine can check."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT
from tests.repo.test_architecture import FLOORS

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


def _code(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_snippet_runs(capsys):
    namespace = {}
    (snippet,) = _code("python")
    exec(snippet, namespace)
    assert namespace["student_logits"].grad.shape == (5, 32)
    assert namespace["student_logits"].grad[:, 30:].abs().max() == 0  # padding columns
    assert "tensor" in capsys.readouterr().out


def test_the_recipe_loads(tmp_path):
    from renio_megatron.config.load import load_recipe

    (recipe,) = _code("yaml")
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe)
    config = load_recipe("train", path, []).config
    assert config.weighting.threshold == 0.8
    assert config.parallel.tensor_model_parallel_size == 2


SAYS = {
    "train": "greedy accuracy",
    "doctor": "all good",
    "preview": "teacher sees the same",
    "plan": "It fits",
    "compare-precision": "gradient: cosine",
    "export": "models/modchain-student",
}
"""What each command of the page prints."""


@pytest.mark.slow
def test_the_commands_of_runs_run_one_after_the_other(tmp_path):
    (commands,) = (block for block in _code("bash") if block.startswith("renio"))
    found = {}
    for command in commands.splitlines():
        renio, name, *arguments = shlex.split(command.replace("examples/", f"{ROOT}/examples/"), comments=True)
        done = subprocess.run(
            [sys.executable, "-m", "renio_megatron.cli.main", name, *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert renio == "renio" and done.returncode == 0, done.stdout + done.stderr
        found[name] = done.stdout
    assert found.keys() == SAYS.keys()
    assert [name for name, words in SAYS.items() if words not in found[name]] == []
    rows = (tmp_path / "runs" / "modchain" / "metrics.jsonl").read_text().splitlines()
    before, *_, after = (row["eval/accuracy_greedy"] for row in map(json.loads, rows) if "eval/accuracy_greedy" in row)
    assert after > 0.9 > 0.5 > before
    exported = json.loads((tmp_path / "models" / "modchain-student" / "config.json").read_text())
    assert exported["num_hidden_layers"] == 2


def test_what_follows_from_the_code_is_up_to_date():
    done = subprocess.run([sys.executable, "docs/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_key_metric_and_option_is_told():
    for page, columns in (("recipe", 3), ("metrics", 4)):
        rows = re.findall(r"^\| `.*$", (ROOT / "docs" / "reference" / f"{page}.md").read_text(), flags=re.MULTILINE)
        cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]
        assert len(rows) > 40 and all(len(row) == columns and all(row) for row in cells), page
    assert "None" not in (ROOT / "docs" / "reference" / "cli.md").read_text()


def test_every_file_of_the_package_has_a_purpose():
    page = (ROOT / "docs" / "design" / "architecture.md").read_text()
    entries = page.partition("<!-- begin tree -->")[2].partition("<!-- end tree -->")[0].split("\n")[3:-2]
    named = [entry.split()[0] for entry in entries if entry.split()[0].endswith(".py")]
    files = [path.name for path in (ROOT / "renio_megatron").rglob("*.py") if path.name != "__init__.py"]
    assert sorted(named) == sorted(files)
    for entry in entries:
        assert len(entry.split()) > 2, f"no purpose: {entry}"


def test_the_tree_has_a_line_for_each_room():
    (tree,) = re.findall(r"```\nrenio_megatron/\n(.*?)```", README, flags=re.DOTALL)
    named = [line.split()[0] for line in tree.splitlines() if line.startswith("  ") and "/" in line.split()[0]]
    rooms = [path.parent.name + "/" for path in (ROOT / "renio_megatron").glob("*/__init__.py")]
    assert sorted(named) == sorted(rooms)
    assert all(len(line.split()) > 2 for line in tree.splitlines())


def test_the_floors_of_the_page_are_those_of_the_house():
    page = (ROOT / "docs" / "design" / "architecture.md").read_text()
    rows = re.findall(r"^\| (\d) \| (.*?) \|", page, flags=re.MULTILINE)
    assert [tuple(re.findall(r"`(\w+)`", rooms)) for _, rooms in rows] == list(FLOORS)
    assert [int(number) for number, _ in rows] == list(range(1, len(FLOORS) + 1))


@pytest.mark.parametrize("page", [path.relative_to(ROOT).as_posix() for path in PAGES])
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text()):
        file = target.partition("#")[0]
        if file and not file.startswith("http"):
            assert ((ROOT / page).parent / file).exists(), target


def test_the_index_names_every_page():
    named = re.findall(r"\]\(([^)]+)\)", (ROOT / "docs" / "index.md").read_text())
    pages = [path for path in PAGES if ROOT / "docs" in path.parents and path.parent.name != "decisions"]
    assert {path.relative_to(ROOT / "docs").as_posix() for path in pages} - {"index.md"} <= set(named)


def test_commands_and_links_exist():
    for script in re.findall(r"\./(scripts/\S+\.sh)", README):
        assert (ROOT / script).stat().st_mode & 0o100, script
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target.partition("#")[0]).exists(), target
    for recipe in re.findall(r"examples/\S+\.yaml", README):
        assert (ROOT / recipe.rstrip(")")).exists(), recipe


def test_the_readme_is_short():
    assert len(README.encode()) <= 8192


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("the equation", "raw_i = exp("),
        ("the vocabulary collectives", "def gather_in_rank_order"),
        ("how to add a weighting", "class FirstTokensWeighting(WeightingConfig)"),
        ("what is proved, and by which test", "`tests/megatron/test_layout_matrix.py`"),
        ("every key of a recipe", "`weighting.threshold`"),
    ],
)
def test_one_step_from_the_readme_leads_to(what, words):
    pages = [ROOT / link.partition("#")[0] for link in re.findall(r"\]\((?!http)([^)]+)\)", README)]
    found = [page for page in pages if page.suffix in (".md", ".py") and words in page.read_text()]
    assert found, f"no link of the README leads to {what}"


def test_every_claim_names_tests_that_are_there():
    page = (ROOT / "docs" / "results" / "guarantees.md").read_text()
    rows = [row for row in page.splitlines() if row.startswith("| ") and not row.startswith("| claim")]
    assert len(rows) > 10
    for row in rows:
        files = re.findall(r"`((?:tests|scripts)/[^`]+)`", row.split("|")[-2])
        assert files and all((ROOT / file).is_file() for file in files), row


def test_the_site_can_be_built(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    for page in ("index.html", "reference/recipe.html", "guides/weightings.html"):
        assert (tmp_path / "site" / page).is_file()
    assert "fonts.googleapis" not in (tmp_path / "site" / "index.html").read_text()
