"""What `renio plan` counts of teachers in layouts and dtypes of their own, and of experts: against counts by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from renio_megatron.config import (
    DataConfig,
    LoraConfig,
    ParallelConfig,
    RolloutConfig,
    TeacherConfig,
    TeacherParallelConfig,
    TrainConfig,
)
from renio_megatron.config.schema import DistillationConfig
from renio_megatron.config.teachers import ONLY
from renio_megatron.tools.plan.memory import RankMemory, plan_memory, stages_of_ranks
from renio_megatron.tools.plan.models import read_model
from renio_megatron.tools.plan.moe import forward_bytes, kept_bytes, left_bytes
from renio_megatron.tools.plan.table import plan_table
from renio_megatron.tools.plan.workload import PassShape
from tests.helpers.paths import MODELS

ROWS = 1025
"""Completion tokens of a sequence, which has as many tokens of prompt less one."""


def _config(student: str = "Qwen3-8B", teacher: str = "Qwen3-32B", **changes: Any) -> DistillationConfig:
    """8 sequences, one of a micro-batch; the student on 2 tensor ranks unless `changes` say otherwise."""
    own = {"tensor_model_parallel_size": 8}
    config = DistillationConfig(
        model=str(MODELS / student),
        teacher=TeacherConfig(
            model=str(MODELS / teacher),
            parallel=TeacherParallelConfig(**changes.pop("own", own)),
            **changes.pop("how", {}),
        ),
        data=DataConfig(max_prompt_length=ROWS - 1),
        rollout=RolloutConfig(max_completion_length=ROWS),
        parallel=ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
        train=TrainConfig(global_batch_size=8, bf16=True),
        output_dir="run",
    )
    return replace(config, **changes)


def _plan(config: DistillationConfig, world_size: int | None = None) -> list[RankMemory]:
    student = replace(read_model(config.model, "model"), lora=config.lora)
    assert config.teacher.model is not None
    teacher = read_model(config.teacher.model, "teacher.model")
    return plan_memory(config, student, {ONLY: teacher}, world_size or config.fewest_ranks)


# Qwen3-235B-A22B on one of 8 tensor ranks: 94 layers, H 4096, 64 query and 4 key-value heads of 128, 128 experts of
# 1536.
OF_235B = (
    94
    * (
        4096 * (64 * 128 + 2 * 4 * 128) // 8  # joint projection of queries, keys and values
        + 64 * 128 * 4096 // 8  # attention's output
        + 128 * 4096  # the router, whole on every rank
        + 128 * 3 * 4096 * 1536 // 8  # gate, up and down of each expert
        + 2 * 4096  # two norms
        + 2 * 128  # norms of queries and keys
    )
    + 4096
    + 2 * 151_936 * 4096 // 8
)
# Qwen3-8B on one of 8: 36 layers, H 4096, 32 query and 8 key-value heads of 128, MLP 12288.
OF_8B = (
    36 * (4096 * (32 + 8 + 8) * 128 // 8 + 32 * 128 * 4096 // 8 + 3 * 4096 * 12288 // 8 + 2 * 4096 + 2 * 128)
    + 4096
    + 2 * 151_936 * 4096 // 8
)


def test_a_hand_count_of_qwen3_235b_on_ranks_of_its_own_beside_qwen3_8b():
    config = _config(teacher="Qwen3-235B-A22B", how={"ranks": "dedicated"})
    config = replace(config, parallel=replace(config.parallel, tensor_model_parallel_size=8))
    assert config.fewest_ranks == 16
    training, scoring = _plan(config)
    assert (OF_235B, OF_8B) == (29_430_525_440, 1_024_111_616)
    tokens = 2 * ROWS - 2
    assert scoring.held == {
        "teacher's parameters": 2 * OF_235B,
        # Of each layer, a token's probabilities of 128 experts in fp32, which are chosen, and the places of 8 rows.
        "routing of the last pass": 94 * tokens // 8 * (128 * 4 + 128 + 8 * 8),
    }
    assert training.held == {
        "parameters": 2 * OF_8B,
        "gradients": 4 * OF_8B,
        "optimizer": 12 * OF_8B,
        "teacher's LM head": 2 * 151_936 // 8 * 4096,
        "gathered sequence": 2 * tokens * 4096,
    }
    assert list(scoring.phases) == ["teacher", "ordering", "exchange"]
    assert "teacher" not in training.phases


def test_a_scored_batch_waits_once_in_pieces_and_is_gathered_for_a_micro_batch():
    """One replica of each model: 8 sequences are read and trained."""
    config = _config(how={"ranks": "dedicated"})
    training, scoring = _plan(config)
    row, piece = 5120 * 2, 513  # of 1025 rows on the first of two tensor ranks
    table = 8 * ROWS // 8 * row  # each of the teacher's 8 tensor ranks keeps its eighth
    assert scoring.phases["teacher"]["hidden states"] == table
    assert scoring.phases["ordering"] == {"hidden states": table, "copy": table}
    given = -(-ROWS // 8)
    assert scoring.phases["exchange"] == {"hidden states": table, "rows on their way": given * row}
    assert training.phases["exchange"] == {"payload": 8 * piece * row, "rows on their way": 2 * piece * row}
    assert training.phases["loss"]["payload"] == (8 * piece + ROWS) * row
    assert training.phases["step"]["payload"] == 8 * piece * row


def test_copies_of_a_teacher_share_the_sequences():
    one, two = (_plan(_config(how={"ranks": "dedicated", "data_parallel_size": n}))[1] for n in (1, 2))
    assert one.phases["teacher"]["hidden states"] == 8 * ROWS // 8 * 5120 * 2
    assert two.phases["teacher"]["hidden states"] == -(-4 * ROWS // 8) * 5120 * 2
    assert one.held == two.held


def test_on_the_same_ranks_a_rank_has_both():
    (rank,) = _plan(_config())
    (alone,) = _plan(_config(own={}), 2)
    assert _config().fewest_ranks == 8
    # The student's 4 replicas have 2 sequences each, the teacher's one has all 8.
    assert rank.phases["exchange"]["hidden states"] == 8 * ROWS // 8 * 5120 * 2
    assert rank.phases["exchange"]["payload"] == 2 * 513 * 5120 * 2
    assert rank.held["teacher's LM head"] == 151_936 // 2 * 5120 * 2
    assert rank.held["parameters"] == alone.held["parameters"]
    assert 3 < alone.held["teacher's parameters"] / rank.held["teacher's parameters"] < 4.001


def test_on_the_host_only_the_micro_batch_in_use_is_on_the_device():
    training, scoring = _plan(_config(how={"ranks": "dedicated", "payload_device": "host"}))
    row = 5120 * 2
    assert scoring.phases["teacher"]["hidden states"] == 0
    assert "ordering" not in scoring.phases
    assert training.phases["exchange"] == {"payload": 0, "rows on their way": 2 * 513 * row}
    assert training.phases["loss"]["payload"] == ROWS * row
    assert training.phases["step"]["payload"] == 0


def test_an_offloaded_teacher_keeps_both_copies_of_its_head():
    (rank,) = _plan(_config(how={"offload": "host"}))
    (there,) = _plan(_config())
    heads = 151_936 * 5120 * 2 // 2, 151_936 * 5120 * 2 // 8
    assert rank.held["teacher's LM head"] == sum(heads)
    assert "teacher's parameters" not in rank.held
    assert rank.phases["teacher"]["teacher's parameters"] == there.held["teacher's parameters"] - heads[1]


@pytest.mark.parametrize(("student", "teacher"), [(None, True), (True, None), (True, False), (False, True)])
def test_a_teacher_in_its_own_dtype(student, teacher):
    """Its weights, and hidden states with it; nothing of the student's."""
    config = _config(own={}, how={"bf16": teacher}, train=TrainConfig(global_batch_size=8, bf16=bool(student)))
    (rank,) = _plan(config, 2)
    (plain,) = _plan(_config(own={}), 2)
    is_bf16 = teacher if teacher is not None else student
    times = 1 if is_bf16 else 2
    assert rank.held["teacher's parameters"] == times * plain.held["teacher's parameters"]
    assert rank.phases["step"]["payload"] == times * plain.phases["step"]["payload"]
    assert rank.held["parameters"] == (1 if student else 2) * plain.held["parameters"]


def _routed(student: str = "Qwen3-8B", *, how: dict[str, Any] | None = None, **changes: Any) -> DistillationConfig:
    """The student learns from itself as it started, from Qwen3-32B twice, and from Qwen3-1.7B."""
    routes = {
        "itself": TeacherConfig(kind="initial", template="{problem} {solution}"),
        "large": TeacherConfig(model=str(MODELS / "Qwen3-32B")),
        "again": TeacherConfig(model=str(MODELS / "Qwen3-32B"), template="{problem} {solution}"),
        "small": TeacherConfig(model=str(MODELS / "Qwen3-1.7B")),
    }
    config = _config(student, own=changes.pop("own", {}), **changes)
    teacher = replace(config.teacher, model=None, routes=routes, **(how or {}))
    return replace(config, teacher=teacher, data=replace(config.data, source="jsonl", teacher_key="who"))


def _plan_of_several(config: DistillationConfig, world_size: int, **models: str) -> list[RankMemory]:
    student = replace(read_model(config.model, "model"), lora=config.lora)
    names = {"itself": "Qwen3-8B", "large": "Qwen3-32B", "again": "Qwen3-32B", "small": "Qwen3-1.7B", **models}
    teachers = {name: read_model(str(MODELS / model), name) for name, model in names.items()}
    return plan_memory(config, student, teachers, world_size)


def test_several_teachers_are_there_together_and_read_one_after_the_other():
    (rank,) = _plan_of_several(_routed(), 2)
    alone = {name: _plan(_config(teacher=name, own={}), 2)[0] for name in ("Qwen3-32B", "Qwen3-1.7B", "Qwen3-8B")}
    held = {name: one.held["teacher's parameters"] for name, one in alone.items()}
    assert rank.held["teacher's parameters"] == sum(held.values()), "the one that is there twice is loaded once"
    assert {**rank.held, "teacher's parameters": 0} == {**alone["Qwen3-8B"].held, "teacher's parameters": 0}
    assert rank.phases == alone["Qwen3-32B"].phases, "the largest decides, whosever the sequences are"


def test_several_teachers_of_which_one_is_the_student_beside_ranks_that_only_score():
    apart = {"ranks": "dedicated"}
    config = _routed(own={"tensor_model_parallel_size": 4}, how=apart, lora=LoraConfig(r=8))
    training, scoring = _plan_of_several(config, 6)
    large, small = (
        _plan(_config(teacher=name, own={"tensor_model_parallel_size": 4}, how=apart, lora=LoraConfig(r=8)), 6)
        for name in ("Qwen3-32B", "Qwen3-1.7B")
    )
    both = large[1].held["teacher's parameters"] + small[1].held["teacher's parameters"]
    assert scoring.held == {"teacher's parameters": both}
    assert scoring.phases == large[1].phases
    heads = 151_936 // 2 * (5120 + 2048) * 2
    assert training.held["teacher's LM head"] == heads
    assert training.held["teacher's parameters"] == 0, "the student without its adapters"
    assert training.phases["exchange"] == large[0].phases["exchange"]
    assert "teacher" in training.phases, "it scores its own sequences here"
    columns = plan_table([training, scoring], None, 0).columns[1:]
    assert [str(column.header) for column in columns] == ["training", "scoring"]


def test_routers_results_of_every_model_stay():
    """Those of the student's modules once, whoever reads with them."""
    (dense,) = _plan_of_several(_routed(), 2)
    assert "routing of the last pass" not in dense.held
    (one,) = _plan_of_several(_routed(), 2, large="Qwen3-235B-A22B")
    (single,) = _plan(_config(teacher="Qwen3-235B-A22B", own={}), 2)
    assert one.held["routing of the last pass"] == single.held["routing of the last pass"]
    config = _routed("Qwen3-235B-A22B", lora=LoraConfig(r=8, targets=["q_proj"]))
    (shared,) = _plan_of_several(config, 2, itself="Qwen3-235B-A22B")
    assert shared.held["routing of the last pass"] == single.held["routing of the last pass"]


@pytest.mark.parametrize(
    ("mine", "theirs", "world", "expected"),
    [
        (2, 1, 4, [(0, 0), (1, 0)]),
        (1, 2, 4, [(0, 0), (0, 1)]),
        (2, 4, 8, [(0, 0), (0, 1), (1, 2), (1, 3)]),
        (2, 3, 6, [(0, 0), (0, 1), (1, 1), (1, 2)]),
    ],
)
def test_stages_meet_where_their_blocks_of_ranks_overlap(mine, theirs, world, expected):
    config = _config(
        parallel=ParallelConfig(pipeline_model_parallel_size=mine), own={"pipeline_model_parallel_size": theirs}
    )
    assert list(dict.fromkeys(stages_of_ranks(config, config.teachers[0], world))) == expected


def test_columns_are_named_by_what_their_ranks_hold():
    def titles(config: DistillationConfig, world_size: int | None = None) -> list[str]:
        return [str(column.header) for column in plan_table(_plan(config, world_size), None, 0).columns[1:]]

    pipeline = ParallelConfig(pipeline_model_parallel_size=2)
    apart = {"ranks": "dedicated"}
    assert titles(_config()) == ["any rank"]
    assert titles(_config(parallel=pipeline, own={})) == ["stage 0", "stage 1"]
    assert titles(_config(parallel=pipeline)) == ["stage 0", "stage 1"]
    assert titles(_config(own={"pipeline_model_parallel_size": 2})) == ["teacher's 0", "teacher's 1"]
    assert titles(_config(how=apart)) == ["training", "scoring"]
    many = {"own": {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 4}, "how": apart}
    found = titles(_config(parallel=pipeline, **many))
    assert len(found) <= 4
    assert {"training 1", "scoring 3"} <= set(found)
    both = _config(parallel=pipeline, own={"pipeline_model_parallel_size": 4})
    assert titles(both)[-1] == "stage 1\nteacher's 3"


# Of Qwen3-235B-A22B as a student on 4 tensor ranks.
ATTENTION = 94 * (4096 * (8192 + 1024) // 4 + 8192 * 4096 // 4 + 128 * 4096 + 2 * 4096 + 2 * 128) + (
    4096 + 2 * 151_936 * 4096 // 4
)
EXPERT = 3 * 4096 * 1536


@pytest.mark.parametrize(
    ("expert", "tensor", "experts", "copies"),  # of 16 ranks
    [(1, None, 128 * EXPERT // 4, 4), (8, 1, 16 * EXPERT, 2), (2, 4, 64 * EXPERT // 4, 2), (16, 1, 8 * EXPERT, 1)],
)
def test_experts_of_a_student_and_the_shares_of_its_optimisers(expert, tensor, experts, copies):
    parallel = ParallelConfig(
        tensor_model_parallel_size=4,
        sequence_parallel=True,
        expert_model_parallel_size=expert,
        expert_tensor_parallel_size=tensor,
        use_distributed_optimizer=True,
    )
    (rank,) = _plan(_config("Qwen3-235B-A22B", parallel=parallel, own={}), 16)
    assert rank.held["parameters"] == 2 * (ATTENTION + 94 * experts)
    assert rank.held["gradients"] == pytest.approx(4 * (ATTENTION + 94 * experts), rel=1e-5)
    assert rank.held["optimizer"] == 12 * (ATTENTION // 4 + 94 * experts // copies)
    assert rank.phases["step"]["temporaries"] == 4 * max(ATTENTION // 4, 94 * experts // copies)


def test_rows_of_experts():
    """A token's 8 rows; without sequence parallelism the ranks that share an expert send each token's again."""
    model = read_model(str(MODELS / "Qwen3-235B-A22B"), "model")
    whole = PassShape(2048, 2048, False, 1, 1, False, 2)
    row = 2 * (6 * 1536 + 4096) + 4
    router = 128 * 5 + 8 * 8 + 8 * 8 + 128 * 4  # norm_topk_prob is not set: a softmax over all experts
    assert kept_bytes(model, whole, is_balanced=False) == 2048 * (8 * row + router)
    assert kept_bytes(model, whole, is_balanced=True) == 2048 * (8 * row + router + 4 * 128 + 16)
    assert left_bytes(model, whole) == 2048 * (128 * 5 + 8 * 8)
    assert forward_bytes(model, whole) == 2048 * 4096 * 2 * (2 + 8 + 3 * 8)
    shared = replace(whole, tensor=4, expert_tensor=4)
    cut = replace(shared, sequence_parallel=True)
    assert forward_bytes(model, shared) == 4 * forward_bytes(model, cut)
    # Sent back in fp32: of the 4 x 8 rows of a token three in bf16 and one more, of its own 8 the sum.
    assert forward_bytes(model, shared) == 2048 * 4096 * (2 * (2 + 8) + 32 * (3 * 2 + 4) + 8 * 4)
