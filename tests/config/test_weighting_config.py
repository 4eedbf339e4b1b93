"""Settings whose class one of them picks: of weightings, lists of them, and one inside another."""

from __future__ import annotations

from dataclasses import replace

import pytest

from renio_megatron.config import TeacherConfig, WeightingConfig
from renio_megatron.config.load import check_world, load_recipe
from renio_megatron.config.parser import read_recipe
from renio_megatron.config.resume import changes, differences, of_before, to_yaml
from renio_megatron.config.schema import DistillationConfig
from renio_megatron.config.sections.combined_weighting import PermutedWeighting, ProductWeighting
from renio_megatron.config.sections.weighting import LengthWeighting, RenioWeighting, StudentEntropyWeighting
from renio_megatron.errors import ConfigError

TRAIN = "model: student\noutput_dir: runs/a\nteacher:\n  model: teacher\n"


@pytest.fixture
def train(write):
    return lambda more="", *overrides: load_recipe("train", write(TRAIN + more), overrides)


def test_a_weighting_that_is_divided_by_a_mean_needs_a_batch(train):
    config = train("train: {global_batch_size: 2}\n").config
    alone = replace(config, train=replace(config.train, global_batch_size=1))
    other = replace(alone, weighting=WeightingConfig(name="length"))
    for one, name in ((alone, "renio"), (other, "length")):
        with pytest.raises(ConfigError, match=f"weighting '{name}' needs at least 2 sequences"):
            check_world(one, 1)
    check_world(replace(alone, weighting=WeightingConfig(name="uniform")), 1)
    check_world(config, 1)


def test_a_call_of_the_base_makes_the_class_of_the_name():
    made = WeightingConfig(name="length", cap=5.0)
    assert (type(made), made.name, made.cap) == (LengthWeighting, "length", 5.0)
    assert type(WeightingConfig()) is RenioWeighting
    assert type(replace(made, cap=2.0)) is LengthWeighting
    with pytest.raises(ConfigError, match=r"weighting\.threshold is no setting of name=length, which has name, norm"):
        WeightingConfig(name="length", threshold=1.0)
    with pytest.raises(ConfigError, match=r"teacher\.model is no setting of kind=ema"):
        TeacherConfig(kind="ema", model="a")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("weighting: length", LengthWeighting()),
        ("weighting: {name: student_entropy, per: sequence, normalize: batch}", "per sequence"),
        ("weighting: {name: permuted}", PermutedWeighting()),
        ("weighting: {name: permuted, of: length}", PermutedWeighting(of=LengthWeighting())),
        ("weighting: {name: permuted, of: {name: length, cap: 3}}", PermutedWeighting(of=LengthWeighting(cap=3.0))),
        ("weighting: [renio, {name: length, cap: 3}]", "product"),
        ("weighting: {name: product, factors: [renio, {name: length, cap: 3}]}", "product"),
    ],
)
def test_a_weighting_is_read_as_its_class_and_written_so_that_it_is_read_again(train, write, text, expected):
    named = {
        "per sequence": StudentEntropyWeighting(per="sequence", normalize="batch"),
        "product": ProductWeighting(factors=(RenioWeighting(), LengthWeighting(cap=3.0))),
    }
    config = train(text + "\n").config
    assert config.weighting == (named[expected] if isinstance(expected, str) else expected)
    assert differences(to_yaml(config), config) == []
    assert read_recipe(DistillationConfig, write(to_yaml(config))).config == config


def test_the_command_line_reaches_settings_inside_a_list_and_inside_another(train):
    config = train("weighting: [renio, {name: length}]\n", "weighting.factors.1.cap=3").config
    assert config.weighting.factors == (RenioWeighting(), LengthWeighting(cap=3.0))
    config = train("", "weighting=permuted", "weighting.of=length", "weighting.of.cap=3").config
    assert config.weighting == PermutedWeighting(of=LengthWeighting(cap=3.0))
    config = train("weighting: {threshold: 1.0}\n", "weighting=[renio, student_entropy]").config
    assert config.weighting == ProductWeighting(factors=(RenioWeighting(), StudentEntropyWeighting()))


@pytest.mark.parametrize(
    ("text", "overrides", "words"),
    [
        ("weighting: [renio, {name: unifrom}]", [], ["weighting.factors.1.name must be one of", "'unifrom'"]),
        ("weighting: [renio, {name: length, cap: -1}]", [], ["weighting.factors.1.cap must be positive"]),
        (
            "weighting: {name: permuted, of: {threshold: 9}}",
            [],
            ["weighting.of.ceiling (2.5) is below weighting.of.th"],
        ),
        ("weighting: [renio, [length]]", [], ["no list among them"]),
        ("weighting: []", [], ["at least one strategy"]),
        ("weighting: {name: permuted, of: permuted}", [], ["weighting.of", "one strategy"]),
        ("weighting: [renio, {name: length, threshold: 1}]", [], ["weighting.factors.1.threshold", "not renio"]),
        (
            "weighting: {name: permuted, threshold: 1}",
            [],
            ["weighting.threshold", "weighting.name is permuted, not renio"],
        ),
        ("", ["weighting.factors.0.cap=3"], ["weighting.factors.0.cap", "weighting.name is renio, not product"]),
        ("weighting: {name: student_entropy, per: word}", [], ["weighting.per must be one of token, sequence"]),
        (
            "weighting: {name: student_entropy, cap: 3}",
            [],
            ["weighting.cap is set but would be ignored", "tokens are not"],
        ),
        ("weighting: {name: student_entropy, per: sequence}", [], ["weighting.per=sequence", "normalize=batch"]),
        ("also_report: [length]", [], ["also_report", "renio"]),
        ("also_report: renio", [], ["also_report is a list of sections"]),
        ("weighting: uniform\nalso_report: [renio, renio]", [], ["also_report names diagnostics twice"]),
        ("weighting: uniform\nalso_report: [{name: renio, cap: 3}]", [], ["unknown key 'also_report.0.cap'"]),
        (
            "weighting: uniform\nalso_report: [{threshold: 9}]",
            [],
            ["also_report.0.ceiling (2.5) is below also_r"],
        ),
        ("also_report: [{threshold: .5}]", [], ["also_report.0.threshold is set but would be ignored: ReNIO is in"]),
        ("", ["also_report=[renio]"], ["also_report.0.name is set but would be ignored: ReNIO is in the weighting"]),
    ],
)
def test_mistakes_are_named(train, text, overrides, words):
    with pytest.raises(ConfigError) as caught:
        train(text + "\n", *overrides)
    for word in words:
        assert word in str(caught.value)


def test_settings_of_another_strategy_may_be_null_and_are_dropped_by_the_command_line(train):
    assert train("weighting: {name: uniform, threshold: null}\n").config.weighting == WeightingConfig(name="uniform")
    recipe = train("weighting: {threshold: 1.0, cap: 5}\n", "weighting.name=length")
    assert recipe.config.weighting == LengthWeighting(cap=5.0)
    assert recipe.dropped_lines() == [
        "left out of the recipe: weighting.threshold: weighting.name is length, not renio",
    ]
    with pytest.raises(ConfigError, match=r"weighting\.threshold is set but would be ignored"):
        train("weighting: {threshold: 1.0}\n", "weighting.name=length", "weighting.threshold=2.0")


def test_diagnostics_of_renio_are_those_of_the_weighting_or_asked_for(train):
    assert train().config.renio_report == RenioWeighting()
    assert train("weighting: uniform\n").config.renio_report is None
    asked = train("weighting: uniform\nalso_report: [{name: renio, threshold: 1.0}]\n").config
    assert asked.renio_report == RenioWeighting(threshold=1.0)
    found = [str(one) for one in changes(to_yaml(train("weighting: uniform\n").config), asked)]
    assert "also_report.0.name: was '(not there)', is now 'renio'" in found
    assert "also_report.0.threshold: was '(not there)', is now 1.0" in found


def test_a_run_of_before_had_settings_of_all_strategies_and_goes_on(train):
    config = train("weighting: uniform\n").config
    before = to_yaml(config).replace("  name: uniform\n", "  name: uniform\n  threshold: 0.8\n  normalise: batch\n")
    before = before.replace("  kind: separate\n", "  kind: separate\n  ema_decay: 0.999\n").replace(
        "also_report: []\n", ""
    )
    assert "threshold" in before and "ema_decay" in before and "also_report" not in before
    assert differences(before, config) == []
    assert of_before(to_yaml(config), config) == ""
    assert of_before(before, config) == (
        "ReNIO's diagnostics, with weighting.threshold, are there where also_report=[renio] asks for them; "
        "teacher.ema_decay, weighting.normalise had no effect, and are left out"
    )
    renio = train().config
    before = to_yaml(renio).replace("normalize: batch", "normalise: batch")
    assert of_before(before, renio) == "weighting.normalise is called weighting.normalize"


def test_a_report_is_dropped_where_the_command_line_chooses_renio(train):
    recipe = train("weighting: uniform\nalso_report: [renio]\n", "weighting=renio")
    assert recipe.config.also_report == () and recipe.config.renio_report == RenioWeighting()
    assert recipe.dropped_lines() == [
        "left out of the recipe: also_report.0.name: ReNIO is in the weighting, and its diagnostics are reported anyway"
    ]
