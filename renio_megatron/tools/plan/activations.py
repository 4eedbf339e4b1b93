"""Activation memory of layers: tensors saved for the backward pass, and temporaries; bytes of one rank.

The formulas list, tensor by tensor, what autograd saves in this package's layer: Megatron's local spec with torch's
norm and attention (`megatron/model/build.py`, `megatron/model/attention.py`), and Megatron's unfused gated MLP. With
adapters the base weights are frozen: a product keeps its input only for an adapter that also reads it. The formulas are
compared with autograd's own list in tests/tools/test_plan.py. The pipeline's formulas are Megatron's
`get_pp_rank_microbatches` (`pipeline_parallel/schedules.py`).
"""

from __future__ import annotations

from renio_megatron.config import ParallelConfig, TrainConfig
from renio_megatron.tools.plan import moe
from renio_megatron.tools.plan.models import PlannedModel
from renio_megatron.tools.plan.workload import PassShape


def layer_bytes(model: PlannedModel, shape: PassShape, *, selective: bool = False, is_balanced: bool = False) -> int:
    """Bytes that one layer saves for its backward pass; `selective` recomputes the core attention.

    `is_balanced`: its experts have a load-balancing loss.
    """
    it, tokens, bytes_per_value = model.architecture, shape.tokens, shape.bytes_per_value
    queries, groups = _widths(model, shape)
    hidden, is_frozen = tokens * it.hidden_size // shape.share, model.is_frozen
    # Both norms' inputs, and their outputs as inputs of the two column-parallel layers.
    kept = 2 * _norm_bytes(hidden, it.hidden_size, shape, is_frozen=is_frozen)
    # A router keeps its input in any case.
    is_read = model.experts is not None or _reads(model, "gate_proj", "up_proj")
    kept += hidden * bytes_per_value * (_reads(model, "q_proj", "k_proj", "v_proj") + is_read)
    # The values are a view of the joint projection, which they keep alive.
    kept += tokens * _projection_width(model, shape) * bytes_per_value
    if it.qk_layernorm:
        copied = it.num_query_groups > shape.tensor  # several groups' queries are not contiguous in the projection
        kept += _norm_bytes(tokens * queries, it.kv_channels, shape, is_copy=copied, is_frozen=is_frozen)
        kept += _norm_bytes(tokens * groups, it.kv_channels, shape, is_copy=False, is_frozen=is_frozen)
    kept += 4 * shape.row_length * it.kv_channels * bytes_per_value  # cosines and sines, for queries and for keys
    kept += _attention_bytes(model, shape, selective=selective)
    if model.experts is None:
        kept += _mlp_bytes(model, shape)
    else:
        kept += moe.kept_bytes(model, shape, is_balanced=is_balanced)
    return kept + _adapter_bytes(model, shape)


def untouched_bytes(model: PlannedModel, shape: PassShape) -> int:
    """Bytes of the first norm of the first layer, which are not saved where the embedding before it is frozen."""
    if not model.is_frozen:
        return 0
    hidden = shape.tokens * model.architecture.hidden_size // shape.share
    return _norm_bytes(hidden, model.architecture.hidden_size, shape, is_frozen=True)


def checkpoint_bytes(model: PlannedModel, shape: PassShape) -> int:
    """A layer's input, all that full recomputation keeps of one or several layers."""
    return tokens_bytes(model, shape) // shape.share


def tokens_bytes(model: PlannedModel, shape: PassShape) -> int:
    """Hidden states of all of a micro-batch's tokens."""
    return shape.tokens * model.architecture.hidden_size * shape.bytes_per_value


def chunk_bytes(model: PlannedModel, shape: PassShape, train: TrainConfig, num_layers: int) -> tuple[int, int]:
    """Bytes that `num_layers` consecutive layers keep of one micro-batch, and the extra bytes of recomputing them.

    Full recomputation (Megatron's `TransformerBlock._checkpointed_forward`): `uniform` keeps the input of every
    `recompute_num_layers` layers, and computes as many again at a time; `block` keeps that of each of the first
    `recompute_num_layers` layers, and everything of the others.
    """
    layer = layer_bytes(
        model,
        shape,
        selective=train.recompute_granularity == "selective",
        is_balanced=train.moe_aux_loss_coeff > 0,
    )
    if train.recomputed_layers is None:
        return num_layers * layer, 0
    method, group = train.recomputed_layers
    count, angles = min(group, num_layers), 4 * shape.row_length * model.architecture.kv_channels
    checkpoint = checkpoint_bytes(model, shape)  # the first computed layer's norm saves the same tensor again
    if method == "uniform":
        return -(-num_layers // count) * checkpoint + angles, count * layer - checkpoint
    return count * checkpoint + (num_layers - count) * layer + angles, layer - checkpoint


def final_norm_bytes(model: PlannedModel, shape: PassShape) -> int:
    """Bytes that the norm after the last layer saves, and its output."""
    hidden = tokens_bytes(model, shape) // shape.bytes_per_value // shape.share
    norm = _norm_bytes(hidden, model.architecture.hidden_size, shape, is_frozen=model.is_frozen)
    return norm + hidden * shape.bytes_per_value


def chunks_in_flight(parallel: ParallelConfig, pipeline_rank: int, num_micro_batches: int) -> int:
    """Forward passes of chunks of layers whose backward pass has not begun, at the most.

    Source: Megatron's `get_pp_rank_microbatches`: the warm-up passes and one more. Without interleaving
    min(stages - rank, micro-batches); with it 2 (stages - rank - 1) + (chunks - 1) x stages + 1, at most all.

    >>> [chunks_in_flight(ParallelConfig(pipeline_model_parallel_size=4), rank, 8) for rank in range(4)]
    [4, 3, 2, 1]
    >>> interleaved = ParallelConfig(pipeline_model_parallel_size=4, virtual_pipeline_model_parallel_size=2)
    >>> [chunks_in_flight(interleaved, rank, 8) for rank in range(4)]
    [11, 9, 7, 5]
    """
    stages, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    if chunks is None:
        return min(stages - pipeline_rank, num_micro_batches)
    warm_up = 2 * (stages - pipeline_rank - 1) + (chunks - 1) * stages
    return min(warm_up + 1, chunks * num_micro_batches)


def forward_bytes(model: PlannedModel, shape: PassShape) -> int:
    """Peak bytes of a layer in a pass that saves nothing: in its MLP or in its attention."""
    it, tokens = model.architecture, shape.tokens
    queries, groups = _widths(model, shape)
    hidden = tokens * it.hidden_size
    around = 2 * hidden // shape.share
    attention = around + tokens * (_projection_width(model, shape) + 4 * queries + 2 * groups)
    if model.experts is not None:
        return max(attention * shape.bytes_per_value, moe.forward_bytes(model, shape))
    return max(attention, around + _mlp_entries(model, shape) + hidden) * shape.bytes_per_value


def backward_bytes(model: PlannedModel, shape: PassShape) -> int:
    """Gradients of a layer's tensors that are alive together in its backward pass: the MLP's and two hidden states'."""
    if model.experts is not None:
        return moe.backward_bytes(model, shape)
    width = model.architecture.ffn_hidden_size // shape.tensor
    return shape.tokens * (3 * width + 2 * model.architecture.hidden_size) * shape.bytes_per_value


def _widths(model: PlannedModel, shape: PassShape) -> tuple[int, int]:
    """Widths of this rank's queries, and of its keys."""
    it = model.architecture
    return (
        it.num_attention_heads * it.kv_channels // shape.tensor,
        max(1, it.num_query_groups // shape.tensor) * it.kv_channels,
    )


def _projection_width(model: PlannedModel, shape: PassShape) -> int:
    """Width of queries, keys and values together; with fewer groups than tensor ranks Megatron gathers those of all."""
    it = model.architecture
    queries, groups = _widths(model, shape)
    if it.num_query_groups < shape.tensor:
        return (it.num_attention_heads + 2 * it.num_query_groups) * it.kv_channels
    return queries + 2 * groups


def _norm_bytes(entries: int, width: int, shape: PassShape, *, is_copy: bool = True, is_frozen: bool = False) -> int:
    """Bytes that RMSNorm saves of `entries` numbers: its input, one scale per row, and where it is not fused the result
    before the weight, both in fp32. An input that something else keeps alive anyway (`is_copy=False`) costs nothing,
    nor does the result where the weight is frozen."""
    scales = 4 * (entries // width)
    if shape.fused_norm:
        return scales + (entries * shape.bytes_per_value if is_copy else 0)
    is_widened = shape.bytes_per_value < 4
    return scales + (0 if is_frozen else 4 * entries) + (4 * entries if is_copy or is_widened else 0)


def _attention_bytes(model: PlannedModel, shape: PassShape, *, selective: bool) -> int:
    """Rotated queries and keys, the output, and one fp32 sum per query and head; no matrix of scores (flash attention).

    Under context parallelism keys and values of the whole row, and a mask for each of this rank's two chunks, which
    torch converts to the model's dtype.
    """
    tokens, bytes_per_value = shape.tokens, shape.bytes_per_value
    queries, groups = _widths(model, shape)
    # The output, as the input of the projection; torch's attention keeps the same tensor, where it is not joined.
    is_kept = _reads(model, "o_proj") or not (shape.rows_joined or selective)
    kept = tokens * queries * bytes_per_value if is_kept else 0
    sums = 4 * tokens * model.architecture.num_attention_heads // shape.tensor
    own_output = tokens * queries * bytes_per_value if shape.rows_joined else 0
    if shape.context == 1 or selective:
        inputs, masks = tokens * (queries + groups) * bytes_per_value, 0
    else:
        inputs = tokens * (queries + 2 * groups * shape.context) * bytes_per_value
        chunk = shape.row_length // 2
        masks = (2 * shape.context + 1) * chunk * chunk * (bytes_per_value + 1)
    return kept + inputs + (0 if selective else sums + own_output + masks)


def _mlp_entries(model: PlannedModel, shape: PassShape) -> int:
    """Gate and up in one tensor, the activated gate, a copy of up, and their product."""
    return shape.tokens * 5 * model.architecture.ffn_hidden_size // shape.tensor


def _mlp_bytes(model: PlannedModel, shape: PassShape) -> int:
    product = shape.tokens * model.architecture.ffn_hidden_size // shape.tensor
    entries = _mlp_entries(model, shape) - (0 if _reads(model, "down_proj") else product)
    return entries * shape.bytes_per_value


def _reads(model: PlannedModel, *targets: str) -> bool:
    """Whether the backward pass reads the input of a product that computes these: for its weight, or for adapters."""
    return not model.is_frozen or any(name in model.lora.names for name in targets)


def _adapter_bytes(model: PlannedModel, shape: PassShape) -> int:
    """A x of each adapter, and the joint A of those that read the same input."""
    if not model.is_frozen:
        return 0
    assert model.lora.r is not None
    it, rank, found = model.architecture, model.lora.r, 0
    joint = {
        ("q_proj", "k_proj", "v_proj"): (it.hidden_size, shape.tokens),
        ("o_proj",): (it.num_attention_heads * it.kv_channels // shape.tensor, shape.tokens // shape.share),
        ("gate_proj", "up_proj"): (it.hidden_size, shape.tokens),
        ("down_proj",): (it.ffn_hidden_size // shape.tensor, shape.tokens // shape.share),
    }
    for targets, (width, tokens) in joint.items():
        count = sum(name in model.lora.names for name in targets)
        found += count * rank * (width + tokens) * shape.bytes_per_value
    return found
