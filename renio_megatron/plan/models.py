"""A model as planning sees it: its architecture, its experts if it has some, and the tensors of a rank."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from renio_megatron.assets import model_directory
from renio_megatron.errors import ConfigError
from renio_megatron.megatron.architecture import Architecture, Experts, padded_vocab_size
from renio_megatron.settings import LoraConfig, ParallelConfig, PrecisionConfig


@dataclass(frozen=True)
class PlannedModel:
    """What is known of a model from its config.json.

    Attributes:
        name: as the recipe gives it.
        architecture: the model.
        lora: its adapters, beside which all of it is frozen; none where `r` is None.
    """

    name: str
    architecture: Architecture
    lora: LoraConfig = field(default_factory=LoraConfig)

    @property
    def is_frozen(self) -> bool:
        """Whether only adapters are trained."""
        return self.lora.r is not None

    @property
    def experts(self) -> Experts | None:
        """Of each layer; None for a dense model."""
        return self.architecture.experts


def read_model(name: str, setting: str) -> PlannedModel:
    """The model of a Hugging Face directory, of which only config.json is read; `config.check_models` comes first.

    Raises:
        ConfigError: a model, or a feature of one, that neither the trainer nor the plan knows.
    """
    path = model_directory(name, setting) / "config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    for key in ("hidden_size", "intermediate_size", "vocab_size"):
        _require_count(path, values, key)
    if values["model_type"] == "qwen3_moe":
        for key in ("num_experts_per_tok", "moe_intermediate_size"):
            _require_count(path, values, key)
    return PlannedModel(name, Architecture.from_values(path, values))


def rank_tensors(
    model: PlannedModel,
    parallel: ParallelConfig,
    *,
    vocab_size: int,
    pipeline_rank: int,
    num_chunks: int = 1,
) -> list[int]:
    """Entries of each parameter of a rank but adapters, in no particular order; all tensor-parallel ranks are alike.

    The embedding is on the first pipeline rank and the LM head on the last. A tied head is the embedding where both
    are on one rank, and a copy of it otherwise. Experts are cut over the tensor-parallel ranks like an MLP.

    Args:
        model, parallel: the whole model and its layout.
        vocab_size: V of the loss, before padding.
        pipeline_rank: this one.
        num_chunks: stages of each pipeline rank.
    """
    architecture, tensor = model.architecture, parallel.tensor_model_parallel_size
    stages = parallel.pipeline_model_parallel_size
    is_first, is_last = pipeline_rank == 0, pipeline_rank == stages - 1
    vocabulary = padded_vocab_size(vocab_size, parallel) // tensor * architecture.hidden_size
    found = _layer_tensors(model, tensor) * (architecture.num_layers // (stages * num_chunks) * num_chunks)
    if is_first:
        found.append(vocabulary)
    if is_last:
        found.append(architecture.hidden_size)
        if not (architecture.tied and is_first):
            found.append(vocabulary)
    return found


def adapter_tensors(model: PlannedModel, parallel: ParallelConfig, *, num_chunks: int = 1) -> list[int]:
    """Entries of each adapter's A [r, in] and B [out, r] on a rank; none without adapters. All ranks are alike.

    Of a column-parallel layer B is cut over the tensor-parallel ranks, of a row-parallel one A.
    """
    stages, tensor = parallel.pipeline_model_parallel_size, parallel.tensor_model_parallel_size
    layer = []
    for rows, columns, is_column in _target_shapes(model):
        layer += [columns, rows // tensor] if is_column else [columns // tensor, rows]
    rank = model.lora.r or 0
    return [rank * width for width in layer] * (model.architecture.num_layers // (stages * num_chunks) * num_chunks)


def fp8_entries(model: PlannedModel, parallel: ParallelConfig, precision: PrecisionConfig, pipeline_rank: int) -> int:
    """Entries of a rank's weights that are multiplied in FP8: those of the decoder's linear layers.

    Args:
        model, parallel: the whole model and its layout.
        precision: the model's; 0 where it has no FP8, or emulates it.
        pipeline_rank: this one.
    """
    if precision.fp8 is None or precision.emulate_fp8:
        return 0
    stages = parallel.pipeline_model_parallel_size
    layers = model.architecture.num_layers // stages
    if precision.first_last_layers_bf16:
        layers -= precision.num_layers_at_start_in_bf16 if pipeline_rank == 0 else 0
        layers -= precision.num_layers_at_end_in_bf16 if pipeline_rank == stages - 1 else 0
    return sum(_linear_tensors(model, parallel.tensor_model_parallel_size)) * max(layers, 0)


def _layer_tensors(model: PlannedModel, tensor: int) -> list[int]:
    """Entries of each parameter of one layer on a tensor-parallel rank; norms are whole everywhere."""
    it = model.architecture
    queries, groups = it.num_attention_heads * it.kv_channels, it.num_query_groups * it.kv_channels
    found = [it.hidden_size, it.hidden_size]
    if it.add_qkv_bias:
        found.append((queries + 2 * groups) // tensor)
    if it.qk_layernorm:
        found += [it.kv_channels, it.kv_channels]
    if model.experts is not None:
        found.append(model.experts.count * it.hidden_size)
    return found + _linear_tensors(model, tensor)


def _linear_tensors(model: PlannedModel, tensor: int) -> list[int]:
    """The same of the linear layers alone."""
    it = model.architecture
    queries, groups = it.num_attention_heads * it.kv_channels, it.num_query_groups * it.kv_channels
    found = [(queries + 2 * groups) // tensor * it.hidden_size, it.hidden_size * queries // tensor]
    mlps, width = 1, it.ffn_hidden_size
    if model.experts is not None:
        mlps, width = model.experts.count, model.experts.ffn_hidden_size
    return found + [2 * width // tensor * it.hidden_size, it.hidden_size * width // tensor] * mlps


def _target_shapes(model: PlannedModel) -> list[tuple[int, int, bool]]:
    """(rows, columns, whether the layer is column-parallel) of each linear layer that has an adapter."""
    it = model.architecture
    queries, groups = it.num_attention_heads * it.kv_channels, it.num_query_groups * it.kv_channels
    shapes = {
        "q_proj": (queries, it.hidden_size, True),
        "k_proj": (groups, it.hidden_size, True),
        "v_proj": (groups, it.hidden_size, True),
        "o_proj": (it.hidden_size, queries, False),
        "gate_proj": (it.ffn_hidden_size, it.hidden_size, True),
        "up_proj": (it.ffn_hidden_size, it.hidden_size, True),
        "down_proj": (it.hidden_size, it.ffn_hidden_size, False),
    }
    return [shapes[name] for name in model.lora.names]


def _require_count(path: Path, values: dict[str, Any], key: str) -> None:
    value = values.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{path} needs {key}, a whole number above 0; got {value!r}.")
