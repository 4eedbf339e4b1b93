"""The README's promises that a machine can check."""

from __future__ import annotations

import re
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


def test_what_follows_from_the_code_is_up_to_date():
    done = subprocess.run([sys.executable, "docs/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


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
        assert (ROOT / target).exists(), target
    for recipe in re.findall(r"examples/\S+\.yaml", README):
        assert (ROOT / recipe.rstrip(")")).exists(), recipe
