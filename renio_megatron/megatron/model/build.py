"""A rank's part of a model: Megatron's GPTModel, its final hidden states, and its LM-head shard.

The model's output layer returns its input, so a forward pass ends with final hidden states; logits are computed from
selected rows afterwards, chunk by chunk in the loss, because only completion rows are needed. The output layer is still
a module that is called, with its weight an ordinary parameter: DDP waits for parameters in its forward hook.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.transformer.utils import set_model_to_sequence_parallel

from renio_megatron.config import HeadConfig, LoraConfig, ParallelConfig, PrecisionConfig, TrainConfig
from renio_megatron.data.batching.collate import BatchLayout
from renio_megatron.losses import kernels
from renio_megatron.losses.tune_kernels import tune_scores
from renio_megatron.megatron.model.backend import (
    can_fuse_weight_gradients,
    check_model,
    fp8_multiple,
    resolve_backend,
)
from renio_megatron.megatron.model.fp8_emulation import emulate_fp8
from renio_megatron.megatron.model.layer_specs import block_spec
from renio_megatron.megatron.model.lora import AdapterDropout, add_lora, check_backend
from renio_megatron.megatron.model.moe import (
    Routing,
    check_moe,
    mark_experts,
    watch_routers,
    whole_model_name,
)
from renio_megatron.megatron.model.te_modules import padded_rows, whole_sequences
from renio_megatron.megatron.model.transformer_config import transformer_config
from renio_megatron.models.architecture import Architecture, padded_vocab_size
from renio_megatron.models.rope import set_rope
from renio_megatron.parallel.layout import ParallelLayout
from renio_megatron.parallel.vocab import LmHead, VocabShard, gather_sequence, sum_gradient_over_shards
from renio_megatron.types import MicroBatch

_LAYER = re.compile(r"(decoder\.layers\.)(\d+)(\..+)")


class _PassThrough:
    """Mix-in for the output layer's class of any Megatron version: the output is the input."""

    def forward(
        self, input_: torch.Tensor, weight: Any = None, runtime_gather_output: Any = None
    ) -> tuple[torch.Tensor, None]:
        return input_, None


@dataclass
class ModelPart:
    """This rank's stages and shard of a model.

    Attributes:
        chunks: GPTModels, one for each of this rank's stages: one, or several in an interleaved pipeline, where chunk i
            comes after chunk i - 1 of the last pipeline rank. On the last pipeline rank the last chunk's forward ends
            with hidden states [b, s, H].
        config: Megatron's configuration of them.
        architecture: architecture of the whole model.
        shard: this rank's columns of the LM head.
        layout: this rank's layout.
        backend: backend of its layers, `te` or `local`.
        lora: settings of its adapters; there are none where `r` is None.
        fp8_multiple: the tokens of a pass over this rank's layers must be a multiple of it; 1 without FP8.
        routing: load-balancing loss and metrics of a trained model's routers; None without experts.
        dropout: of a trained model's adapters; None without.
    """

    chunks: tuple[GPTModel, ...]
    config: TransformerConfig
    architecture: Architecture
    shard: VocabShard
    layout: ParallelLayout
    backend: str = "local"
    lora: LoraConfig = field(default_factory=LoraConfig)
    fp8_multiple: int = 1
    routing: Routing | None = None
    dropout: AdapterDropout | None = None
    _before_use: list[Callable[[], None]] = field(default_factory=list)

    def on_use(self, action: Callable[[], None]) -> None:
        """Registers `action`, called before every use of the weights outside of training: they may lag behind the
        optimizer."""
        self._before_use.append(action)

    def sync_params(self) -> None:
        """Makes the weights current before they are used."""
        for action in self._before_use:
            action()

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Parameters of this rank; layers and experts have the numbers that they have in the whole model."""
        first_expert = self.layout.expert_model.rank * (
            (self.config.num_moe_experts or 0) // self.layout.expert_model.size
        )
        for stage, chunk in enumerate(self.chunks):
            offset = get_transformer_layer_offset(self.config, vp_stage=stage if len(self.chunks) > 1 else None)
            for name, parameter in chunk.named_parameters():
                match = _LAYER.fullmatch(name)
                whole_name = f"{match[1]}{int(match[2]) + offset}{match[3]}" if match else name
                yield whole_model_name(whole_name, first_expert), parameter

    def trained_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Those of `named_parameters` that have a gradient: all of a student, or its adapters."""
        return ((name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad)

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Context of the passes from which the model learns: its routers and adapters hear of each micro-batch."""
        for one in self._watching():
            one.begin_step()
        try:
            yield
        finally:
            for one in self._watching():
                one.end_step()

    def begin(self, micro_batch: MicroBatch) -> None:
        """Announces the micro-batch of the next forward pass of a step."""
        for one in self._watching():
            one.begin(micro_batch)

    def _watching(self) -> list[Routing | AdapterDropout]:
        return [one for one in (self.routing, self.dropout) if one is not None]

    def train(self, mode: bool = True) -> None:
        """Training or evaluation mode."""
        for chunk in self.chunks:
            chunk.train(mode)

    def completion_rows(self, output: torch.Tensor, row_index: torch.Tensor) -> torch.Tensor:
        """Final hidden states of selected positions, as input of the LM head: [N, H].

        The gradient is summed over the tensor group in backward, as the column-parallel head needs it: by an
        all-reduce, or under sequence parallelism by the reduce-scatter that undoes the gather. The head's own gradient
        needs no sum.

        Args:
            output: result of the last chunk on the last stage, [b, s, H]; [b, s / tensor ranks, H] under sequence
                parallelism.
            row_index: positions in row-major order over [b, s], int64 [N].
        """
        group = self.layout.tensor.group
        if self.config.sequence_parallel:
            whole = gather_sequence(output.transpose(0, 1).contiguous(), group)
            return whole.transpose(0, 1).flatten(0, 1)[row_index]
        return sum_gradient_over_shards(output.flatten(0, 1)[row_index], group)

    def head(self) -> LmHead:
        """This rank's rows of the LM head, the embedding's where they are tied. Last stage only."""
        last = self.chunks[-1]
        tied = last.share_embeddings_and_output_weights
        weight = last.shared_embedding_or_output_weight() if tied else last.output_layer.weight
        return LmHead(weight, self.shard, getattr(weight, "main_grad", None))

    @torch.no_grad()
    def head_logits(self, hidden_rows: torch.Tensor) -> torch.Tensor:
        """This rank's columns of the logits of a few rows, at fp32 or better: [N, H] -> [N, L]. No gradient flows."""
        weight = self.head().weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        out = hidden_rows.new_empty(len(hidden_rows), weight.shape[0], dtype=dtype)
        return kernels.project_rows(hidden_rows, weight, out)

    def tune_scores(self, head: HeadConfig, temperature: float, num_tokens: int) -> None:
        """Tunes the kernels that read this model's logits of sampled tokens, for micro-batches of at most `num_tokens`
        completion tokens. Does nothing on a rank without an LM head."""
        if self.layout.pipeline.is_last:
            dtype, device = self.config.params_dtype, self.layout.device
            tune_scores(self.shard, head, temperature, hidden_dtype=dtype, num_tokens=num_tokens, device=device)

    def batch_layout(self, pad_id: int, micro_batch_size: int, max_tokens: int | None) -> BatchLayout:
        """How sequences must be arranged for this layout; `max_tokens` packs them."""
        layout = self.layout
        return BatchLayout(
            pad_id=pad_id,
            micro_batch_size=micro_batch_size,
            max_tokens=max_tokens,
            sp_size=layout.tensor.size if self.config.sequence_parallel else 1,
            cp_size=layout.context.size,
            cp_rank=layout.context.rank,
            multiple_of=layout.pipeline.size if len(self.chunks) > 1 else 1,
            piece_multiple=self.fp8_multiple,
        )

    @contextlib.contextmanager
    def decoding(self) -> Iterator[None]:
        """Evaluation mode with sequence and context parallelism off: for passes over single tokens."""
        self.sync_params()
        config, was_training = self.config, self.chunks[0].training
        before = {
            "context_parallel_size": config.context_parallel_size,
            # Megatron allows no cache with an interleaved pipeline; the sampler runs the chunks itself.
            "virtual_pipeline_model_parallel_size": config.virtual_pipeline_model_parallel_size,
        }
        was_parallel = config.sequence_parallel
        ropes = [chunk.rotary_pos_emb for chunk in self.chunks]
        self.train(False)
        for chunk in self.chunks:
            if was_parallel:
                set_model_to_sequence_parallel(chunk, False)
            # A copy, because the original caches the tables that it has sliced for its context rank.
            chunk.rotary_pos_emb = copy.copy(chunk.rotary_pos_emb)
            chunk.rotary_pos_emb.cp_group = None
        config.context_parallel_size, config.virtual_pipeline_model_parallel_size = 1, None
        try:
            with contextlib.ExitStack() as stack:
                for chunk in self.chunks:
                    # Transformer Engine multiplies with the FP8 weights from before the last step, unless notified.
                    chunk.set_is_first_microbatch()
                    stack.enter_context(padded_rows(chunk, self.fp8_multiple))
                    stack.enter_context(whole_sequences(chunk))
                yield
        finally:
            for name, value in before.items():
                setattr(config, name, value)
            for chunk, rope in zip(self.chunks, ropes, strict=True):
                chunk.rotary_pos_emb = rope
                if was_parallel:
                    set_model_to_sequence_parallel(chunk, True)
            self.train(was_training)


def build_model(
    architecture: Architecture,
    layout: ParallelLayout,
    parallel: ParallelConfig,
    train: TrainConfig,
    precision: PrecisionConfig | None = None,
    lora: LoraConfig | None = None,
    *,
    vocab_size: int,
    num_rows: int | None = None,
    trained: bool = True,
    initialize: bool = True,
) -> ModelPart:
    """This rank's part of a model.

    Args:
        architecture: the whole model.
        layout, parallel: this rank's layout, and the sizes of the model axes.
        train: dtype, packing, recomputation, and the seed of the weights.
        precision: backend and precision of the layers; None: the defaults. Unsupported GPUs or shapes raise a
            ConfigError.
        lora: adapters, with which everything else is frozen; None: none.
        vocab_size: V of the loss.
        num_rows: of the whole embedding and LM head, before padding; None: V. A student has a row for each of its
            tokens, of which there may be more than V; a teacher gets as many, so that both heads are sharded at the
            same boundaries.
        trained: False for a model that only runs forward.
        initialize: draw random weights, the same for every tensor-parallel size; False where all weights are loaded
            next: they are uninitialized memory, and nothing is drawn on the host.
    """
    precision, lora = precision or PrecisionConfig(), lora or LoraConfig()
    backend = resolve_backend(precision, layout.device, bf16=train.bf16, has_adapters=lora.r is not None)
    check_model(architecture, parallel, train, precision, backend, layout.device)
    check_backend(lora, backend)
    check_moe(architecture, precision, backend)
    config = transformer_config(
        architecture, parallel, train, precision, trained=trained, initialize=initialize, backend=backend
    )
    # An expert may have no tokens at all, for which the fused product is not known to work.
    can_fuse = architecture.experts is None and can_fuse_weight_gradients(layout.device, bf16=train.bf16)
    config.gradient_accumulation_fusion = trained and can_fuse
    routing = None
    if trained and architecture.experts is not None:
        routing = Routing(architecture, layout, train.moe_aux_loss_coeff, sequence_parallel=parallel.sequence_parallel)
    padded = padded_vocab_size(
        vocab_size if num_rows is None else num_rows,
        divisible_by=parallel.make_vocab_size_divisible_by,
        tensor_size=parallel.tensor_model_parallel_size,
    )
    dropout = AdapterDropout(lora.dropout) if trained and lora.r is not None and lora.dropout else None
    rng_state = torch.get_rng_state()
    num_chunks = config.virtual_pipeline_model_parallel_size or 1
    chunks = [
        _build_chunk(architecture, layout, config, stage, num_chunks, padded, backend, precision, train.seed, trained)
        for stage in range(num_chunks)
    ]
    torch.set_rng_state(rng_state)
    for chunk in chunks:
        add_lora(chunk, lora, seed=train.seed, dropout=dropout)
        if routing is not None:
            watch_routers(chunk, routing)
    width = padded // layout.tensor.size
    start = layout.tensor.rank * width
    shard = VocabShard(start, start + width, vocab_size, layout.tensor.group)
    multiple = fp8_multiple(precision)
    return ModelPart(
        tuple(chunks),
        config,
        architecture,
        shard,
        layout,
        backend=backend,
        lora=lora,
        fp8_multiple=multiple,
        routing=routing,
        dropout=dropout,
    )


def _build_chunk(
    architecture: Architecture,
    layout: ParallelLayout,
    config: TransformerConfig,
    stage: int,
    num_chunks: int,
    padded: int,
    backend: str,
    precision: PrecisionConfig,
    seed: int,
    trained: bool,
) -> GPTModel:
    """One of this rank's stages: Megatron's GPTModel with this package's changes. Draws from torch's generator."""
    vp_stage = stage if num_chunks > 1 else None
    torch.manual_seed(seed + get_transformer_layer_offset(config, vp_stage=vp_stage))
    with torch.set_grad_enabled(trained):  # a frozen model's FP8 weights need no transposed copy
        chunk = GPTModel(
            config,
            block_spec(config, vp_stage, backend),
            vocab_size=padded,
            max_sequence_length=architecture.max_sequence_length,
            pre_process=layout.pipeline.is_first and stage == 0,
            post_process=layout.pipeline.is_last and stage == num_chunks - 1,
            share_embeddings_and_output_weights=architecture.tied,
            position_embedding_type="rope",
            vp_stage=vp_stage,
        )
    set_rope(chunk, architecture.rope, architecture.kv_channels, architecture.max_sequence_length)
    emulate_fp8(chunk.decoder, precision)
    mark_experts(chunk)
    if config.use_cpu_initialization or architecture.experts is not None:  # else they were made on the right device
        chunk.to(layout.device)
    if chunk.post_process:
        layer_class = type(chunk.output_layer)
        chunk.output_layer.__class__ = type(f"PassThrough{layer_class.__name__}", (_PassThrough, layer_class), {})
    return chunk
