"""What `renio plan` counts: against counts by hand, and against bytes that a real step allocates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from renio_megatron.config import (
    DataConfig,
    LoraConfig,
    ParallelConfig,
    PrecisionConfig,
    RolloutConfig,
    TeacherConfig,
    TeacherPrecisionConfig,
    TrainConfig,
    WeightingConfig,
)
from renio_megatron.config.schema import DistillationConfig
from renio_megatron.config.teachers import ONLY
from renio_megatron.losses.chunk_size import loss_buffer_bytes
from renio_megatron.losses.linear_distillation import buffer_bytes
from renio_megatron.tools.plan.activations import chunk_bytes, layer_bytes
from renio_megatron.tools.plan.memory import RankMemory, plan_memory
from renio_megatron.tools.plan.models import read_model
from renio_megatron.tools.plan.parts import PlannedPart
from renio_megatron.tools.plan.workload import PassShape, workload
from tests.fakes.strategies import HardestWeighting
from tests.helpers.multiprocess import Ranks
from tests.helpers.paths import MODELS
from tests.megatron.moe_cases import save_mixtures
from tests.tools.plan_cases import cases, dedicated_cases, expert_cases, own_cases
from tests.tools.plan_measures import measure, measure_dedicated


def _config(student: str = "Qwen3-32B", teacher: str = "Qwen3-32B", **changes: Any) -> DistillationConfig:
    config = DistillationConfig(
        model=str(MODELS / student),
        teacher=TeacherConfig(model=str(MODELS / teacher)),
        data=DataConfig(max_prompt_length=1024),
        rollout=RolloutConfig(max_completion_length=1025),
        parallel=ParallelConfig(tensor_model_parallel_size=8, sequence_parallel=True),
        train=TrainConfig(global_batch_size=4, bf16=True),
        output_dir="run",
    )
    return replace(config, **changes)


def _plan(config: DistillationConfig, world_size: int, **how: Any) -> list[RankMemory]:
    student = replace(read_model(config.model, "model"), lora=config.lora)
    teacher = read_model(config.teacher.model or config.model, "teacher.model")
    return plan_memory(config, student, {ONLY: teacher}, world_size, **how)


@pytest.mark.parametrize(
    ("name", "billions"),  # as the models' cards give them
    [("Qwen3-1.7B", 1.7), ("Qwen3-8B", 8.2), ("Qwen3-32B", 32.8), ("Qwen3-235B-A22B", 235.0)],
)
def test_parameters_are_those_of_the_models_cards(name, billions):
    part = PlannedPart(read_model(str(MODELS / name), "model"), ParallelConfig(), 151_936, 151_936, 2, 1, 0)
    assert part.tensors().count / 1e9 == pytest.approx(billions, rel=0.013)


# Qwen3-32B on one of 8 tensor-parallel ranks: 64 layers, H 5120, 64 query and 8 key-value heads of 128, MLP 25600.
LAYER = (
    5120 * (8192 + 1024 + 1024) // 8  # joint projection of queries, keys and values
    + 8192 * 5120 // 8  # attention's output
    + 5120 * 25600 // 8 * 3  # gate, up, down
    + 5120 * 2  # two norms, whole on every rank
    + 128 * 2  # norms of queries and keys
)
PARAMETERS = 64 * LAYER + 5120 + 2 * 151_936 * 5120 // 8
TOKENS = 2048


def test_a_hand_count_of_qwen3_32b_at_tp_8():
    (rank,) = _plan(_config(), 8)
    assert PARAMETERS == 4_095_857_664
    assert rank.held == {
        "parameters": 2 * PARAMETERS,
        "gradients": 4 * PARAMETERS,
        "optimizer": 12 * PARAMETERS,  # fp32 main parameters and two moments
        "teacher's parameters": 2 * PARAMETERS,
        "gathered sequence": TOKENS * 5120 * 2,
    }
    # Bytes a token and layer: norms' inputs and outputs (shared by 8), the joint projection, rotated queries and keys,
    # the attention's output, cosines and sines, the MLP's five tensors, and a little of fp32: scales and sums.
    little = 2 * 4 / 8 + 4 * (8 + 1) + 4 * 8
    token = 2 * (4 * 5120 / 8 + 1280 + 1152 + 1024 + 4 * 128 + 5 * 3200) + little
    assert rank.phases["loss"]["activations"] == pytest.approx(64 * TOKENS * token, rel=0.01)
    assert rank.phases["loss"]["buffers"] == 1025 * (151_936 // 8) * (4 + 4 + 2)
    assert rank.phases["loss"]["results"] == 1025 * 5120 * 2 + 151_936 // 8 * 5120 * 4
    assert rank.phases["loss"]["payload"] == 4 * 1025 * 5120 * 2
    assert rank.phases["sampling"]["key-value cache"] == 64 * 2 * 4 * 2049 * 128 * 2
    assert rank.peak == sum(rank.held.values()) + max(sum(phase.values()) for phase in rank.phases.values())


LINEAR = 64 * (LAYER - 5120 * 2 - 128 * 2)  # what is multiplied in FP8


@pytest.mark.parametrize(
    ("student", "teacher", "copies", "saved"),
    [
        ({}, {}, None, 0),
        ({"emulate_fp8": True}, {"emulate_fp8": True}, None, 0),
        ({}, {"fp8_recipe": "tensorwise"}, None, LINEAR),
        ({"fp8_recipe": "blockwise"}, {}, 2 * LINEAR, 0),
        ({"fp8_param_gather": True}, {"fp8_recipe": "mxfp8"}, None, LINEAR - LINEAR // 32),
        (
            {"first_last_layers_bf16": True, "num_layers_at_end_in_bf16": 3},
            {"first_last_layers_bf16": True},
            2 * LINEAR // 64 * 60,
            LINEAR // 64 * 62,
        ),
    ],
)
def test_fp8_of_qwen3_32b_at_tp_8(student, teacher, copies, saved):
    """A student's weights are there in FP8, too, also transposed; a teacher's in FP8 alone."""
    config = _config(
        precision=PrecisionConfig(fp8="hybrid" if student else None, **student),
        teacher_precision=TeacherPrecisionConfig(fp8="hybrid" if teacher else None, **teacher),
    )
    (rank,) = _plan(config, 8)
    assert rank.held.get("parameters in FP8") == copies
    assert rank.held["teacher's parameters"] == 2 * PARAMETERS - saved


def test_the_first_and_last_layers_stay_out_of_fp8_where_they_are():
    parallel = ParallelConfig(pipeline_model_parallel_size=4)
    precision = PrecisionConfig(fp8="hybrid", first_last_layers_bf16=True, num_layers_at_end_in_bf16=2)
    first, second, third, last = _plan(_config("Qwen3-1.7B", parallel=parallel, precision=precision), 4)
    layer = 2 * 2048 * ((16 + 8 + 8) * 128 + 16 * 128 + 3 * 6144)
    copies = [rank.held["parameters in FP8"] for rank in (first, second, third, last)]
    assert copies == [6 * layer, 7 * layer, 7 * layer, 5 * layer]


# Of Qwen3-32B's layers on one of 8 ranks, with adapters of rank 16: A is cut beside o and down, B beside the others.
ADAPTERS = 64 * 16 * ((5120 + 8192 // 8) + 2 * (5120 + 1024 // 8) + (8192 // 8 + 5120) + 3 * (5120 + 25600 // 8))


@pytest.mark.parametrize("kind", ["separate", "initial"])
def test_adapters_of_qwen3_32b_at_tp_8(kind):
    """Gradients and the optimiser's state are the adapters'; a student that is its own teacher is there once."""
    own = {"model": str(MODELS / "Qwen3-32B")} if kind == "separate" else {}
    config = replace(_config(lora=LoraConfig(r=16)), teacher=TeacherConfig(kind=kind, **own))
    (rank,), (whole,) = _plan(config, 8), _plan(_config(), 8)
    assert ADAPTERS == 48_889_856
    assert rank.held == {
        "parameters": 2 * (PARAMETERS + ADAPTERS),
        "gradients": 4 * ADAPTERS,
        "optimizer": 12 * ADAPTERS,
        "teacher's parameters": 2 * PARAMETERS if kind == "separate" else 0,
    }
    low = (
        64 * TOKENS * 2 * 16 * (5 + 2 / 8)
    )  # A x of q, k, v, gate, up at all positions, of o and down at a rank's share
    joint = 64 * 2 * 16 * (5 * 5120 + (8192 + 25600) // 8)
    first = TOKENS * (5120 // 8 * 2 + 4 // 8)  # the first norm's input, of which nothing is trained
    kept = rank.phases["backward"]["activations"] - whole.phases["backward"]["activations"]
    assert kept == pytest.approx(low + joint - first, rel=0.01)
    assert rank.phases["loss"]["results"] == 1025 * 5120 * 2  # the head has no gradient
    assert rank.phases["step"]["temporaries"] == 4 * ADAPTERS


def test_products_keep_their_input_for_adapters_alone():
    """Of Qwen3-1.7B's layer with an adapter beside v alone: no input of the MLP's products."""
    model, shape = read_model(str(MODELS / "Qwen3-1.7B"), "model"), PassShape(2048, 2048, False, 8, 1, False, 2)
    some, every = (replace(model, lora=LoraConfig(r=8, targets=names)) for names in (["v_proj"], None))
    low = 2 * 8 * ((2048 + 2048) * 5 + 2048 * 2 + (2048 + 6144) // 8)
    assert layer_bytes(every, shape) == layer_bytes(model, shape) + low
    missing = 2 * 2048 * (2048 + 6144 // 8)  # inputs of gate and up, and of down; o's is attention's own output
    low = 2 * 8 * (2048 + 2048)
    assert layer_bytes(some, shape) == layer_bytes(model, shape) - missing + low


def test_the_distributed_optimiser_divides_over_data_and_context_ranks():
    parallel = ParallelConfig(tensor_model_parallel_size=4, context_parallel_size=2, use_distributed_optimizer=True)
    (rank,) = _plan(_config("Qwen3-1.7B", parallel=parallel), 16)
    assert rank.held["optimizer"] == pytest.approx(6 * rank.held["parameters"] / 4, rel=1e-6)
    assert rank.held["gradients"] == pytest.approx(2 * rank.held["parameters"], rel=1e-3)


def test_a_tied_head_is_a_copy_on_the_last_stage():
    config = _config("Qwen3-1.7B", parallel=ParallelConfig(pipeline_model_parallel_size=2))
    first, last = _plan(config, 2)
    assert last.held["parameters"] - first.held["parameters"] == 2 * 2048  # the norm after the last layer
    (alone,) = _plan(_config("Qwen3-1.7B", parallel=ParallelConfig()), 1)
    copy = 2 * 151_936 * 2048
    assert first.held["parameters"] + last.held["parameters"] == alone.held["parameters"] + copy


def test_a_pipeline_keeps_as_many_micro_batches_as_megatron_has_on_their_way():
    config = _config("Qwen3-1.7B", parallel=ParallelConfig(pipeline_model_parallel_size=4))
    kept = [rank.phases["backward"]["activations"] for rank in _plan(config, 4)]
    assert [round(value / kept[3], 1) for value in kept] == [4.0, 3.0, 2.0, 1.0]
    payload = [rank.phases["step"]["payload"] for rank in _plan(config, 4)]
    assert payload == [0, 0, 0, 4 * 1025 * 5120 * 2]


@pytest.mark.parametrize(("kind", "loss", "step"), [("device", 4, 4), ("host", 1, 0), ("recompute", 1, 0)])
def test_the_payload_waits_where_the_recipe_says(kind, loss, step):
    teacher = TeacherConfig(model=str(MODELS / "Qwen3-32B"), payload_device=kind)
    (rank,) = _plan(replace(_config(), teacher=teacher), 8)
    each = 1025 * 5120 * 2
    assert rank.phases["step"]["payload"] == step * each
    assert rank.phases["loss"]["payload"] >= loss * each
    assert (rank.phases["loss"]["payload"] > loss * each) == (kind == "recompute")


def test_a_weighting_that_looks_at_logits_reads_once_more():
    def scores(weighting=None, **rollout):
        config = replace(_config(), weighting=weighting or WeightingConfig())
        (rank,) = _plan(replace(config, rollout=replace(config.rollout, **rollout)), 8)
        return rank.phases.get("scores")

    assert scores() is scores(WeightingConfig(name="length")) is None
    one = scores(student_scores="recompute")
    assert scores(WeightingConfig(name="student_entropy")) == one
    both = scores(HardestWeighting())
    assert (one["logits"], both["logits"]) == (1025 * 151_936 // 8 * 4, 2 * 1025 * 151_936 // 8 * 4)
    assert both["payload"] >= one["payload"]


def test_teachers_that_are_the_student_or_wait_on_the_host():
    whole = {"kind": "separate", "model": str(MODELS / "Qwen3-32B")}
    kinds = {
        "separate": whole,
        "host": {**whole, "offload": "host"},
        "ema": {"kind": "ema"},
        "current": {"kind": "current"},
    }
    plans = {name: _plan(replace(_config(), teacher=TeacherConfig(**more)), 8)[0] for name, more in kinds.items()}
    entries, head = plans["separate"].held["parameters"] // 2, 151_936 // 8 * 5120
    held = {name: {key: value for key, value in plan.held.items() if "teacher" in key} for name, plan in plans.items()}
    assert held == {
        "separate": {"teacher's parameters": 2 * entries},
        "host": {"teacher's LM head": 2 * head},
        "ema": {"teacher's average": 4 * entries + 2 * head},
        "current": {},
    }
    moved = {name: sum(plan.phases["teacher"].values()) for name, plan in plans.items()}
    least = moved["current"]
    extra = {name: value - least for name, value in moved.items()}
    assert extra == {"separate": 0, "host": 2 * (entries - head), "ema": 2 * entries, "current": 0}


def test_recomputation_and_sequence_parallelism_take_away():
    model = read_model(str(MODELS / "Qwen3-1.7B"), "model")
    shape = PassShape(2048, 2048, False, 8, 1, False, 2)
    shared = replace(shape, sequence_parallel=True)
    assert layer_bytes(model, shape) - layer_bytes(model, shared) == 7 * 2048 * (4 * 2048 * 2 + 2 * 4) // 8
    full = TrainConfig(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=4)
    kept, again = chunk_bytes(model, shape, full, 28)
    assert kept == 7 * 2048 * 2048 * 2 + 4 * 2048 * 128
    assert again == 4 * layer_bytes(model, shape) - 2048 * 2048 * 2


def test_packed_rows_and_evaluation_bound_the_passes():
    train = TrainConfig(global_batch_size=64, bf16=True, max_tokens_per_micro_batch=10_000)
    config = _config("Qwen3-1.7B", train=train, rollout=RolloutConfig(max_completion_length=512, micro_batch_size=3))
    work = workload(config, config.teachers[0], 16)
    assert (work.student.shape.tokens, work.student.rows, work.sampled) == (10_000, 10_000, 3)
    evaluated = replace(config, evaluate=replace(config.evaluate, every=1, samples=2, max_completion_length=4096))
    (before,), (after,) = _plan(config, 16), _plan(evaluated, 16)
    assert before.phases["sampling"]["key-value cache"] == 28 * 2 * 3 * (1024 + 512) * 128 * 2
    assert after.phases["sampling"]["key-value cache"] == 28 * 2 * 1 * (1024 + 4096) * 128 * 2


def test_the_loss_counts_its_buffers_in_the_same_way():
    for logits, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        for chunk in (None, 300):
            assert buffer_bytes(9000, 151_936, torch.bfloat16, logits, chunk) == loss_buffer_bytes(
                9000, 151_936, 2, size, chunk
            )


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_mixtures(folder)
    return folder


TOLERANCE = 0.1
TO_THE_BYTE = ("parameters", "teacher's parameters", "teacher's LM head", "gathered sequence")


def _bytes_by_name(rank: RankMemory) -> dict[str, int]:
    """What a plan says of one rank, by the names under which it was measured."""
    backward = rank.phases.get("backward", {"activations": 0})
    loss = rank.phases.get("loss", backward)
    recomputing = backward["activations"] + backward.get("layers again", 0)
    return {
        **rank.held,
        "key-value cache": rank.phases.get("sampling", {}).get("key-value cache", 0),
        "activations": max(recomputing, loss["activations"]),
        "payload": rank.phases.get("step", {}).get("payload", 0),
        "payload in use": loss.get("payload", 0),
        "hidden states": rank.phases.get("exchange", {}).get("hidden states", 0),
    }


def _assert_as_planned(config: DistillationConfig, found: list[dict[str, Any]]) -> None:
    """Every number of every rank. Where context ranks have unequal shares, the plan is of the larger one."""
    plans = {(rank.student_stage, rank.teacher_stage): rank for rank in _plan(config, len(found), fused_norm=False)}
    assert plans.keys() == {one["stages"] for one in found}
    largest = {name: max(one.get(name, 0) for one in found) for name in ("payload", "payload in use")}
    for number, one in enumerate(found):
        planned, real = _bytes_by_name(plans[one["stages"]]), {k: v for k, v in one.items() if k != "stages"}
        if config.parallel.context_parallel_size > 1:
            real |= largest
        for name in planned.keys() | real.keys():
            assert planned.get(name, 0) == pytest.approx(real.get(name, 0), rel=TOLERANCE), f"rank {number}: {name}"
        for name in TO_THE_BYTE:
            assert planned.get(name, 0) == real.get(name, 0), f"rank {number}: {name}"


@pytest.mark.matrix(7)
@pytest.mark.parametrize("name", list(cases(Path())))
def test_a_real_step_allocates_what_was_planned(name: str, models: Path, two_ranks: Ranks) -> None:
    _assert_as_planned(cases(models)[name], two_ranks(measure, name, models))


@pytest.mark.matrix(7)
@pytest.mark.parametrize("name", list(own_cases(Path())))
def test_so_does_one_beside_a_teacher_in_a_layout_or_dtype_of_its_own(
    name: str, models: Path, two_ranks: Ranks
) -> None:
    found = two_ranks(measure, name, models)
    assert all(one["teacher's parameters"] for one in found)
    _assert_as_planned(own_cases(models)[name], found)


@pytest.mark.matrix(7)
@pytest.mark.parametrize("name", list(expert_cases(Path())))
def test_so_does_one_of_models_with_experts(name: str, models: Path, two_ranks: Ranks) -> None:
    found = two_ranks(measure, name, models)
    assert all(one["routing of the last pass"] for one in found)
    _assert_as_planned(expert_cases(models)[name], found)


@pytest.mark.matrix(3)
@pytest.mark.parametrize("name", list(dedicated_cases(Path())))
def test_so_do_ranks_that_train_and_ranks_that_only_score(name: str, models: Path, four_ranks: Ranks) -> None:
    found = four_ranks(measure_dedicated, name, models)
    assert [one["stages"][0] is None for one in found] == [False, False, True, True]
    _assert_as_planned(dedicated_cases(models)[name], found)
