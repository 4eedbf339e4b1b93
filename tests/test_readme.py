"""The README's promises that a machine can check."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


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
    from renio_megatron.config import load_recipe

    (recipe,) = _code("yaml")
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe)
    config = load_recipe("train", path, []).config
    assert config.weighting.threshold == 0.8
    assert config.parallel.tensor_model_parallel_size == 2


def test_the_tree_names_every_file():
    (tree,) = re.findall(r"```\nrenio_megatron/\n(.*?)```", README, flags=re.DOTALL)
    entries = [line.split()[0] for line in tree.splitlines()]
    named = sorted(entry for entry in entries if entry.endswith(".py"))
    files = sorted(path.name for path in (ROOT / "renio_megatron").rglob("*.py") if path.name != "__init__.py")
    assert named == files
    for line in tree.splitlines():
        assert len(line.split()) > 2, f"no purpose: {line}"


def test_commands_and_links_exist():
    for script in re.findall(r"\./(scripts/\S+\.sh)", README):
        assert (ROOT / script).stat().st_mode & 0o100, script
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).exists(), target
    for recipe in re.findall(r"examples/\S+\.yaml", README):
        assert (ROOT / recipe.rstrip(")")).exists(), recipe
