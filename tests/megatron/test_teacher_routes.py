"""Several teachers, each for the records that name it: the step by transformers, layouts, runs, settings, records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from renio_megatron.config.load import check_models, load_recipe
from renio_megatron.errors import ConfigError, DataError
from tests.helpers.multiprocess import run_ranks
from tests.helpers.resuming import rows, same
from tests.megatron.route_cases import (
    MIXED,
    STEPS,
    cases,
    own_layout_cases,
    routed,
    run_cases,
    run_own_layouts,
    run_runs,
    write_records,
)

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def ranks(models: Path) -> list[dict[str, Any]]:
    return run_ranks(run_cases, 2, models, timeout=300)


def _assert_as_reference(name: str, found: dict[str, Any]) -> None:
    for key in ("gradient_error", "grad_norm_error", "loss_error", "weight_error"):
        assert found[key] < TOLERANCE, (name, key)
    assert found["raw_weights_not_1"] >= 3, "weights that say nothing prove nothing"
    for name, expected in found["reference_by_teacher"].items():
        for key, value in expected.items():
            assert found["by_teacher"][f"teacher/{name}/{key}"] == pytest.approx(value, rel=TOLERANCE)


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return list(cases(tmp_path_factory.mktemp("names")))


@pytest.mark.timeout(400)
def test_a_step_with_several_teachers_is_the_reference(names, ranks):
    for name in names:
        for rank in ranks:
            _assert_as_reference(name, rank[name])
            shares = [v for k, v in rank[name]["by_teacher"].items() if k.endswith("sequences_frac")]
            assert sum(shares) == pytest.approx(1.0)


@pytest.mark.timeout(400)
def test_every_layout_draws_and_weighs_the_same_sequences(names, ranks):
    mixed = [name for name in names if name in ("TP2", "PP2, host, packed", "CP2, packed", "DP2, packed")]
    first = ranks[0][mixed[0]]
    for name in mixed[1:]:
        assert sorted(ranks[0][name]["tokens"]) == sorted(first["tokens"])
        assert sorted(ranks[0][name]["weights"]) == pytest.approx(sorted(first["weights"]), rel=TOLERANCE)


@pytest.mark.timeout(400)
def test_the_same_model_is_loaded_once(ranks):
    assert {rank["TP2"]["memory"] for rank in ranks} == {3}  # `shown` is `large` with another view


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_teachers_in_layouts_of_their_own(models, tmp_path_factory):
    found = run_ranks(run_own_layouts, 4, models, timeout=400)
    for name in own_layout_cases(tmp_path_factory.mktemp("own names")):
        is_dedicated = name.startswith("dedicated")
        for rank in found[: 2 if is_dedicated else 4]:
            _assert_as_reference(name, rank[name])
            assert rank[name]["sent_mb"] > 0
        if is_dedicated:
            assert [rank[name] for rank in found[2:]] == [(3, 1), (3, 1)]  # all three are asked in the one step


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_runs_go_on_bit_for_bit_and_change_no_teacher(models):
    ranks = run_ranks(run_runs, 2, models, timeout=400)
    for name in ("full, TP2", "LoRA, PP2", "full, DP2"):
        for found in (rank[name] for rank in ranks):
            assert found["teachers"] == ["large", "itself", "average"]
            assert found["unchanged"]
            assert found["frozen"]["large"] > 0
            assert found["frozen"]["itself"] > 0
            assert found["averages"]
        for rank in ranks:
            whole, again = rank[name], rank[f"{name}, cut off"]
            assert (whole["outcome"], again["outcome"]) == ("new", "resumed")
            assert same(whole["parameters"], again["parameters"])
            assert same(whole["averages"], again["averages"])
        metrics = rows(models, f"routes, {name}")
        assert metrics == rows(models, f"routes, {name}, cut off")
        assert len(metrics) == STEPS
        assert "teacher/average/kl" in metrics[0]


ROUTES = {"math": {"model": "models/math"}, "self": {"kind": "initial", "template": "{problem} {solution}"}}
DATA = {"source": "jsonl", "path": "train.jsonl", "teacher_key": "who"}


@pytest.fixture
def load(tmp_path):
    """A function: changed sections and overrides -> the loaded recipe."""

    def load_with(*overrides: str, **sections: Any) -> Any:
        whole = {"model": "student", "output_dir": "run", "teacher": {"routes": ROUTES}, "data": DATA}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({**whole, **sections}))
        return load_recipe("train", path, overrides)

    return load_with


def test_a_recipe_names_its_teachers(load):
    recipe = load("teacher.routes.code.model=models/code", "teacher.routes.math.adapter=a", "teacher.offload=host")
    routes = recipe.config.teacher.routes
    assert list(routes) == ["math", "self", "code"]
    assert (routes["math"].adapter, routes["code"].model, routes["self"].kind) == ("a", "models/code", "initial")
    assert "teacher.routes.code.model" in recipe.explicit
    teachers = {one.name: one for one in recipe.config.teachers}
    assert teachers["math"].settings.offload == "host"
    assert teachers["math"].data.teacher_template is None
    assert teachers["self"].data.teacher_template == "{problem} {solution}"
    word = load("teacher.routes.self=current", "data.teacher_template='{solution}'").config.teacher.routes["self"]
    assert (word.kind, word.template) == ("current", None)  # a plain word starts the section afresh
    assert list(load("teacher.routes={one: {model: a}}").config.teacher.routes) == ["math", "self", "one"]


def test_weights_are_shared_where_they_are_the_same(load):
    both = {
        "a": {"model": "models/a"},
        "b": {"model": "models/../models/a", "template": "{problem}!"},
        "c": {"model": "models/a", "adapter": "x"},
        "d": {"kind": "initial", "template": "{solution}"},
        "e": {"kind": "initial", "enable_thinking": True},
        "f": {"kind": "ema", "template": "{solution}"},
    }
    config = load(teacher={"routes": both}, data={**DATA, "chat": True}).config
    assert {one.name: one.weights_of for one in config.teachers} == {
        "a": "a",
        "b": "a",
        "c": "c",
        "d": "d",
        "e": "d",
        "f": "f",
    }


@pytest.mark.parametrize(
    ("overrides", "sections", "words"),
    [
        (["teacher.model=a"], {}, ["teacher.model is set but would be ignored", "teacher.routes says it"]),
        (
            ["teacher.routes.math.kind=initial", "teacher.routes.math.model=a"],
            {},
            ["teacher.routes.math.model is set but would be ignored"],
        ),
        (["teacher.routes.math.ema_decay=0.5"], {}, ["teacher.routes.math.ema_decay is set but would be ignored"]),
        (["teacher.routes.math.kind=other"], {}, ["teacher.routes.math.kind must be one of separate"]),
        (
            ["teacher.routes.math.modle=x"],
            {},
            ["'teacher.routes.math.modle'. The keys of teacher.routes.math are kind, model"],
        ),
        (["teacher.routes.math.model=null"], {}, ["teacher.routes.math.kind=separate needs teacher.routes.math.model"]),
        (["teacher.routes.a/b.model=x"], {}, ["'a/b' cannot name a teacher"]),
        (["teacher.routes=math"], {}, ["teacher.routes is a section whose keys are names of your choice"]),
        ([], {"teacher": {"routes": {"a.b": {"model": "x"}}}}, ["'a.b' cannot be a name"]),
        ([], {"data": {"source": "jsonl", "path": "a"}}, ["data.teacher_key is missing"]),
        ([], {"data": {"teacher_key": "who"}}, ["data.teacher_key is set but would be ignored"]),
        ([], {"data": {}}, ["data.teacher_key is missing"]),
        ([], {"teacher": {"model": "b"}}, ["data.teacher_key is set but would be ignored", "there is one teacher"]),
        (
            ["teacher.routes.self.template='{problem}'"],
            {},
            ["teacher.routes.self: teacher.kind=initial with the student's"],
        ),
        (
            ["teacher.routes.math.template='{problem}'", "data.teacher_template={problem}!"],
            {},
            ["data.teacher_template is set but would be ignored", "template of its own"],
        ),
        (
            ["teacher.routes.a={kind: ema, template: '{solution}'}", "teacher.routes.b={kind: ema, ema_decay: 0.9}"],
            {"data": {**DATA, "teacher_template": "{solution}"}},
            ["teacher.routes.a and teacher.routes.b are moving averages with different"],
        ),
        (["teacher.payload_device=recompute", "lora.r=4"], {}, ["teacher.routes.self: ", "recompute"]),
        (
            ["parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2", "lora.r=4"],
            {},
            ["teacher.routes.self is the student's own modules, and an interleaved pipeline"],
        ),
        (["parallel.expert_model_parallel_size=2"], {}, ["teacher.routes with parallel.expert_model_parallel_size=2"]),
        (
            ["teacher.routes.math=current", "teacher.routes.math.template='{solution}'", "teacher.bf16=true"],
            {"lora": {"r": 4}},
            ["teacher.bf16 is set but would be ignored"],
        ),
    ],
)
def test_recipes_that_cannot_work(load, overrides, sections, words):
    with pytest.raises(ConfigError) as caught:
        load(*overrides, **sections)
    for word in words:
        assert word in str(caught.value)


def test_a_model_that_is_not_there_is_named_by_its_route(load, models):
    config = load(model=str(models / "student")).config
    with pytest.raises(ConfigError, match=r"teacher\.routes\.math\.model"):
        check_models(config)


def _change(path: Path, line: int, **values: Any) -> None:
    lines = path.read_text().splitlines()
    record = json.loads(lines[line]) | values
    lines[line] = json.dumps({key: value for key, value in record.items() if value is not None})
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"who": "physics"}, r"records\.jsonl:3: column 'who' names the teacher 'physics'; teacher\.routes has large"),
        ({"who": None}, r"records\.jsonl:3: there is no column 'who'"),
        ({"who": 7}, r"records\.jsonl:3: column 'who' must hold text"),
        ({"who": "shown", "solution": None}, r"teacher\.routes\.shown\.template uses \{solution\}"),
    ],
)
def test_a_record_that_names_no_teacher_is_found_before_the_first_step(models, tmp_path, values, message):
    from dataclasses import replace

    from renio_megatron.runner.inputs import read_inputs

    config = routed(models)
    data = replace(write_records(tmp_path / "records.jsonl", MIXED), path=str(tmp_path / "records.jsonl"))
    _change(tmp_path / "records.jsonl", 2, **values)
    with pytest.raises(DataError, match=message):
        read_inputs(replace(config, data=data))


def test_only_records_whose_teacher_reads_it_need_a_solution(models, tmp_path):
    from dataclasses import replace

    from renio_megatron.runner.inputs import read_inputs

    data = write_records(tmp_path / "records.jsonl", MIXED)
    lines = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    for number, record in enumerate(lines):
        if record["who"] in ("large", "small"):
            _change(tmp_path / "records.jsonl", number, solution=None)
    inputs = read_inputs(replace(routed(models), data=data))
    prompts = inputs.stream.batch(0, 8)
    assert [prompt.teacher for prompt in prompts] == list(MIXED)
    longer = [len(prompt.teacher_ids) > len(prompt.student_ids) for prompt in prompts]
    assert longer == [name in ("shown", "itself") for name in MIXED]


def test_the_command_for_one_teacher_says_so(load, models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_text('{"problem": "^1+1="}\n')
    from renio_megatron.tools.precision.experiment import compare_precision

    whole = {"math": {"model": str(models / "teacher")}, "self": ROUTES["self"]}
    load(model=str(models / "student"), teacher={"routes": whole})
    with pytest.raises(ConfigError, match=r"renio compare-precision.*teacher\.routes"):
        compare_precision(str(tmp_path / "recipe.yaml"), [], None)


def test_metrics_and_rollouts_carry_the_teachers_name(tmp_path):
    from renio_megatron.training.metrics.accumulator import MetricAccumulator
    from renio_megatron.training.metrics.sinks import JsonlSink, read_metrics
    from renio_megatron.training.rollout_log import RolloutSink
    from renio_megatron.types import Prompt, Rollout

    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.write(1, {"teacher/code/kl": 0.5, "loss": 1.0, "teacher/math/kl": 0.25, "teacher/code/accuracy": 0.0})
    sink.close()
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert list(row) == ["step", "loss", "teacher/code/kl", "teacher/math/kl", "teacher/code/accuracy"]
    with pytest.raises(KeyError, match="teacher/code/kk"):
        JsonlSink(tmp_path / "other.jsonl").write(1, {"teacher/code/kk": 0.5})
    with pytest.raises(KeyError):  # its ranks would have to know all names
        MetricAccumulator().add("teacher/code/kl", 1.0)

    log = RolloutSink(tmp_path / "rollouts.jsonl")
    named = [Prompt(number, (1,), (1,), teacher=teacher) for number, teacher in enumerate(("code", ""))]
    log.write(1, [Rollout(prompt, (2,)) for prompt in named], [1.0, 1.0])
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    assert [line.get("teacher") for line in lines] == ["code", None]
