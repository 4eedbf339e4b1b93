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
        (
            "base: [whole.yaml, nothing.yaml]\n",
            r"nothing\.yaml: this base is empty; \S+mine\.yaml names it",
        ),
        ("base: [whole.yaml, other2.yaml, ./whole.yaml]\n", r"mine\.yaml: base names whole\.yaml twice"),
    ],
)
def test_what_cannot_be_a_base_is_named(tmp_path, text, message):
    files(tmp_path, nothing="# nothing\n", other2="train: {lr: 1.0}\n")
    path = files(tmp_path, other="base: mine.yaml\n", wrong="train: {lrr: 1}\n", whole=WHOLE, mine=text)
    with pytest.raises(ConfigError, match=message):
        load_recipe("train", path)


def test_a_base_on_the_command_line_is_sent_into_a_file(tmp_path):
    path = files(tmp_path, whole=WHOLE)
    with pytest.raises(
        ConfigError, match=r"command line: base is a key of recipe files.*`base: \[\S+whole\.yaml, x\.yaml\]`"
    ):
        load_recipe("train", path, ["base=x.yaml"])


MISTAKES = {
    "data.enable_thinking": "data: {enable_thinking: true}\n",
    "weighting.threshold": "weighting: {name: uniform, threshold: 0.5}\n",
    "weighting.group_size": "weighting: {group_size: 4}\n",
}
COMPLETE = "model: modchain/student\nteacher: {model: modchain/teacher}\noutput_dir: run\n"


@pytest.mark.parametrize("key", MISTAKES)
def test_a_mistake_of_a_base_by_itself_stays_one(tmp_path, key):
    """Whether the base is a recipe, or a part that leaves its model, its teacher or both to others."""
    wrong = rf"{key.replace('.', '[.]')} is set in \S+bad\.yaml but would be ignored"
    files(tmp_path, rest=COMPLETE, teacher="teacher: {model: modchain/teacher}\n")
    mine = "base: [bad.yaml]\n"
    for bad, on_top in (
        (COMPLETE + MISTAKES[key], mine),
        (MISTAKES[key], mine + COMPLETE),
        (MISTAKES[key], "base: [rest.yaml, bad.yaml]\n"),
        ("teacher: {kind: separate}\n" + MISTAKES[key], "base: [bad.yaml, rest.yaml]\n"),
        ("base: teacher.yaml\n" + MISTAKES[key], mine + "model: modchain/student\noutput_dir: run\n"),
    ):
        path = files(tmp_path, bad=bad, mine=on_top)
        with pytest.raises(ConfigError, match=wrong):
            load_recipe("train", path)


def test_what_another_file_leaves_without_effect_falls_away(tmp_path):
    files(tmp_path, chat="data: {chat: true}\n", thinks="data: {enable_thinking: true}\n", whole=WHOLE)
    files(tmp_path, uniform="weighting: {name: uniform}\n", group="weighting: {group_size: 4}\n")
    path = files(tmp_path, mine="base: [whole.yaml, thinks.yaml, chat.yaml]\n")
    assert load_recipe("train", path).dropped == {}
    assert set(load_recipe("train", path, ["data.chat=false"]).dropped) == {"data.enable_thinking"}
    path = files(tmp_path, mine="base: [whole.yaml, thinks.yaml, chat.yaml]\ndata: {chat: false}\n")
    assert set(load_recipe("train", path).dropped) == {"data.enable_thinking"}
    path = files(tmp_path, rest=COMPLETE, mine="base: [rest.yaml, uniform.yaml, group.yaml]\n")
    assert set(load_recipe("train", path).dropped) == {"weighting.group_size"}


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
