"""Low-rank adapters on Megatron's column- and row-parallel linear layers.

Megatron computes query, key and value in one product, gate and up in another. An adapter belongs to one of them, as in
PEFT, so a fused layer has several; their outputs are arranged like the rows of the fused weight. Adapters are kept in
Hugging Face's layout, sharded along the same axis as their base weight:

    layer            A [r, in]        B [out, r]       between A and B                       under SP, summed over TP
    column-parallel  on every rank    cut by rows      copied; under SP gathered             A
    row-parallel     cut by columns   on every rank    summed; under SP reduce-scattered     B

Without sequence parallelism a replicated parameter sees all positions on every rank and has the whole gradient. With
it, it sees a shard of them; Megatron sums the gradients of parameters that are marked `sequence_parallel`.

With dropout each target reads the input with a mask of its own, as in PEFT, which is a function of the token and
therefore the same in every layout, and again where a layer is recomputed.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Hashable, Iterator
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from renio_megatron.config import LoraConfig
from renio_megatron.config.sections.lora import TARGETS
from renio_megatron.errors import ConfigError
from renio_megatron.megatron.model.passes import Passes
from renio_megatron.parallel.token_dropout import TokenDropout, token_keys
from renio_megatron.types import MicroBatch

_INSIDE = {
    "self_attention.linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "self_attention.linear_proj": ("o_proj",),
    "mlp.linear_fc1": ("gate_proj", "up_proj"),
    "mlp.linear_fc2": ("down_proj",),
}
"""The targets in each of Megatron's linear layers, in the order of its rows."""
_MASKS = 1
"""Last number of the streams of masks; those of A have none."""

_BETWEEN = {
    # (column-parallel, sequence parallelism) -> communication of A x, whose last axis is the adapters' rank
    (True, False): copy_to_tensor_model_parallel_region,
    (True, True): gather_from_sequence_parallel_region,
    (False, False): reduce_from_tensor_model_parallel_region,
    (False, True): reduce_scatter_to_sequence_parallel_region,
}


class AdapterDropout(TokenDropout):
    """Dropout of the inputs of a model's adapters, in the passes from which it learns: nowhere else is there a key."""

    def __init__(self, p: float) -> None:
        """`p` is the probability with which a feature becomes 0, in (0, 1)."""
        super().__init__(p)
        self._passes: Passes[torch.Tensor] = Passes()

    def begin_step(self) -> None:
        """Prepares for the micro-batches of a step."""
        self._passes.clear()

    def begin(self, micro_batch: MicroBatch) -> None:
        """Sets the micro-batch that the next forward pass of this part reads."""
        self._passes.begin(token_keys(micro_batch))

    def end_step(self) -> None:
        """Drops nothing until the next step."""
        self._passes.clear()

    def keys(self, layer: Hashable) -> torch.Tensor | None:
        """Keys of the tokens of a layer's pass, int64 [s, b]; None outside of a step. Called once a pass."""
        return self._passes.read(layer)[0]


class Adapters(torch.nn.Module):
    """Adapters of one linear layer of Megatron: parameters `<target>_a` and `<target>_b`.

    They are parameters of this module, not of submodules: Megatron waits for a gathered parameter when the module that
    holds it is called.

    Attributes:
        is_on: whether the layer adds their output.
        sharded_dims: the axis of each sharded parameter, by name.
    """

    def __init__(
        self, linear: Any, path: str, layer: int, lora: LoraConfig, seed: int, dropout: AdapterDropout | None = None
    ) -> None:
        """Adapters of the layer `path` of decoder layer `layer` (from 0): A as PEFT draws it, B is 0.

        A is drawn whole and then sharded, from (seed, layer, target): the same in every layout. Masks of `dropout` are
        drawn from a stream of (seed, layer, target), too; with None nothing is dropped.
        """
        super().__init__()
        assert lora.r is not None
        config, group = linear.config, linear.tp_group
        self._is_column = isinstance(linear, ColumnParallelLinear)
        self._rows = {name: _rows(name, config) // (group.size() if self._is_column else 1) for name in _INSIDE[path]}
        # Rows of a fused query, key and value weight are interleaved by query group.
        self._num_groups = config.num_query_groups // group.size() if "q_proj" in self._rows else 1
        self._targets = [name for name in self._rows if name in lora.names]
        self._rank, self._scale = lora.r, lora.scale
        self._dropout = dropout
        self._streams = [_number((seed, layer, TARGETS.index(name), _MASKS)) for name in self._targets]
        self.is_on = True
        self.sharded_dims = {
            f"{name}_b" if self._is_column else f"{name}_a": int(not self._is_column) for name in self._targets
        }
        like = {"dtype": config.params_dtype, "device": linear.weight.device}
        for name in self._targets:
            whole = _initial_a(lora.r, linear.input_size, (seed, layer, TARGETS.index(name)))
            mine = whole if self._is_column else whole.chunk(group.size(), dim=1)[group.rank()]
            self.register_parameter(f"{name}_a", torch.nn.Parameter(mine.to(**like).contiguous()))
            self.register_parameter(f"{name}_b", torch.nn.Parameter(torch.zeros(self._rows[name], lora.r, **like)))
        for name, parameter in self.named_parameters():
            if name in self.sharded_dims:
                set_tensor_model_parallel_attributes(parameter, True, self.sharded_dims[name], 1)
            else:
                parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, input_: torch.Tensor, sequence_parallel: bool, group: Any) -> torch.Tensor:
        """The sum to add to the layer's output: [s, b, in] -> [s, b, out], sharded like the layer's input and
        output."""
        low = self._low(input_, sequence_parallel, group)  # row-parallel: a part of a sum over the ranks
        low = _BETWEEN[self._is_column, sequence_parallel](low, group=group)
        lows = dict(zip(self._targets, low.split(self._rank, dim=-1), strict=True))
        parts = [
            torch.nn.functional.linear(lows[name], getattr(self, f"{name}_b"))
            if name in lows
            else low.new_zeros(*low.shape[:-1], rows)
            for name, rows in self._rows.items()
        ]
        fused = torch.cat([part.unflatten(-1, (self._num_groups, -1)) for part in parts], dim=-1)
        return self._scale * fused.flatten(-2)

    def _low(self, input_: torch.Tensor, sequence_parallel: bool, group: Any) -> torch.Tensor:
        """A x of the targets, one behind another: [s, b, in] -> [s, b, targets x r]."""
        downs = [getattr(self, f"{name}_a") for name in self._targets]
        keys = None if self._dropout is None else self._dropout.keys(self)
        if self._dropout is None or keys is None:
            return torch.nn.functional.linear(input_, torch.cat(downs))
        if self._is_column and sequence_parallel:
            keys = keys.chunk(group.size())[group.rank()]
        first = 0 if self._is_column else group.rank() * input_.shape[-1]
        pairs = zip(downs, self._streams, strict=True)
        return torch.cat([self._dropout.linear(input_, down, keys, stream, first) for down, stream in pairs], dim=-1)


class _Adapted:
    """Mix-in for Megatron's column- and row-parallel linear layers of any version."""

    adapters: Adapters
    sequence_parallel: bool
    tp_group: Any

    def forward(self, input_: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        output, bias = super().forward(input_, *args, **kwargs)  # type: ignore[misc]
        if not self.adapters.is_on:
            return output, bias
        return output + self.adapters(input_, self.sequence_parallel, self.tp_group), bias

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The layer's own state, and its adapters with their sharded axes."""
        own = super().sharded_state_dict(prefix, sharded_offsets, metadata)  # type: ignore[misc]
        mine = f"{prefix}adapters."
        adapters = make_sharded_tensors_for_checkpoint(
            self.adapters.state_dict(prefix="", keep_vars=True),
            mine,
            self.adapters.sharded_dims,
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=(metadata or {})["dp_cp_group"],
        )
        return {key: value for key, value in own.items() if not key.startswith(mine)} | adapters


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name, or key of a checkpoint, is an adapter's."""
    return ".adapters." in name


def lora_form(lora: LoraConfig) -> dict[str, Any] | None:
    """Settings that must be equal for adapters to fit a model; None where there are none."""
    if lora.r is None:
        return None
    return {"r": lora.r, "alpha": lora.alpha, "use_rslora": lora.use_rslora, "targets": list(lora.names)}


def check_backend(lora: LoraConfig, backend: str) -> None:
    """Raises `ConfigError` where the backend's layers cannot have adapters."""
    if lora.r is not None and backend != "local":
        raise ConfigError(
            f"lora.r={lora.r} on Transformer Engine's layers: they compute a norm together with the product after it, "
            "and an adapter must read what the norm gives. Set precision.backend=local."
        )


def add_lora(chunk: Any, lora: LoraConfig, *, seed: int, dropout: AdapterDropout | None = None) -> None:
    """Freezes a model's weights and gives its linear layers adapters, where the settings request it.

    Args:
        chunk: Megatron's GPTModel of the local spec, before it is wrapped for training.
        lora: nothing happens where `r` is None.
        seed: seed of A, and of masks.
        dropout: of the adapters' inputs; None: nothing is dropped.
    """
    if lora.r is None:
        return
    chunk.requires_grad_(False)
    for layer in chunk.decoder.layers:
        for path, inside in _INSIDE.items():
            if not set(inside) & set(lora.names):
                continue
            linear = layer.get_submodule(path)
            linear.adapters = Adapters(linear, path, layer.layer_number - 1, lora, seed, dropout)
            linear.__class__ = type(f"Adapted{type(linear).__name__}", (_Adapted, type(linear)), {})
    if chunk.pre_process and chunk.config.recompute_granularity == "full":
        chunk.embedding.register_forward_hook(_require_gradient)


@contextlib.contextmanager
def switched_off(chunks: tuple[Any, ...]) -> Iterator[None]:
    """Context in which the models compute without their adapters."""
    found = [module for chunk in chunks for module in chunk.modules() if isinstance(module, Adapters)]
    before = [module.is_on for module in found]
    for module in found:
        module.is_on = False
    try:
        yield
    finally:
        for module, was_on in zip(found, before, strict=True):
            module.is_on = was_on


def _require_gradient(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    """Marks a frozen embedding's output as requiring a gradient.

    Recomputed layers are one autograd function of their input: where that requires no gradient, the function has none,
    and neither do the parameters inside it, without any error.
    """
    return output.requires_grad_() if torch.is_grad_enabled() else output


def _rows(target: str, config: TransformerConfig) -> int:
    """Rows of a target's whole weight."""
    assert config.kv_channels is not None
    assert config.num_query_groups is not None
    assert config.ffn_hidden_size is not None
    return {
        "q_proj": config.num_attention_heads * config.kv_channels,
        "k_proj": config.num_query_groups * config.kv_channels,
        "v_proj": config.num_query_groups * config.kv_channels,
        "o_proj": config.hidden_size,
        "gate_proj": config.ffn_hidden_size,
        "up_proj": config.ffn_hidden_size,
        "down_proj": config.hidden_size,
    }[target]


def _initial_a(rank: int, width: int, rng_stream: tuple[int, ...]) -> torch.Tensor:
    """A whole A, fp32 [r, in]: uniform in +-1 / sqrt(in), which is `kaiming_uniform_` with a = sqrt(5)."""
    generator = torch.Generator()
    generator.manual_seed(_number(rng_stream))
    bound = 1.0 / math.sqrt(width)
    return torch.empty(rank, width).uniform_(-bound, bound, generator=generator)


def _number(rng_stream: tuple[int, ...]) -> int:
    """A number of 63 bits for each stream."""
    return int(np.random.SeedSequence(rng_stream).generate_state(1, np.uint64)[0] >> np.uint64(1))
