"""Weight files as people have them: what transformers loads of a directory is what is loaded, or it is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from renio_megatron.errors import ConfigError
from renio_megatron.models.architecture import Architecture
from renio_megatron.models.shipped import model_directory
from tests.helpers.multiprocess import Ranks
from tests.models.hf_config_cases import FAMILIES, change, compare, save_family

TOLERANCE = 2e-4
SINGLE, HEAD, EMBEDDING = "model.safetensors", "lm_head.weight", "model.embed_tokens.weight"
DENSE = ("llama", "qwen2", "qwen3")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of each family, its head its own; `other` has other weights."""
    folder = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        save_family(family, folder / family)
    save_family("llama", folder / "other", seed=1)
    return folder


def logits_agree(directory: Path, ranks: Ranks, tensor: int = 2) -> None:
    for difference, theirs, ours in ranks(compare, directory, tensor):
        assert (theirs, ours) == ("", "")
        assert difference is not None and difference < TOLERANCE


def rewrite(directory: Path, change_state: Any) -> None:
    """Another set of tensors in a directory's only file."""
    save_file(change_state(load_file(directory / SINGLE)), directory / SINGLE, metadata={"format": "pt"})


def saved_in_shards(source: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(source).save_pretrained(target, max_shard_size="20KB")
    assert not (target / SINGLE).exists()


def test_shards_are_read_by_their_index(models: Path, tmp_path: Path, two_ranks: Ranks) -> None:
    saved_in_shards(models / "llama", tmp_path / "a")
    logits_agree(tmp_path / "a", two_ranks)


def test_a_whole_file_comes_before_the_index_of_old_shards(models: Path, tmp_path: Path, two_ranks: Ranks) -> None:
    saved_in_shards(models / "llama", tmp_path / "a")
    shutil.copy(models / "other" / SINGLE, tmp_path / "a")
    logits_agree(tmp_path / "a", two_ranks)  # which are those of the whole file
    assert two_ranks(compare, models / "other", 1)[0][0] < TOLERANCE


def test_and_so_it_does_where_the_old_shards_are_gone(models: Path, tmp_path: Path, two_ranks: Ranks) -> None:
    saved_in_shards(models / "llama", tmp_path / "a")
    for path in (tmp_path / "a").glob("model-*.safetensors"):
        path.unlink()
    shutil.copy(models / "other" / SINGLE, tmp_path / "a")
    logits_agree(tmp_path / "a", two_ranks)


@pytest.mark.matrix(3)
@pytest.mark.parametrize("family", DENSE)
def test_a_head_of_its_own_is_kept_where_the_description_ties_it(
    family: str, models: Path, tmp_path: Path, two_ranks: Ranks
) -> None:
    change(models / family, tmp_path / "a", {"tie_word_embeddings": True})
    assert not Architecture.from_directory(tmp_path / "a").tied
    assert Architecture.from_description(tmp_path / "a").tied
    logits_agree(tmp_path / "a", two_ranks)


def test_a_head_that_is_the_embedding_again_is_no_head_of_its_own(
    models: Path, tmp_path: Path, two_ranks: Ranks
) -> None:
    change(models / "llama", tmp_path / "a", {"tie_word_embeddings": True})
    rewrite(tmp_path / "a", lambda state: state | {HEAD: state[EMBEDDING].clone()})
    assert Architecture.from_directory(tmp_path / "a").tied
    logits_agree(tmp_path / "a", two_ranks)


@pytest.mark.parametrize("only", [HEAD, EMBEDDING])
def test_one_matrix_of_a_tied_model_is_both(only: str, models: Path, tmp_path: Path, two_ranks: Ranks) -> None:
    other = HEAD if only == EMBEDDING else EMBEDDING
    change(models / "qwen2", tmp_path / "a", {"tie_word_embeddings": True})
    rewrite(tmp_path / "a", lambda state: {name: tensor for name, tensor in state.items() if name != other})
    logits_agree(tmp_path / "a", two_ranks)


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_experts_in_one_tensor_are_read(
    family: str, tensor: int, models: Path, tmp_path: Path, two_ranks: Ranks
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(models / family, dtype=torch.float32)
    model.save_pretrained(tmp_path / "a", save_original_format=False)
    names = load_file(tmp_path / "a" / SINGLE)
    assert names["model.layers.0.mlp.experts.gate_up_proj"].dim() == 3
    logits_agree(tmp_path / "a", two_ranks, tensor)


def test_fused_experts_of_another_shape_are_refused(models: Path, tmp_path: Path, two_ranks: Ranks) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(models / "mixtral").save_pretrained(tmp_path / "a", save_original_format=False)
    name = "model.layers.1.mlp.experts.down_proj"
    rewrite(tmp_path / "a", lambda state: state | {name: state[name][:3].clone()})
    message = two_ranks(compare, tmp_path / "a", 1)[0][2]
    assert f"{name} has the shape (3, 32, 48)" in message and "\n" not in message


@pytest.mark.matrix(5)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_no_number_is_found_while_loading(
    value: str, dtype: torch.dtype, models: Path, tmp_path: Path, two_ranks: Ranks
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"

    def damaged(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        state = {key: tensor.to(dtype) for key, tensor in state.items()}
        state[name][37, 5] = float(value)
        return state

    shutil.copytree(models / "llama", tmp_path / "a")
    rewrite(tmp_path / "a", damaged)
    messages = [ours for _, _, ours in two_ranks(compare, tmp_path / "a", 1)]
    assert all(f"{name} holds NaN or inf" in message for message in messages)


def nan_in_a_checkpoint(directory: Path, folder: Path) -> str:
    """What is said of a checkpoint of Megatron's in which one number of the second layer is none."""
    from renio_megatron.config import ParallelConfig, TrainConfig
    from renio_megatron.megatron.checkpoint.checkpointer import MegatronCheckpointer
    from renio_megatron.megatron.checkpoint.directory import step_directory
    from renio_megatron.megatron.model.build import build_model
    from renio_megatron.megatron.runtime.initialize import start
    from renio_megatron.megatron.student.learner import MegatronLearner
    from renio_megatron.megatron.weights.hf import load_weights
    from renio_megatron.megatron.weights.pretrained import load_pretrained
    from tests.helpers.resuming import error_of

    parallel = ParallelConfig(tensor_model_parallel_size=2)
    layout, architecture = start(parallel, seed=0), Architecture.from_directory(directory)
    parts = [build_model(architecture, layout, parallel, TrainConfig(), vocab_size=61) for _ in range(2)]
    load_weights(parts[0], directory)
    learner = MegatronLearner(parts[0], TrainConfig(), parallel, temperature=1.0, pad_id=0)
    name = "decoder.layers.1.mlp.linear_fc2.weight"
    dict(parts[0].named_parameters())[name].data[3, 4] = float("nan")  # on both ranks, in other columns of the whole
    checkpointer = MegatronCheckpointer(folder, learner)
    checkpointer.save(1, {})
    checkpointer.finish()
    return error_of(lambda: load_pretrained(parts[1], step_directory(folder, 1)))


def test_so_it_is_in_a_checkpoint_of_megatrons(models: Path, tmp_path: Path, two_ranks: Ranks) -> None:
    for message in two_ranks(nan_in_a_checkpoint, models / "llama", tmp_path / "checkpoints"):
        assert message.startswith("ConfigError: the checkpoint ")
        assert "decoder.layers.1.mlp.linear_fc2.weight holds NaN or inf" in message


def test_an_adapter_beside_the_weights_is_refused(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "llama", tmp_path / "a")
    assert model_directory(str(tmp_path / "a"), "model") == tmp_path / "a"
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(ConfigError, match=r"teacher\.model: .* holds adapter_config\.json beside the model"):
        model_directory(str(tmp_path / "a"), "teacher.model")
