"""`renio compare-precision`: the same step as the trainer's, in every layout, and errors just where FP8 is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from renio_megatron.cli.main import main
from renio_megatron.config import (
    HeadConfig,
    ParallelConfig,
    PrecisionConfig,
    TeacherConfig,
    TeacherPrecisionConfig,
    TrainConfig,
)
from renio_megatron.errors import ConfigError
from renio_megatron.tools.precision.experiment import NOISE, compare_precision, describe, precisions_of
from tests.helpers.multiprocess import run_ranks
from tests.helpers.paths import ROOT
from tests.helpers.training_cases import recipe, save_models

LAYOUTS: dict[str, dict[str, Any]] = {
    "DP2": {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True},
    "PP2": {"pipeline_model_parallel_size": 2},
    "TP2 + SP": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "CP2": {"context_parallel_size": 2},
}
EXAMPLE = str(ROOT / "examples" / "modchain.yaml")
VARIANTS = ("teacher FP8", "student FP8", "both FP8", NOISE)


def _config(folder: Path, layout: str, **changes: Any) -> Any:
    # One sequence a micro-batch: a tensor-wise scale is a micro-batch's.
    train = TrainConfig(train_iters=1, global_batch_size=4, micro_batch_size=1, lr=1e-3, seed=7)
    return recipe(
        folder, model=str(folder / "tied"), parallel=ParallelConfig(**LAYOUTS[layout]), train=train, **changes
    )


def _compare(config: Any, layout: Any) -> dict[str, Any]:
    from renio_megatron.runner.inputs import read_inputs
    from renio_megatron.tools.precision.experiment import _Comparison

    precisions = precisions_of(config, has_fp8=False)
    return _Comparison(precisions, read_inputs(precisions.baseline), layout).run()


def _in_every_layout(folder: Path) -> dict[str, Any]:
    from renio_megatron.megatron.runtime.initialize import start
    from renio_megatron.runner.build import build_trainer
    from renio_megatron.runner.inputs import read_inputs

    found: dict[str, Any] = {}
    for name in LAYOUTS:
        config = _config(folder, name)
        layout = start(config.parallel, seed=7)
        found[name] = _compare(config, layout)
        trainer = build_trainer(config, read_inputs(config), layout, folder / "unused")
        trainer.save_interval = 0
        found[f"{name}, trained"] = trainer.run()
    but_all = {"fp8": "e4m3", "first_last_layers_bf16": True, "num_layers_at_start_in_bf16": 4, "emulate_fp8": True}
    excepted = _config(
        folder,
        "CP2",
        precision=PrecisionConfig(**but_all),
        teacher_precision=TeacherPrecisionConfig(**but_all),
    )
    found["but all layers"] = _compare(excepted, layout)
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("precision")
    save_models(folder)
    return run_ranks(_in_every_layout, 2, folder, timeout=280.0)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_step_is_the_trainers(ranks, name):
    found, trained = ranks[0][name], ranks[0][f"{name}, trained"]
    assert found == ranks[1][name], "the same on every rank"
    assert found["gradient_norm"] == pytest.approx(trained["grad_norm"], rel=1e-5)
    assert found["tokens"] == pytest.approx(4 * trained["rollout/length"])
    assert found["pivotal_tokens"] == pytest.approx(found["tokens"] * trained["renio/pivotal_frac"])
    assert found["sequences"] == 4
    assert found["weights_not_1"] > 1


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", LAYOUTS)
def test_errors_are_where_fp8_is(ranks, name):
    found = ranks[0][name]["variants"]
    assert tuple(found) == VARIANTS
    for key in ("absolute_rms", "relative_p99"):
        student, teacher = ([found[one][f"{who}_logp/{key}"] for one in VARIANTS] for who in ("student", "teacher"))
        assert student[0] == teacher[1] == 0
        assert student[1] == student[2] > 1e-3
        assert teacher[0] == teacher[2] > 1e-3
        assert 0 < student[3] < student[1]
    for one in VARIANTS:
        figures = found[one]
        assert 0.5 < figures["gradient/cosine"] < 1
        assert figures["gradient/worst_cosine"] <= figures["gradient/cosine"]
        assert figures["gradient/relative"] == pytest.approx(  # of the two norms and the angle between them
            (1 + (r := 1 + figures["gradient/norm_relative"]) ** 2 - 2 * r * figures["gradient/cosine"]) ** 0.5,
            rel=1e-3,
        )
        assert figures["divergence/token_relative"] > 0


@pytest.mark.timeout(300)
def test_the_layout_changes_nothing_where_no_operand_is_cut(ranks):
    whole, other = (ranks[0][name] for name in ("DP2", "PP2"))
    for key in ("tokens", "pivotal_tokens", "weights_not_1"):
        assert len({ranks[0][name][key] for name in LAYOUTS}) == 1
    for name in VARIANTS[:3]:  # in bf16 a sum's order can be seen
        for key, value in whole["variants"][name].items():
            if key != "worst":
                assert other["variants"][name][key] == pytest.approx(value, rel=2e-2, abs=1e-4), (name, key)
        assert whole["variants"][name]["gradient/cosine"] == pytest.approx(
            ranks[0]["TP2 + SP"]["variants"][name]["gradient/cosine"], abs=0.05
        )


@pytest.mark.timeout(300)
def test_a_model_with_no_layer_in_fp8_has_no_error(ranks):
    found = ranks[0]["but all layers"]["variants"]
    for name in VARIANTS[:3]:
        figures = {key: value for key, value in found[name].items() if key != "worst"}
        for key in ("gradient/cosine", "gradient/worst_cosine", "weight/rank_correlation"):
            assert figures.pop(key) == pytest.approx(1.0)
        assert set(figures.values()) == {0.0}
    assert found[NOISE]["student_logp/absolute_rms"] > 0


def test_what_is_compared_follows_from_the_recipe(tmp_path):
    plain = recipe(tmp_path)
    found = precisions_of(plain, has_fp8=False)
    assert found.baseline.precision == PrecisionConfig(backend="local")
    for section in (found.fp8.precision, found.fp8.teacher_precision):
        assert (section.fp8, section.fp8_recipe, section.emulate_fp8) == ("hybrid", "tensorwise", True)
    assert type(found.fp8.teacher_precision) is TeacherPrecisionConfig
    assert (found.baseline.train.bf16, found.fp8.train.bf16, found.other.train.bf16) == (False, False, True)

    assert precisions_of(plain, has_fp8=True) == found, "FP8 products are for bf16 models"

    own = recipe(
        tmp_path,
        precision=PrecisionConfig(fp8="e4m3", fp8_recipe="mxfp8", first_last_layers_bf16=True),
        train=TrainConfig(bf16=True),
        head=HeadConfig(logits_dtype="bf16"),
        teacher=TeacherConfig(model="teacher", payload_device="recompute"),
    )
    found = precisions_of(own, has_fp8=True)
    assert found.fp8.precision == own.precision
    assert (found.baseline.precision.fp8, found.baseline.precision.backend) == (None, "auto")
    assert found.fp8.teacher_precision.fp8 == "hybrid"
    assert not found.fp8.teacher_precision.emulate_fp8
    assert (found.other.train.bf16, found.other.head.logits_dtype) == (False, "fp32")
    assert found.baseline.teacher.payload_device == "host"

    emulated = precisions_of(replace(own, precision=replace(own.precision, emulate_fp8=True)), has_fp8=True)
    assert emulated.fp8.precision.emulate_fp8
    assert emulated.baseline.precision.backend == "local"
    delayed = replace(own, precision=PrecisionConfig(fp8="e4m3", fp8_recipe="delayed"))
    with pytest.raises(ConfigError, match="the emulation does not keep"):
        precisions_of(delayed, has_fp8=False)
    assert precisions_of(delayed, has_fp8=True).fp8.precision.fp8_recipe == "delayed"


def test_fp8_is_described():
    words = PrecisionConfig(fp8="e4m3", fp8_recipe="blockwise", first_last_layers_bf16=True)
    assert describe(words) == "e4m3, blockwise, but the first 1 and the last 1 layers, Transformer Engine"


def test_ranks_get_the_prompts_and_the_directory(monkeypatch):
    from renio_megatron.cli import launch

    calls: list[Any] = []
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(launch, "start_ranks", lambda arguments, num_ranks: calls.append((arguments, num_ranks)) or 0)
    settings = ["train.micro_batch_size=4"]
    assert main(["compare-precision", EXAMPLE, *settings, "--prompts", "8", "--output", "out", "--nproc", "4"]) == 0
    batch = "train.global_batch_size=8"
    assert calls == [(["compare-precision", EXAMPLE, *settings, batch, "--output=out"], 4)]
    assert main(["compare-precision", EXAMPLE, "--prompts", "9"]) == 2
    assert len(calls) == 1


def test_a_weighting_of_more_than_log_probabilities_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    settings = ["parallel.tensor_model_parallel_size=1", "weighting=student_entropy"]
    with pytest.raises(
        ConfigError, match=r"weighting=student_entropy needs student_entropy\. Compare with weighting=ren"
    ):
        compare_precision(EXAMPLE, settings, None)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_command_prints_a_table_and_writes_every_figure(capfd, monkeypatch, tmp_path):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    settings = ["parallel.tensor_model_parallel_size=1", "train.micro_batch_size=4", "rollout.max_completion_length=8"]
    command = ["compare-precision", EXAMPLE, *settings, "--prompts", "4", "--output", str(tmp_path)]
    assert main(command) == 0
    said = capfd.readouterr().out
    assert "verdict flips, of all tokens" in said
    assert "…" not in said, "a cell was cut off"
    found = json.loads((tmp_path / "precision.json").read_text())
    assert tuple(found["variants"]) == VARIANTS
    assert found["student"] == "hybrid, tensorwise, emulated"
    blocker = tmp_path / "file"
    blocker.write_text("")
    assert main([*command[:-1], str(blocker / "below")]) == 2
    assert "cannot be made" in capfd.readouterr().err
