"""A rank's part of a model: its layout, and the entries of each local parameter."""

from __future__ import annotations

from dataclasses import dataclass

from renio_megatron.config import ParallelConfig, PrecisionConfig
from renio_megatron.models.architecture import padded_vocab_size
from renio_megatron.tools.plan.models import PlannedModel


@dataclass(frozen=True)
class Tensors:
    """Entries of each parameter of a rank, in no particular order.

    Attributes:
        dense: parameters that are replicated on every data and context rank of the stage.
        experts: parameters of the experts, which are replicated on other ranks.
    """

    dense: tuple[int, ...]
    experts: tuple[int, ...] = ()

    @property
    def count(self) -> int:
        """Entries of all parameters."""
        return sum(self.dense) + sum(self.experts)

    @property
    def largest(self) -> int:
        """Entries of the largest parameter."""
        return max(self.dense + self.experts)


@dataclass(frozen=True)
class PlannedPart:
    """The part of a model on the ranks of one pipeline rank, all of which are alike.

    Attributes:
        model, parallel: the whole model and its layout.
        vocab_size: V of the loss.
        num_rows: rows of the student's whole embedding and LM head, before padding.
        bytes_per_value: bytes of an element of the model.
        num_ranks: ranks that hold the model, replicas included.
        pipeline_rank: index of this pipeline rank.
        num_chunks: stages of each pipeline rank.
    """

    model: PlannedModel
    parallel: ParallelConfig
    vocab_size: int
    num_rows: int
    bytes_per_value: int
    num_ranks: int
    pipeline_rank: int
    num_chunks: int = 1

    @property
    def num_pipeline_ranks(self) -> int:
        """Pipeline ranks of the whole model."""
        return self.parallel.pipeline_model_parallel_size

    @property
    def is_first(self) -> bool:
        """Whether it begins with the embedding."""
        return self.pipeline_rank == 0

    @property
    def is_last(self) -> bool:
        """Whether it ends with the LM head."""
        return self.pipeline_rank == self.num_pipeline_ranks - 1

    @property
    def layers_of_chunk(self) -> int:
        """Layers of each of its stages."""
        return self.model.architecture.num_layers // (self.num_pipeline_ranks * self.num_chunks)

    @property
    def num_layers(self) -> int:
        """Layers of all its stages."""
        return self.layers_of_chunk * self.num_chunks

    @property
    def width(self) -> int:
        """L, columns of the LM head on a rank."""
        size = self.parallel.tensor_model_parallel_size
        divisor = self.parallel.make_vocab_size_divisible_by
        return padded_vocab_size(self.num_rows, divisible_by=divisor, tensor_size=size) // size

    @property
    def data_ranks(self) -> int:
        """Data-parallel ranks: those that read different sequences; a context group counts as one."""
        return self.num_ranks // self.parallel.model_ranks

    @property
    def copies(self) -> int:
        """Ranks that hold the same dense parameters: the data and context ranks."""
        return self.num_ranks // (self.parallel.tensor_model_parallel_size * self.num_pipeline_ranks)

    @property
    def expert_copies(self) -> int:
        """Ranks that have the same experts."""
        return self.num_ranks // (self.num_pipeline_ranks * self.parallel.expert_ranks)

    def tensors(self) -> Tensors:
        """All parameters except adapters.

        The embedding is on the first pipeline rank and the LM head on the last. A tied head is the embedding where both
        are on one rank, and a copy of it otherwise.
        """
        architecture = self.model.architecture
        vocabulary = self.width * architecture.hidden_size
        dense = _layer_tensors(self.model, self.parallel) * self.num_layers
        if self.is_first:
            dense.append(vocabulary)
        if self.is_last:
            dense.append(architecture.hidden_size)
            if not (architecture.tied and self.is_first):
                dense.append(vocabulary)
        return Tensors(tuple(dense), tuple(_expert_tensors(self.model, self.parallel) * self.num_layers))

    def adapters(self) -> Tensors:
        """Each adapter's A [r, in] and B [out, r]; none without adapters.

        For a column-parallel layer B is sharded over the tensor-parallel ranks, for a row-parallel one A.
        """
        tensor, layer = self.parallel.tensor_model_parallel_size, []
        for rows, columns, is_column in _target_shapes(self.model):
            layer += [columns, rows // tensor] if is_column else [columns // tensor, rows]
        rank = self.model.lora.r or 0
        return Tensors(tuple([rank * width for width in layer] * self.num_layers))

    def fp8_entries(self, precision: PrecisionConfig) -> int:
        """Entries of the weights that are multiplied in FP8: those of the decoder's linear layers.

        `precision` is the model's; 0 where it has no FP8, or emulates it.
        """
        if precision.fp8 is None or precision.emulate_fp8:
            return 0
        layers = self.num_layers
        if precision.first_last_layers_bf16:
            layers -= precision.num_layers_at_start_in_bf16 if self.is_first else 0
            layers -= precision.num_layers_at_end_in_bf16 if self.is_last else 0
        return sum(_linear_tensors(self.model, self.parallel)) * max(layers, 0)


def _layer_tensors(model: PlannedModel, parallel: ParallelConfig) -> list[int]:
    """Entries of each parameter of one layer on a rank, without its experts; norms and routers are whole everywhere."""
    it = model.architecture
    queries, groups = it.num_attention_heads * it.kv_channels, it.num_query_groups * it.kv_channels
    found = [it.hidden_size, it.hidden_size]
    if it.add_qkv_bias:
        found.append((queries + 2 * groups) // parallel.tensor_model_parallel_size)
    if it.qk_layernorm:
        found += [it.kv_channels, it.kv_channels]
    if model.experts is not None:
        found.append(model.experts.num_experts * it.hidden_size)
    return found + _linear_tensors(model, parallel)


def _linear_tensors(model: PlannedModel, parallel: ParallelConfig) -> list[int]:
    """Entries of each parameter of the linear layers of one layer on a rank, without its experts."""
    it, tensor = model.architecture, parallel.tensor_model_parallel_size
    queries, groups = it.num_attention_heads * it.kv_channels, it.num_query_groups * it.kv_channels
    found = [(queries + 2 * groups) // tensor * it.hidden_size, it.hidden_size * queries // tensor]
    return found if model.experts is not None else found + _mlp_tensors(it.hidden_size, it.ffn_hidden_size // tensor)


def _expert_tensors(model: PlannedModel, parallel: ParallelConfig) -> list[int]:
    """Entries of each parameter of one layer's experts on a rank."""
    if model.experts is None:
        return []
    width = model.experts.ffn_hidden_size // parallel.expert_tensor_ranks
    here = model.experts.num_experts // parallel.expert_model_parallel_size
    return _mlp_tensors(model.architecture.hidden_size, width) * here


def _mlp_tensors(hidden_size: int, width: int) -> list[int]:
    """Entries of gate and up, which are fused, and of down."""
    return [2 * width * hidden_size, hidden_size * width]


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
