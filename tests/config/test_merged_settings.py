"""A recipe and its command line, one after the other: what adds, what replaces, and what cannot stand there."""

from __future__ import annotations

import pytest

from renio_megatron.config import TeacherConfig, WeightingConfig
from renio_megatron.config.load import load_recipe
from renio_megatron.config.sections.teacher import EmaTeacher
from renio_megatron.errors import ConfigError

START = "model: student\noutput_dir: runs/a\n"
TEACHER = "teacher: {model: teacher}\n"
LIST = "weighting: [renio, student_entropy]\n"
ROUTES = "teacher: {routes: {a: {model: x, template: 'A {problem}'}, b: {kind: ema, template: 'B {problem}'}}}\n"
RECORDS = "data: {source: jsonl, path: a, teacher_key: field}\nevaluate: {every: 0}\n"

RENIO, LENGTH, ENTROPY = (WeightingConfig(name=name) for name in ("renio", "length", "student_entropy"))


def product(*factors):
    return WeightingConfig(name="product", factors=factors)


@pytest.fixture
def weighting(write):
    return lambda more, *overrides: load_recipe("train", write(START + TEACHER + more), overrides).config.weighting


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        (LIST, ["weighting={}"], product(RENIO, ENTROPY)),
        (LIST, ["weighting={factors: [length]}"], product(LENGTH)),
        (LIST, ["weighting={name: product, factors: [length]}"], product(LENGTH)),
        (LIST, ["weighting.factors={0: {cap: 4}}"], product(WeightingConfig(cap=4.0), ENTROPY)),
        (LIST, ["weighting.factors.2=length"], product(RENIO, ENTROPY, LENGTH)),
        (LIST, ["weighting.factors.1=length"], product(RENIO, LENGTH)),
        (LIST, ["weighting=[length, renio]"], product(LENGTH, RENIO)),
        (LIST, ["weighting=[renio, length]", "weighting.factors.1.cap=3"], None),
        (LIST, ["weighting=length"], LENGTH),
        (LIST, ["weighting=null"], RENIO),
        ("weighting: {name: permuted, of: length}\n", ["weighting={of: {cap: 3}}"], None),
        (
            "weighting: {name: permuted, of: length}\n",
            ["weighting.of=renio"],
            WeightingConfig(name="permuted", of=RENIO),
        ),
        ("", ["weighting=product", "weighting.factors.1=renio", "weighting.factors.0=length"], product(LENGTH, RENIO)),
        ("weighting: {factors: {'1': renio, '0': length}, name: product}\n", [], product(LENGTH, RENIO)),
        ("weighting: {name: '${oc.env:CHOSEN}'}\n", [], LENGTH),
        ("weighting: ['${oc.env:CHOSEN}', renio]\n", [], product(LENGTH, RENIO)),
        ("", ["weighting=${oc.env:CHOSEN}"], LENGTH),
        ("weighting: [{name: length, cap: '${train.clip_grad}'}]\n", ["train.clip_grad=3"], None),
    ],
)
def test_what_comes_later_adds_or_takes_the_place(weighting, monkeypatch, text, overrides, expected):
    monkeypatch.setenv("CHOSEN", "length")
    capped = WeightingConfig(name="length", cap=3.0)
    others = {2: product(RENIO, capped), 1: WeightingConfig(name="permuted", of=capped)}
    if "clip_grad" in text:
        others[1] = product(capped)
    assert weighting(text, *overrides) == (others[len(overrides)] if expected is None else expected)


def test_routes_are_added_to(write):
    def routes(*overrides):
        return load_recipe("train", write(START + RECORDS + ROUTES), overrides).config.teacher.routes

    a, b = TeacherConfig(model="x", template="A {problem}"), EmaTeacher(template="B {problem}")
    assert routes() == {"a": a, "b": b}
    c = TeacherConfig(model="z", template="C {problem}")
    assert routes("teacher={routes: {c: {model: z, template: 'C {problem}'}}}") == {"a": a, "b": b, "c": c}
    assert routes("teacher.routes={b: {ema_decay: .5}}")["b"] == EmaTeacher(template="B {problem}", ema_decay=0.5)
    assert routes("teacher.routes.b=ema", "teacher.routes.b.template=D {problem}")["b"] == EmaTeacher(
        template="D {problem}"
    )


@pytest.mark.parametrize(
    ("text", "overrides", "words"),
    [
        (LIST, ["weighting={cap: 3}"], ["weighting.cap is set but would be ignored", "weighting.name is product, not"]),
        (LIST, ["weighting.factors.7.cap=3"], ["weighting.factors.7: weighting.factors is a list", "Give 0, 1, 2."]),
        (LIST, ["weighting.factors.x.cap=3"], ["weighting.factors.x: weighting.factors is a list"]),
        (LIST, ["weighting.factors.01.cap=3"], ["weighting.factors.01: weighting.factors is a list"]),
        (
            "",
            ["weighting=product", "weighting.factors.1=renio"],
            ["weighting.factors.1", "is the only entry, and must be 0"],
        ),
        ("", ["weighting=product", "weighting.factors.²=renio"], ["weighting.factors.²", "must be 0"]),
        ("", ["weighting=product", "weighting.factors.٣=renio"], ["weighting.factors.٣", "must be 0"]),
        ("also_report: {a: renio}\n", [], ["also_report.a: also_report is a list", "must be 0"]),
        ("", ["also_report.1=renio"], ["also_report.1: also_report is a list"]),
        ("weighting: ''\n", [], ["weighting.name must be one of", "got ''"]),
        ("weighting: {name: ''}\n", [], ["weighting.name must be one of", "got ''"]),
        ("weighting: {name: 0}\n", [], ["weighting.name must be text; got 0"]),
        ("weighting: {name: [a]}\n", [], ["weighting.name must be text; got ['a']"]),
        ("weighting: 3\n", [], ["weighting is a section with the keys name,", "plain word for weighting.name; got 3"]),
        ("", ["teacher.kind=''"], ["teacher.kind must be one of", "got ''"]),
        ("weighting: {name: '${nothing.there}'}\n", [], ["weighting.name", "cannot be resolved"]),
        (
            "weighting: [{name: length, cap: '${nothing.there}'}]\n",
            [],
            ["weighting.factors.0.cap", "cannot be resolved"],
        ),
        (
            "weighting: {name: permuted, of: {ema_decay: .5}}\n",
            [],
            ["weighting.of.ema_decay", "weighting.of.normalize is"],
        ),
        (
            "weighting: [{name: renio, normalise: none}]\n",
            [],
            ["factors.0.normalise is called weighting.factors.0.normalize"],
        ),
        ("", ["weighting=[renio,"], ["command line: weighting=[renio, is not valid YAML"]),
        ("", [f"weighting={'[' * 3000}"], ["command line", "is not valid YAML"]),
        ("weighting: {'': 2}\n", [], ["unknown key 'weighting.'", "The keys of weighting are name"]),
        ("", ["weighting.=3"], ["unknown key 'weighting.'"]),
        ("", ["weighting..name=renio"], ["unknown key 'weighting..name'"]),
        ("", ["teacher.routes=[a]"], ["teacher.routes is a section whose keys are names of your choice"]),
        ("", ["teacher.routes=a"], ["teacher.routes is a section whose keys are names of your choice"]),
    ],
)
def test_what_cannot_stand_there_is_named(weighting, text, overrides, words):
    with pytest.raises(ConfigError) as caught:
        weighting(text, *overrides)
    for word in words:
        assert word in str(caught.value)
    assert "None" not in str(caught.value).replace("got None", "")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: type(LENGTH)(name="renio"), r"weighting\.name of a LengthWeighting is length; got 'renio'"),
        (lambda: product("renio"), r"weighting\.factors.*WeightingConfig"),
        (lambda: WeightingConfig(name="product", factors=3), r"weighting\.factors.*WeightingConfig"),
        (lambda: WeightingConfig(name="permuted", of="renio"), r"weighting\.of.*WeightingConfig"),
    ],
)
def test_a_call_with_another_name_or_no_settings_is_refused(make, words):
    with pytest.raises(ConfigError, match=words):
        make()
