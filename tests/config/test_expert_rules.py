"""What models with experts ask of a recipe, a world, a model's description and a plan; the loss by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from renio_megatron.config.load import check_models, check_world, load_recipe
from renio_megatron.config.resume import is_changeable
from renio_megatron.data.batching.collate import BatchLayout, collate
from renio_megatron.errors import ConfigError
from renio_megatron.models.architecture import Architecture, Experts
from renio_megatron.models.families import FAMILIES
from renio_megatron.models.hf_weights import hf_shapes
from renio_megatron.objective.load_balance import load_balancing_loss
from renio_megatron.training.metrics.registry import METRICS
from renio_megatron.types import Prompt, Rollout

DENSE = {"model_type": "qwen3", "num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 4}
DENSE |= {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 11}
QWEN = DENSE | {"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
QWEN |= {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
MIXTRAL = DENSE | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
TP, EP, ETP = (f"parallel.{name}_parallel_size" for name in ("tensor_model", "expert_model", "expert_tensor"))


@pytest.fixture
def config(tmp_path: Path) -> Any:
    """(student's config.json, teacher's, settings) -> the recipe's settings; fine-tuning without a teacher."""

    def load(student: dict[str, Any], teacher: dict[str, Any] | None, *overrides: str) -> Any:
        for name, values in (("student", student), ("teacher", teacher or {})):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "config.json").write_text(json.dumps(values))
        text = f"model: {tmp_path / 'student'}\noutput_dir: runs/a\n"
        text += "" if teacher is None else f"teacher: {{model: {tmp_path / 'teacher'}}}\n"
        (tmp_path / "recipe.yaml").write_text(text)
        return load_recipe("sft" if teacher is None else "train", tmp_path / "recipe.yaml", overrides).config

    return load


ACCEPTED = [
    (QWEN, DENSE, [f"{EP}=4", "train.moe_aux_loss_coeff=0.001"]),
    (QWEN, MIXTRAL, [f"{EP}=4"]),
    (DENSE, QWEN, [f"{EP}=2", f"{TP}=2"]),  # a teacher alone needs no sequence parallelism
    (MIXTRAL, None, [f"{EP}=2", f"{TP}=2", f"{ETP}=1", "parallel.sequence_parallel=true"]),
    (QWEN, None, ["init=random"]),
    (QWEN, DENSE, ["lora.r=4", "lora.targets=[q_proj,o_proj]"]),
]


@pytest.mark.parametrize(("student", "teacher", "overrides"), ACCEPTED)
def test_models_that_fit_are_accepted(config, student, teacher, overrides):
    check_models(config(student, teacher, *overrides))


@pytest.mark.parametrize(
    ("student", "teacher", "overrides", "words"),
    [
        (DENSE, DENSE, [f"{EP}=2"], ["expert_model_parallel_size=2 would be ignored", "no model of this run"]),
        (DENSE, DENSE, [f"{ETP}=1"], ["expert_tensor_parallel_size=1 would be ignored"]),
        (DENSE, QWEN, ["train.moe_aux_loss_coeff=0.1"], ["moe_aux_loss_coeff=0.1 would be ignored", "student"]),
        (QWEN, DENSE, [f"{EP}=3"], ["model: ", "expert_model_parallel_size=3", "8 experts"]),
        (DENSE, MIXTRAL, [f"{EP}=8"], ["teacher.model: ", "expert_model_parallel_size=8", "4 experts"]),
        (QWEN, DENSE, [f"{ETP}=5"], ["expert_tensor_parallel_size=5", "24 columns"]),
        (QWEN, DENSE, [f"{TP}=2"], [f"{TP}=2", "Set parallel.sequence_parallel=true"]),
        (QWEN, DENSE, ["precision.backend=te"], ["precision.backend=te", "model, which has experts", "backend=local"]),
        (DENSE, QWEN, ["teacher_precision.backend=te"], ["teacher_precision.backend=te", "teacher.model"]),
        (QWEN, DENSE, ["precision.fp8=e4m3", "precision.emulate_fp8=true"], ["precision.fp8=e4m3", "fp8=null"]),
        (QWEN, DENSE, ["lora.r=4"], ["gate_proj, up_proj, down_proj", "lora.targets=[q_proj,k_proj,v_proj,o_proj]"]),
        (QWEN, None, ["init=random", f"{EP}=2"], ["init=random", "the same weights"]),
    ],
)
def test_models_that_do_not_fit_are_refused(config, student, teacher, overrides, words):
    with pytest.raises(ConfigError) as caught:
        check_models(config(student, teacher, *overrides))
    for word in words:
        assert word in str(caught.value)


PACKED = ("train.max_tokens_per_micro_batch=100", "data.max_prompt_length=20", "rollout.max_completion_length=20")


@pytest.mark.parametrize(
    ("overrides", "world", "words"),
    [
        ([f"{EP}=4"], 2, ["expert_model_parallel_size=4 times", "2 ranks of a pipeline stage", "data 2"]),
        ([f"{EP}=2", "parallel.pipeline_model_parallel_size=2"], 2, ["1 ranks of a pipeline stage"]),
        ([f"{ETP}=3"], 4, ["expert_tensor_parallel_size=3"]),
        ([f"{EP}=2", *PACKED], 2, ["train.max_tokens_per_micro_batch=100", "micro-batches", "null"]),
    ],
)
def test_worlds_that_cannot_share_experts_are_refused(config, overrides, world, words):
    with pytest.raises(ConfigError) as caught:
        check_world(config(QWEN, DENSE, "train.global_batch_size=8", *overrides), world)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "world"),
    [
        ([f"{EP}=2"], 4),
        ([f"{EP}=2", "parallel.context_parallel_size=2", *PACKED], 2),
        ([f"{EP}=2", f"{ETP}=1", f"{TP}=2", "parallel.sequence_parallel=true", *PACKED], 4),
    ],
)
def test_worlds_that_can_share_experts_are_accepted(config, overrides, world):
    check_world(config(QWEN, DENSE, "train.global_batch_size=8", *overrides), world)


def test_the_ranges_of_the_settings(config):
    assert config(QWEN, DENSE).train.moe_aux_loss_coeff == 0.0
    for setting, words in ((f"{EP}=0", "above 0"), ("train.moe_aux_loss_coeff=-1", "at least 0")):
        with pytest.raises(ConfigError, match=words):
            config(QWEN, DENSE, setting)
    assert is_changeable(EP) and is_changeable(ETP) and not is_changeable("train.moe_aux_loss_coeff")


def test_a_description_is_read_by_either_of_its_names(tmp_path):
    def experts(values: dict[str, Any]) -> Experts | None:
        return Architecture.from_values(tmp_path, values).experts

    assert experts(QWEN) == Experts(8, 2, 24, normalized=True)
    renamed = {("num_local_experts" if key == "num_experts" else key): value for key, value in QWEN.items()}
    assert experts(renamed) == experts(QWEN)
    assert experts(QWEN | {"norm_topk_prob": False}) == Experts(8, 2, 24, normalized=False)
    assert experts(MIXTRAL) == Experts(4, 2, 48, normalized=True)
    assert experts(DENSE) is None
    assert Architecture.from_values(tmp_path, QWEN).ffn_hidden_size == 24


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (QWEN | {"mlp_only_layers": [1]}, r"mlp_only_layers=\[1\] is not supported"),
        (QWEN | {"decoder_sparse_step": 2}, "decoder_sparse_step=2 is not supported"),
        (MIXTRAL | {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1 is not supported"),
        (MIXTRAL | {"sliding_window": 4096}, "sliding_window=4096 is not supported"),
        (QWEN | {"num_experts_per_tok": 9}, "num_experts_per_tok=9 of 8 experts"),
        (QWEN | {"num_experts_per_tok": 1}, "no gradient reaches the router"),
        (QWEN | {"num_experts": 0}, r"needs num_experts \(or num_local"),
    ],
)
def test_descriptions_of_other_mixtures_are_refused(tmp_path, values, message):
    with pytest.raises(ConfigError, match=message):
        Architecture.from_values(tmp_path, values)


def test_the_files_names_are_the_published_models(tmp_path):
    shapes = hf_shapes(Architecture.from_values(tmp_path, QWEN))
    assert shapes["model.layers.3.mlp.experts.7.gate_proj.weight"] == (24, 32)
    assert shapes["model.layers.0.mlp.experts.0.down_proj.weight"] == (32, 24)
    assert shapes["model.layers.1.mlp.gate.weight"] == (8, 32)
    assert "model.layers.0.mlp.gate_proj.weight" not in shapes
    shapes = hf_shapes(Architecture.from_values(tmp_path, MIXTRAL))
    assert shapes["model.layers.3.block_sparse_moe.experts.3.w2.weight"] == (32, 48)
    assert shapes["model.layers.3.block_sparse_moe.experts.3.w1.weight"] == (48, 32)
    assert shapes["model.layers.0.block_sparse_moe.gate.weight"] == (4, 32)
    assert [name for name, family in FAMILIES.items() if family.experts is not None] == ["qwen3_moe", "mixtral"]


def test_the_loss_of_an_even_and_of_a_certain_router():
    even = load_balancing_loss(torch.full((1, 4), 2.0), torch.full((1, 4), 4.0), top_k=2)
    certain = load_balancing_loss(torch.tensor([[4.0, 4.0, 0.0, 0.0]]), torch.tensor([[8.0, 8.0, 0.0, 0.0]]), top_k=2)
    assert even.tolist() == [1.0]
    assert certain.tolist() == [2.0]  # experts / top_k


def test_the_losses_of_pieces_add_up():
    probability, counts = torch.rand(2, 3, 4), torch.randint(1, 5, (3, 4)).float()
    pieces = [load_balancing_loss(piece, counts, 2) for piece in probability]
    torch.testing.assert_close(sum(pieces), load_balancing_loss(probability.sum(0), counts, 2))


@pytest.mark.parametrize("max_tokens", [None, 8])
def test_every_token_that_is_read_knows_its_sequence(max_tokens):
    rollouts = [Rollout(Prompt(i, (1,) * length, (1,) * length), (2, 3)) for i, length in enumerate((2, 4))]
    (batch,) = collate(rollouts, audience="student", batch_layout=BatchLayout(9, 2, max_tokens, sp_size=2))
    expected = [[0] * 3 + [1] * 5] if max_tokens else [[0] * 3 + [-1] * 3, [1] * 5 + [-1]]
    assert batch.sequence_of.tolist() == expected
    assert ((batch.token_ids == 9) == (batch.sequence_of == -1)).all()


def test_metrics_of_routers_have_units():
    assert {name: METRICS[name].unit for name in METRICS if name.startswith("moe/")} == {
        "moe/aux_loss": "1",
        "moe/load_max_over_mean": "1",
        "moe/idle_frac": "1",
        "moe/router_entropy": "nats",
    }
