"""Tiny runs, every sequence as long as its recipe allows, whose bytes a plan is held against."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from renio_megatron.config import DataConfig, LoraConfig, ParallelConfig, RolloutConfig, TeacherConfig
from renio_megatron.config.schema import DistillationConfig
from tests.helpers.training_cases import layout_of, recipe
from tests.megatron.teacher_layout_cases import own

PROMPT, COMPLETION = 40, 24
LORA, SOME = LoraConfig(r=4), LoraConfig(r=2, targets=["v_proj", "gate_proj"])


def cases(folder: Path) -> dict[str, DistillationConfig]:
    """Runs on two ranks of dense models in one layout."""
    base = recipe(folder)
    train = replace(base.train, global_batch_size=8, micro_batch_size=2)
    single = replace(train, micro_batch_size=1)
    full = replace(train, recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    pipeline, deep = layout_of(1, 2), str(folder / "deep")
    data = DataConfig(seed=5, max_prompt_length=PROMPT)
    own_teacher = {
        "teacher": TeacherConfig(kind="initial"),
        "data": replace(data, teacher_template="{solution}"),
    }
    settings: dict[str, dict[str, Any]] = {
        "DP2": {},
        "DP2, distributed optimiser, bf16": {
            "parallel": ParallelConfig(use_distributed_optimizer=True),
            "train": replace(train, bf16=True),
        },
        "DP2, packed": {"train": replace(single, max_tokens_per_micro_batch=130)},
        "TP2": {"parallel": layout_of(2), "model": str(folder / "tied")},
        "TP2, computed again": {"parallel": layout_of(2), "train": full},
        "TP2 + SP": {"parallel": layout_of(2, sp=True)},
        "CP2": {"parallel": ParallelConfig(context_parallel_size=2)},
        "CP2, selective": {
            "parallel": ParallelConfig(context_parallel_size=2),
            "train": replace(train, recompute_granularity="selective"),
        },
        "PP2, tied": {"parallel": pipeline, "model": str(folder / "deep_tied"), "train": single},
        "PP2, bf16": {"parallel": pipeline, "model": deep, "train": replace(single, bf16=True)},
        "PP2 x VPP2": {
            "parallel": replace(pipeline, virtual_pipeline_model_parallel_size=2),
            "model": deep,
            "train": single,
        },
        "DP2, adapters": {"lora": LORA},
        "DP2, distributed optimiser, bf16, adapters of some targets": {
            "parallel": ParallelConfig(use_distributed_optimizer=True),
            "train": replace(train, bf16=True),
            "lora": SOME,
        },
        "TP2 + SP, adapters, own teacher": {"parallel": layout_of(2, sp=True), "lora": LORA, **own_teacher},
        "TP2 + SP, adapters with dropout": {"parallel": layout_of(2, sp=True), "lora": replace(LORA, dropout=0.1)},
        "TP2, computed again, adapters": {"parallel": layout_of(2), "train": full, "lora": LORA},
        "CP2, adapters of some targets": {"parallel": ParallelConfig(context_parallel_size=2), "lora": SOME},
        "PP2, tied, adapters, own teacher": {
            "parallel": pipeline,
            "model": str(folder / "deep_tied"),
            "train": single,
            "lora": LORA,
            **own_teacher,
        },
    }
    return _recipes(folder, settings)


def own_cases(folder: Path) -> dict[str, DistillationConfig]:
    """Runs on two ranks whose teacher has a layout or a dtype of its own."""
    base = recipe(folder).train
    packed = replace(base, max_tokens_per_micro_batch=130, micro_batch_size=1)
    return _recipes(
        folder,
        {
            "TP2, teacher PP2": {"parallel": layout_of(2), "teacher": own(folder, 1, 2)},
            "TP2 + SP, teacher DP2": {"parallel": layout_of(2, sp=True), "teacher": own(folder, 1)},
            "PP2, teacher TP2 + SP": {"parallel": layout_of(1, 2), "teacher": own(folder, 2, sp=True)},
            "PP2, teacher DP2 in bf16": {"parallel": layout_of(1, 2), "teacher": own(folder, 1, bf16=True)},
            "CP2, teacher PP2": {
                "parallel": ParallelConfig(context_parallel_size=2),
                "teacher": own(folder, 1, 2),
            },
            "DP2 packed, teacher TP2": {"teacher": own(folder, 2), "train": packed},
            "DP2, teacher TP2 with experts": {
                "teacher": replace(own(folder, 2), model=str(folder / "qwen")),
            },
            "DP2, teacher in bf16": {"teacher": TeacherConfig(model=str(folder / "teacher"), bf16=True)},
            "TP2 + SP in bf16, teacher in fp32": {
                "parallel": layout_of(2, sp=True),
                "train": replace(base, bf16=True),
                "teacher": TeacherConfig(model=str(folder / "teacher"), bf16=False),
            },
        },
    )


def expert_cases(folder: Path) -> dict[str, DistillationConfig]:
    """Runs on two ranks whose student or teacher has experts."""
    train = replace(recipe(folder).train, micro_batch_size=2)
    single = replace(train, micro_batch_size=1)
    full = replace(single, recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    tp, qwen = layout_of(2, sp=True), {"model": str(folder / "qwen")}
    settings: dict[str, dict[str, Any]] = {
        "experts, DP2": {},
        "experts, DP2, balanced": {"train": replace(train, moe_aux_loss_coeff=0.1)},
        "experts, EP2": {"parallel": ParallelConfig(expert_model_parallel_size=2)},
        "experts, EP2, distributed optimiser, bf16": {
            "parallel": ParallelConfig(expert_model_parallel_size=2, use_distributed_optimizer=True),
            "train": replace(train, bf16=True, moe_aux_loss_coeff=0.1),
        },
        "experts, EP2, not normalised": {
            "parallel": ParallelConfig(expert_model_parallel_size=2),
            "model": str(folder / "qwen, not normalised"),
        },
        "experts, TP2 + SP": {"parallel": tp},
        "experts, TP2 + SP, whole, distributed optimiser": {
            "parallel": replace(tp, expert_tensor_parallel_size=1, use_distributed_optimizer=True)
        },
        "experts, TP2 + SP x EP2": {
            "parallel": replace(tp, expert_tensor_parallel_size=1, expert_model_parallel_size=2)
        },
        "experts, expert TP2 on data ranks": {"parallel": ParallelConfig(expert_tensor_parallel_size=2)},
        "experts, PP2, computed again": {"parallel": layout_of(1, 2), "train": full},
        "experts, DP2, adapters on attention": {
            "lora": LoraConfig(r=4, targets=["q_proj", "k_proj", "v_proj", "o_proj"]),
            "train": train,
        },
    }
    both = {"parallel": ParallelConfig(expert_model_parallel_size=2)}
    teachers = {
        "EP2, dense student": {**both, "teacher": TeacherConfig(model=str(folder / "qwen"))},
        "TP2, dense student, teacher with experts": {
            "parallel": layout_of(2),
            "teacher": TeacherConfig(model=str(folder / "mixtral")),
        },
    }
    return _recipes(folder, {name: {**qwen, **more} for name, more in settings.items()} | teachers)


def dedicated_cases(folder: Path) -> dict[str, DistillationConfig]:
    """Runs on four ranks, of which the last two only score."""
    alone = {"ranks": "dedicated"}
    return _recipes(
        folder,
        {
            "TP2, teacher PP2 of its own": {"parallel": layout_of(2), "teacher": own(folder, 1, 2, **alone)},
            "PP2, teacher TP2 + SP of its own": {
                "parallel": layout_of(1, 2),
                "teacher": own(folder, 2, sp=True, **alone),
            },
            "DP2, two copies of the teacher in bf16": {
                "teacher": own(folder, 1, **alone, data_parallel_size=2, bf16=True)
            },
            "EP2, teacher TP2 with experts of its own": {
                "parallel": ParallelConfig(expert_model_parallel_size=2),
                "model": str(folder / "qwen"),
                "teacher": replace(own(folder, 2, **alone), model=str(folder / "mixtral")),
            },
        },
    )


def _recipes(folder: Path, settings: dict[str, dict[str, Any]]) -> dict[str, DistillationConfig]:
    """Every sequence is as long as these recipes allow."""
    rollout = RolloutConfig(temperature=1.1, max_completion_length=COMPLETION)
    common: dict[str, Any] = {
        "data": DataConfig(seed=5, max_prompt_length=PROMPT),
        "rollout": rollout,
        "train": replace(recipe(folder).train, global_batch_size=8, micro_batch_size=2),
    }
    return {name: recipe(folder, **{**common, **more}) for name, more in settings.items()}
