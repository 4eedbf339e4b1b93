"""Which settings of a run that goes on may be other ones: its length, and where its files are."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from renio_megatron.config.load import load_recipe
from renio_megatron.config.resume import changes, differences, is_longer, length_advice, moved, to_yaml
from renio_megatron.errors import ConfigError

Settings = Callable[..., Any]


@pytest.fixture
def settings(write: Any) -> Settings:
    recipe = write("model: student\noutput_dir: runs/a\nteacher: {model: teacher}\n")
    return lambda *overrides: load_recipe("train", recipe, overrides).config


@pytest.mark.parametrize(
    ("style", "before", "now", "is_longer_now"),
    [
        ("constant", (4, None), (6, None), True),
        ("linear", (4, None), (6, 4), True),
        ("cosine", (4, None), (4, 4), False),
        ("linear", (4, 9), (6, 9), True),
        ("linear", (4, 9), (9, None), True),
    ],
)
def test_a_run_may_become_longer_where_no_step_gets_another_rate(settings, style, before, now, is_longer_now):
    old, config = to_yaml(settings(*_length(style, *before))), settings(*_length(style, *now))
    assert differences(old, config) == []
    assert is_longer(old, config) == is_longer_now
    expected = [
        f"train.{key}: was {was}, is now {value}"
        for key, was, value in zip(("train_iters", "lr_decay_iters"), before, now, strict=True)
        if was != value
    ]
    assert [str(one) for one in changes(old, config)] == expected


@pytest.mark.parametrize(
    ("style", "before", "now", "advice"),
    [
        ("constant", (4, None), (3, None), "may become more, not fewer"),
        ("linear", (4, 9), (3, 9), "may become more, not fewer"),
        ("linear", (4, None), (6, None), "train.lr_decay_iters=4 keeps that"),
        ("cosine", (4, None), (6, 6), "train.lr_decay_iters=4 keeps that"),
        ("linear", (4, 9), (4, None), "train.lr_decay_iters=9 keeps that"),
    ],
)
def test_other_lengths_are_refused_with_what_would_do(settings, style, before, now, advice):
    old, config = to_yaml(settings(*_length(style, *before))), settings(*_length(style, *now))
    assert {one.key for one in differences(old, config)} <= {"train.train_iters", "train.lr_decay_iters"}
    assert differences(old, config)
    assert advice in length_advice(old, config)


def test_a_run_of_a_version_without_the_key_is_lengthened(settings):
    old = re.sub(r" *lr_decay_iters: null\n", "", to_yaml(settings(*_length("linear", 4))))
    assert "lr_decay_iters" not in old
    assert differences(old, settings(*_length("linear", 6, 4))) == []
    assert differences(old, settings(*_length("linear", 6)))


def test_a_decay_that_ends_before_it_begins_is_refused(settings):
    with pytest.raises(ConfigError, match=r"lr_decay_iters must lie above train.lr_warmup_iters=3; got 3"):
        settings(*_length("linear", 9, 3), "train.lr_warmup_iters=3")
    with pytest.raises(ConfigError, match=r"train\.lr_decay_iters(.|\n)*lr_decay_style is constant"):
        settings("train.lr_decay_iters=3")


def test_settings_that_name_places_are_moved_and_not_changed(settings):
    data = ("data.source=jsonl", "data.path=a.jsonl")
    old = to_yaml(settings(*data, "teacher.adapter=a"))
    config = settings(*data[:1], "data.path=b.jsonl", "teacher.adapter=b", "model=elsewhere")
    assert differences(old, config) == changes(old, config) == []
    assert [str(one) for one in moved(old, config)] == [
        "model: was 'student', is now 'elsewhere'",
        "teacher.adapter: was 'a', is now 'b'",
        "data.path: was 'a.jsonl', is now 'b.jsonl'",
    ]
    without = settings(*data)
    assert [one.key for one in differences(old, without)] == ["teacher.adapter"], "none is not another place"


def test_another_teacher_was_not_moved(write):
    def routed(*names: str) -> Any:
        routes = ", ".join(f"{name}: {{model: {name}}}" for name in names)
        text = f"model: student\noutput_dir: runs/a\nteacher: {{routes: {{{routes}}}}}\n"
        return load_recipe("train", write(text + "data: {source: jsonl, path: a.jsonl, teacher_key: who}\n")).config

    old, config = to_yaml(routed("math", "code")), routed("math", "code", "law")
    assert moved(old, config) == []
    assert "teacher.routes.law.model" in [one.key for one in differences(old, config)]


def _length(style: str, train_iters: int, decay_iters: int | None = None) -> list[str]:
    more = [] if decay_iters is None else [f"train.lr_decay_iters={decay_iters}"]
    return [f"train.lr_decay_style={style}", f"train.train_iters={train_iters}", *more]
