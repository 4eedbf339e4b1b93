"""FP8 emulation on any device: linear layers whose three products read operands rounded to FP8.

Only operands are rounded. They are multiplied and accumulated in fp32, and the result is rounded to the parameters'
dtype, like an FP8 product with a wide accumulator.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region

from renio_megatron.config import PrecisionConfig

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
"""The largest value of a format; larger ones saturate."""

_LARGEST_SCALE = 2.0**127


@dataclass(frozen=True)
class Scaling:
    """Scaling granularity: the values of an operand that share a scale.

    Attributes:
        vector: how many along the contraction axis share one, in activations and gradients; None: the whole tensor.
        weight_tile: as many rows as columns of a weight share one; None: as in `vector`.
        power_of_two: whether scales are rounded down to a power of 2, so that scaling is exact.
    """

    vector: int | None
    weight_tile: int | None
    power_of_two: bool


SCALINGS = {
    "tensorwise": Scaling(None, None, power_of_two=False),
    "blockwise": Scaling(128, 128, power_of_two=True),
    "mxfp8": Scaling(32, None, power_of_two=True),
}
"""Scaling by `precision.fp8_recipe`, like the defaults of Transformer Engine's Float8CurrentScaling, Float8BlockScaling
and MXFP8BlockScaling. Rounding the scale down is rounding MXFP8's inverse scale, an E8M0 number, up."""


def round_to_fp8(
    values_RC: torch.Tensor, dtype: torch.dtype, block: tuple[int, int] | None, *, power_of_two: bool
) -> torch.Tensor:
    """The nearest FP8 values under one scale for each block, ties to even, saturating: fp32 [R, C].

    A block is scaled so that its largest magnitude becomes the format's largest value (or comes within a factor of 2 of
    it), rounded, and scaled back. A block of zeros stays zero. Infinity and NaN are kept, so that later checks find
    them; the finite values of their block are then rounded without a scale.

    Args:
        values_RC: any floating dtype [R, C].
        dtype: `E4M3` or `E5M2`.
        block: rows and columns that share a scale; the last blocks may be smaller. None: the whole tensor.
        power_of_two: round scales down to a power of 2.

    Gradient: not defined here.

    >>> values = torch.tensor([[448.0, 17.0, -0.001, 500.0]])
    >>> round_to_fp8(values, E4M3, (1, 2), power_of_two=True).tolist()
    [[448.0, 16.0, -0.0, 512.0]]
    """
    values = values_RC.detach().float()
    rows, columns = values.shape
    height, width = block or (max(rows, 1), max(columns, 1))
    padded = torch.nn.functional.pad(values, (0, -columns % width, 0, -rows % height))
    tiles = padded.unflatten(0, (-1, height)).unflatten(2, (-1, width))  # [blocks, height, blocks, width]
    scale = _scale_of(tiles.abs().amax((1, 3), keepdim=True), LARGEST[dtype], power_of_two)
    scaled = tiles * scale
    rounded = scaled.clamp(-LARGEST[dtype], LARGEST[dtype]).to(dtype).float()
    back = torch.where(scaled.isfinite(), rounded, scaled) / scale
    return back.flatten(2, 3).flatten(0, 1)[:rows, :columns]


def _scale_of(amax: torch.Tensor, largest: float, power_of_two: bool) -> torch.Tensor:
    """Factor of each block; 1 where its largest magnitude is not finite."""
    scale = (largest / amax).clamp(max=_LARGEST_SCALE)
    if power_of_two:
        _, exponent = torch.frexp(scale)  # scale = mantissa * 2^exponent, mantissa in [0.5, 1)
        scale = torch.ldexp(torch.ones_like(scale), exponent - 1)
    return torch.where(amax.isfinite(), scale, 1.0)


@dataclass(frozen=True)
class Fp8Operands:
    """Rounds each operand of a linear layer's products by a format and a recipe.

    Attributes:
        gradient_dtype: format of gradients; activations and weights are E4M3.
        scaling: scaling of all operands.
    """

    gradient_dtype: torch.dtype
    scaling: Scaling

    @classmethod
    def of(cls, precision: PrecisionConfig) -> Fp8Operands:
        """The rounding of a recipe's section whose `fp8` is set."""
        return cls(E5M2 if precision.fp8 == "hybrid" else E4M3, SCALINGS[precision.fp8_recipe])

    def activation(self, values_TI: torch.Tensor, contraction: int) -> torch.Tensor:
        """Tokens by features, as a product over axis `contraction` (0 or 1) reads them: fp32."""
        return self._round(values_TI, E4M3, self._vector(contraction))

    def gradient(self, values_TO: torch.Tensor, contraction: int) -> torch.Tensor:
        """The output's gradient, tokens by features, as a product over axis `contraction` reads it: fp32."""
        return self._round(values_TO, self.gradient_dtype, self._vector(contraction))

    def weight(self, values_OI: torch.Tensor, contraction: int) -> torch.Tensor:
        """Output features by input features, as a product over axis `contraction` reads them: fp32."""
        tile = self.scaling.weight_tile
        return self._round(values_OI, E4M3, (tile, tile) if tile else self._vector(contraction))

    def _vector(self, contraction: int) -> tuple[int, int] | None:
        length = self.scaling.vector
        if length is None:
            return None
        return (1, length) if contraction == 1 else (length, 1)

    def _round(self, values: torch.Tensor, dtype: torch.dtype, block: tuple[int, int] | None) -> torch.Tensor:
        return round_to_fp8(values, dtype, block, power_of_two=self.scaling.power_of_two)


class Fp8Product(torch.autograd.Function):
    """x W^T with operands rounded to FP8 in all three products: the output's, the input's gradient's, the weight's.

    Each product's operands are rounded along its own contraction axis, from the values before any rounding.
    """

    @staticmethod
    def forward(ctx: Any, input_: torch.Tensor, weight: torch.Tensor, operands: Fp8Operands) -> torch.Tensor:
        """The output [..., O] of an input [..., I] and a weight [O, I], in the input's dtype."""
        ctx.operands, ctx.dtype = operands, input_.dtype
        ctx.save_for_backward(input_ if ctx.needs_input_grad[1] else None, weight)
        output = operands.activation(input_.flatten(0, -2), 1) @ operands.weight(weight, 1).t()
        return output.to(input_.dtype).view(*input_.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        """Gradients of the input and the weight, in their dtypes; each only where it is needed."""
        input_, weight = ctx.saved_tensors
        operands, gradient = ctx.operands, gradients[0]
        flat = gradient.flatten(0, -2)
        for_input = for_weight = None
        if ctx.needs_input_grad[0]:
            for_input = operands.gradient(flat, 1) @ operands.weight(weight, 0)
            for_input = for_input.to(ctx.dtype).view(*gradient.shape[:-1], -1)
        if ctx.needs_input_grad[1]:
            for_weight = operands.gradient(flat, 0).t() @ operands.activation(input_.flatten(0, -2), 0)
            for_weight = for_weight.to(weight.dtype)
        return for_input, for_weight, None


class _InFp8:
    """Mix-in for Megatron's column- and row-parallel linear layers of any version.

    Under sequence parallelism the input is rounded after the gather: the scale is that of the product's operand, as in
    Transformer Engine, whose tensor-wise scale is reduced over the tensor ranks there. Weights, and activations sharded
    along their features, have scales of each rank's shard.
    """

    fp8_operands: Fp8Operands

    def _forward_impl(
        self,
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: Any = None,
        **unused: Any,
    ) -> torch.Tensor:
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, tensor_parallel_output_grad=True, group=tp_group)
        elif allreduce_dgrad:
            input = copy_to_tensor_model_parallel_region(input, group=tp_group)
        output = Fp8Product.apply(input, weight, self.fp8_operands)
        return output if bias is None else output + bias


def emulate_fp8(decoder: Any, precision: PrecisionConfig) -> None:
    """Turns the linear layers of a decoder's layers into ones that round to FP8, where the settings request it.

    Embedding, attention's own products, norms and the LM head are unchanged.

    Args:
        decoder: Megatron's TransformerBlock; of the local spec where FP8 is emulated.
        precision: nothing happens unless both `fp8` and `emulate_fp8` are set.
    """
    if precision.fp8 is None or not precision.emulate_fp8:
        return
    operands = Fp8Operands.of(precision)
    first, last = 0, decoder.config.num_layers
    if precision.first_last_layers_bf16:
        first, last = precision.num_layers_at_start_in_bf16, last - precision.num_layers_at_end_in_bf16
    for layer in decoder.layers:
        if first <= layer.layer_number - 1 < last:
            attention, mlp = layer.self_attention, layer.mlp
            for linear in (attention.linear_qkv, attention.linear_proj, mlp.linear_fc1, mlp.linear_fc2):
                linear.__class__ = type(f"Fp8{type(linear).__name__}", (_InFp8, type(linear)), {})
                linear.fp8_operands = operands
