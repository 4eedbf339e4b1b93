"""Recipes on top of others: merged key by key, the later one wins; and written as one."""

from __future__ import annotations

from pathlib import Path

import pytest

from renio_megatron.cli.main import main
from renio_megatron.config.load import load_recipe
from renio_megatron.config.resolved import resolved_yaml
from renio_megatron.errors import ConfigError
from tests.helpers.paths import RECIPES, ROOT, kind_of_example

WHOLE = """
model: modchain/student
teacher: {kind: separate, model: modchain/teacher}
weighting: {name: renio, threshold: 0.5, ceiling: 2.0}
rollout: {temperature: 1.1, top_p: 0.95}
train: {lr: 1.0e-5, train_iters: 4}
output_dir: run
"""


def files(folder: Path, **texts: str) -> Path:
    """Writes recipes by name; the path of the last."""
    for name, text in texts.items():
        path = folder / f"{name}.yaml"
        path.write_text(text)
    return path


def test_a_recipe_changes_single_keys_of_its_base(tmp_path):
    path = files(tmp_path, whole=WHOLE, mine="base: whole.yaml\ntrain: {lr: 2.0e-5}\nrollout: {top_p: null}\n")
    config = load_recipe("train", path).config
    assert (config.train.lr, config.train.train_iters) == (2e-5, 4)
    assert (config.rollout.temperature, config.rollout.top_p) == (1.1, None)
    assert load_recipe("train", path, ["train.lr=3e-5"]).config.train.lr == 3e-5


def test_of_several_the_later_wins_and_a_shared_one_comes_first(tmp_path):
    (tmp_path / "parts").mkdir()
    files(tmp_path / "parts", root="train: {lr: 1.0, seed: 1, train_iters: 9}\n")
    files(tmp_path / "parts", first="base: root.yaml\ntrain: {lr: 2.0, seed: 2}\n")
    files(tmp_path / "parts", second="base: [root.yaml]\ntrain: {lr: 3.0}\n")
    path = files(tmp_path, whole=WHOLE, mine="base: [whole.yaml, parts/first.yaml, parts/second.yaml]\n")
    train = load_recipe("train", path).config.train
    assert (train.lr, train.seed, train.train_iters) == (3.0, 2, 9)


def test_another_strategy_leaves_the_settings_of_the_bases_own_behind_with_a_line(tmp_path):
    path = files(tmp_path, whole=WHOLE, mine="base: whole.yaml\nweighting: {name: uniform}\n")
    recipe = load_recipe("train", path)
    assert recipe.config.weighting.name == "uniform"
    assert set(recipe.dropped) == {"weighting.threshold", "weighting.ceiling"}
    assert load_recipe("train", files(tmp_path, word="base: whole.yaml\nweighting: uniform\n")).dropped == {}
    with pytest.raises(ConfigError, match=r"weighting\.threshold is set but would be ignored"):
        load_recipe("train", files(tmp_path, own="base: whole.yaml\nweighting: {name: uniform, threshold: 0.4}\n"))


def test_a_teacher_in_a_base_makes_a_recipe_of_train(tmp_path):
    path = files(tmp_path, whole=WHOLE, mine="base: whole.yaml\n")
    with pytest.raises(ConfigError, match="renio train"):
        load_recipe("sft", path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: none.yaml\n", r"there is no recipe '\S+none\.yaml'; \S+mine\.yaml names it as its base"),
        ("base: mine.yaml\n", r"mine\.yaml: a recipe cannot be its own base: mine\.yaml -> mine\.yaml"),
        ("base: other.yaml\n", r"its own base: mine\.yaml -> other\.yaml -> mine\.yaml"),
        ("base: [1]\n", r"mine\.yaml: base must be a file, or a list of files; got \[1\]"),
        ("base: {a: b}\n", r"base must be a file"),
        ("base: wrong.yaml\n", r"\S+wrong\.yaml: .*train\.lrr"),
    ],
)
def test_what_cannot_be_a_base_is_named(tmp_path, text, message):
    path = files(tmp_path, other="base: mine.yaml\n", wrong="train: {lrr: 1}\n", whole=WHOLE, mine=text)
    with pytest.raises(ConfigError, match=message):
        load_recipe("train", path)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_examples_written_as_one_are_the_same_recipes(tmp_path, monkeypatch, path):
    monkeypatch.chdir(ROOT)
    kind = kind_of_example(path)
    recipe = load_recipe(kind, path)
    again = load_recipe(kind, files(tmp_path, again=resolved_yaml(recipe)))
    assert (again.config, again.explicit) == (recipe.config, recipe.explicit)


def test_the_command_writes_a_recipe_that_can_be_read(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("Is {problem} ${{odd}}?")
    text = "base: whole.yaml\nweighting: {name: uniform}\ndata: {student_view: mine.txt}\nalso_report: [renio]\n"
    path = files(tmp_path, whole=WHOLE, mine=text)
    assert main(["preview", str(path), "rollout.top_p=null", "train.lr=3e-5", "--resolved"]) == 0
    written = files(tmp_path, written=capsys.readouterr().out)
    found, recipe = load_recipe("train", written), load_recipe("train", path, ["rollout.top_p=null", "train.lr=3e-5"])
    assert found.config == recipe.config and found.dropped == {}
    assert found.config.data.student_template == "Is {problem} ${{odd}}?"
    assert "base" not in written.read_text() and "threshold" not in written.read_text()
