"""Emulated FP8 against rounding by hand: tables of all values of both formats, scales in numpy, products in fp64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from renio_megatron.config import ParallelConfig, PrecisionConfig, TrainConfig
from tests.helpers.multiprocess import run_ranks

RECIPES = ("tensorwise", "blockwise", "mxfp8")
FORMATS = ("hybrid", "e4m3")
SEQUENCE, BATCH, HIDDEN, FFN = 6, 25, 144, 136  # 150 tokens and no width is a multiple of 32; all exceed 128


def all_values(exponent_bits: int, mantissa_bits: int, count: int) -> np.ndarray:
    """The non-negative finite values in the order of their codes."""
    bias, steps = 2 ** (exponent_bits - 1) - 1, 2**mantissa_bits
    values = []
    for code in range(count):
        exponent, mantissa = divmod(code, steps)
        values.append(
            mantissa / steps * 2.0 ** (1 - bias) if exponent == 0 else (1 + mantissa / steps) * 2.0 ** (exponent - bias)
        )
    return np.array(values)


TABLES = {"e4m3": all_values(4, 3, 0x7F), "e5m2": all_values(5, 2, 0x7C)}  # the codes above are NaN or infinity


def nearest(scaled: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Each value's nearest one in the table, in fp64; a tie goes to the even code."""
    magnitude = np.minimum(np.abs(scaled.astype(np.float64)), table[-1])
    upper = np.searchsorted(table, magnitude).clip(1, len(table) - 1)
    to_lower, to_upper = magnitude - table[upper - 1], table[upper] - magnitude
    takes_upper = (to_upper < to_lower) | ((to_upper == to_lower) & (upper % 2 == 0))
    return np.copysign(np.where(takes_upper, table[upper], table[upper - 1]), scaled)


def rounded(values: torch.Tensor, name: str, height: int | None, width: int | None, power: bool) -> np.ndarray:
    """Block by block in plain loops."""
    array, table = values.detach().numpy().astype(np.float32), TABLES[name]
    out = np.zeros(array.shape)
    height, width = height or array.shape[0], width or array.shape[1]
    for top in range(0, array.shape[0], height):
        for left in range(0, array.shape[1], width):
            where = (slice(top, top + height), slice(left, left + width))
            amax = np.abs(array[where]).max()
            scale = np.float32(table[-1]) / amax if amax > 0 else np.float32(1)
            if power and amax > 0:
                scale = np.float32(2.0 ** math.floor(math.log2(scale)))
            out[where] = nearest(array[where] * scale, table) / np.float64(scale)
    return out


def operand(values: torch.Tensor, name: str, recipe: str, axis: int, *, is_weight: bool = False) -> np.ndarray:
    """What a product over `axis` reads."""
    if recipe == "tensorwise":
        return rounded(values, name, None, None, power=False)
    if recipe == "blockwise" and is_weight:
        return rounded(values, name, 128, 128, power=True)
    length = {"blockwise": 128, "mxfp8": 32}[recipe]
    return rounded(values, name, *((1, length) if axis == 1 else (length, 1)), power=True)


def by_hand(
    x: torch.Tensor, weight: torch.Tensor, gradient: torch.Tensor, recipe: str, fp8: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Output, gradient of the input, gradient of the weight; of tokens x features, each as `product` gives it."""
    down = "e5m2" if fp8 == "hybrid" else "e4m3"
    output = product(operand(x, "e4m3", recipe, 1), operand(weight, "e4m3", recipe, 1, is_weight=True).T)
    for_x = product(operand(gradient, down, recipe, 1), operand(weight, "e4m3", recipe, 0, is_weight=True))
    for_weight = product(operand(gradient, down, recipe, 0).T, operand(x, "e4m3", recipe, 0))
    return output, for_x, for_weight


def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The product, and that of the magnitudes, to which rounding errors of the sums are relative: [2, ...]."""
    return np.stack((a @ b, np.abs(a) @ np.abs(b)))


def error(found: torch.Tensor, expected: np.ndarray) -> float:
    """Largest difference of an element, relative to its sum of magnitudes: small ones count as much as large ones."""
    value, size = expected
    return float((np.abs(found.detach().numpy() - value) / np.maximum(size, 1e-30)).max())


def spread_out(*shape: int, seed: int) -> torch.Tensor:
    """Normal numbers whose rows and columns differ in size by more than FP8's range, so that axes and blocks matter.

    Scales that are powers of 2 make no difference within that range.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.randn(shape[0], 1, generator=generator), torch.randn(1, shape[1], generator=generator)
    return torch.randn(*shape, generator=generator) * (3 * rows).exp() * (3 * columns).exp()


def test_the_tables_hold_what_the_formats_are_known_for():
    assert (TABLES["e4m3"][-1], TABLES["e4m3"][1]) == (448.0, 2.0**-9)
    assert (TABLES["e5m2"][-1], TABLES["e5m2"][1]) == (57344.0, 2.0**-16)


@pytest.mark.parametrize("name", TABLES)
def test_every_value_stays_and_every_middle_goes_to_the_even_one(name):
    from renio_megatron.megatron.model.fp8_emulation import E4M3, E5M2, round_to_fp8

    dtype = {"e4m3": E4M3, "e5m2": E5M2}[name]
    table = torch.tensor(TABLES[name], dtype=torch.float32)
    middles = (table[1:] + table[:-1]) / 2
    values = torch.cat((table, -table, middles, -middles, middles * 1.0001, middles * 0.9999))[None]
    found = round_to_fp8(values, dtype, None, power_of_two=True)  # the largest value is there: the scale is 1
    assert torch.equal(found.double(), torch.from_numpy(nearest(values.numpy(), TABLES[name])))
    assert torch.equal(found[:, : len(table)], values[:, : len(table)])


@pytest.mark.parametrize("fp8", FORMATS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_output_and_gradients_equal_a_computation_by_hand(recipe, fp8):
    from renio_megatron.megatron.model.fp8_emulation import Fp8Operands, Fp8Product

    operands = Fp8Operands.of(PrecisionConfig(fp8=fp8, fp8_recipe=recipe, emulate_fp8=True))
    x, weight = spread_out(SEQUENCE * BATCH, HIDDEN, seed=1), spread_out(FFN, HIDDEN, seed=2)
    gradient = spread_out(SEQUENCE * BATCH, FFN, seed=3)
    leaf = x.view(SEQUENCE, BATCH, HIDDEN).clone().requires_grad_()
    parameter = weight.clone().requires_grad_()
    output = Fp8Product.apply(leaf, parameter, operands)
    output.backward(gradient.view_as(output))
    expected = by_hand(x, weight, gradient, recipe, fp8)
    for found, wanted in zip((output, leaf.grad, parameter.grad), expected, strict=True):
        assert error(found.reshape(wanted.shape[1:]), wanted) < 1e-6
    exact = (x.double() @ weight.double().T).view_as(output)
    assert 1e-3 < float((output.detach() - exact).norm() / exact.norm()) < 0.1  # it is rounded, and not by much


def test_a_product_of_bf16_is_bf16_and_rounded_once():
    from renio_megatron.megatron.model.fp8_emulation import Fp8Operands, Fp8Product

    operands = Fp8Operands.of(PrecisionConfig(fp8="hybrid", emulate_fp8=True))
    x = spread_out(40, 64, seed=1).bfloat16().requires_grad_()
    weight = spread_out(48, 64, seed=2).bfloat16().requires_grad_()
    output = Fp8Product.apply(x, weight, operands)
    output.backward(torch.ones_like(output))
    assert (output.dtype, x.grad.dtype, weight.grad.dtype) == (torch.bfloat16,) * 3
    expected, _, _ = by_hand(x.detach().float(), weight.detach().float(), torch.ones(40, 48), "tensorwise", "hybrid")
    wanted = torch.from_numpy(expected[0])
    assert float((output != wanted.bfloat16()).double().mean()) < 0.01  # some sums lie between two values of bf16
    assert error(output.float(), expected) < 2.0**-8


@pytest.mark.parametrize("power", [False, True])
@pytest.mark.parametrize("block", [None, (1, 4), (3, 1), (2, 2)])
def test_zeros_tiny_values_and_values_that_are_no_numbers(block, power):
    from renio_megatron.megatron.model.fp8_emulation import E4M3, round_to_fp8

    assert not round_to_fp8(torch.zeros(5, 7), E4M3, block, power_of_two=power).any()
    assert round_to_fp8(torch.zeros(0, 7), E4M3, block, power_of_two=power).shape == (0, 7)
    tiny = torch.full((5, 7), 2.0**-140)
    assert torch.isfinite(round_to_fp8(tiny, E4M3, block, power_of_two=power)).all()
    values = torch.ones(5, 7)
    values[1, 2], values[3, 3] = float("inf"), float("nan")
    found = round_to_fp8(values, E4M3, block, power_of_two=power)
    assert found[1, 2] == float("inf")
    assert found[3, 3].isnan()
    assert int((found == 1).sum()) == 33


def _on_two_ranks() -> dict[str, Any]:
    from renio_megatron.megatron.runtime.initialize import start

    found: dict[str, Any] = {}
    for name, parallel in (
        ("TP2", ParallelConfig(tensor_model_parallel_size=2)),
        ("TP2 + SP", ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)),
    ):
        layout = start(parallel, seed=1)
        for recipe in RECIPES:
            for fp8 in FORMATS:
                precision = PrecisionConfig(fp8=fp8, fp8_recipe=recipe, emulate_fp8=True)
                found[f"{name}, {recipe}, {fp8}"] = _layer_errors(layout, parallel, precision)
        found[f"{name}, models"] = _whole_models(layout, parallel)
    parallel = ParallelConfig(pipeline_model_parallel_size=2)
    layout = start(parallel, seed=1)
    some = PrecisionConfig(fp8="e4m3", emulate_fp8=True, first_last_layers_bf16=True)
    found["PP2"] = [_is_fp8(layer) for layer in _part(layout, parallel, some).chunks[0].decoder.layers]
    return found


def _part(layout: Any, parallel: ParallelConfig, precision: PrecisionConfig | None, **more: Any) -> Any:
    from renio_megatron.megatron.model.build import build_model
    from renio_megatron.models.architecture import Architecture
    from renio_megatron.models.rope import Rope

    architecture = Architecture(
        family="qwen2",
        num_layers=4,
        hidden_size=HIDDEN,
        ffn_hidden_size=FFN,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=HIDDEN // 4,
        layernorm_epsilon=1e-6,
        qk_layernorm=False,
        add_qkv_bias=True,
        init_method_std=0.1,
        vocab_size=16,
        tied=False,
        rope=Rope(),
        max_sequence_length=64,
    )
    return build_model(architecture, layout, parallel, TrainConfig(seed=3), precision, vocab_size=16, **more)


def _is_fp8(layer: Any) -> list[bool]:
    linears = (layer.self_attention.linear_qkv, layer.self_attention.linear_proj, layer.mlp.linear_fc1)
    return [hasattr(linear, "fp8_operands") for linear in (*linears, layer.mlp.linear_fc2)]


def _layer_errors(layout: Any, parallel: ParallelConfig, precision: PrecisionConfig) -> list[float]:
    """Of a column- and a row-parallel layer: output, gradient of the input, gradient of the weight."""
    import torch.distributed as dist

    mlp = _part(layout, parallel, precision).chunks[0].decoder.layers[1].mlp
    rank, tokens, sharded = layout.tensor.rank, SEQUENCE * BATCH, parallel.sequence_parallel
    recipe, fp8, share = precision.fp8_recipe, str(precision.fp8), slice(rank * tokens // 2, (rank + 1) * tokens // 2)
    rows = share if sharded else slice(None)
    errors = []

    column, width = mlp.linear_fc1, mlp.linear_fc1.weight.shape[0]
    x, weight = spread_out(tokens, HIDDEN, seed=4), spread_out(2 * width, HIDDEN, seed=5)
    gradient = spread_out(tokens, 2 * width, seed=6)
    mine = slice(rank * width, (rank + 1) * width)
    column.weight.data.copy_(weight[mine])
    leaf = x[rows].view(-1, BATCH, HIDDEN).clone().requires_grad_()
    output, _ = column(leaf)
    output.backward(gradient[:, mine].reshape(output.shape))
    wanted, for_x, for_weight = by_hand(x, weight[mine], gradient[:, mine], recipe, fp8)
    both = torch.from_numpy(for_x)
    dist.all_reduce(both, group=layout.tensor.group)
    errors.append(error(output.reshape(tokens, -1), wanted))
    errors.append(error(leaf.grad.reshape(-1, HIDDEN), both.numpy()[:, rows]))
    errors.append(error(column.weight.grad, for_weight))

    row, width = mlp.linear_fc2, mlp.linear_fc2.weight.shape[1]
    x, weight = spread_out(tokens, 2 * width, seed=7), spread_out(HIDDEN, 2 * width, seed=8)
    gradient = spread_out(tokens, HIDDEN, seed=9)
    mine = slice(rank * width, (rank + 1) * width)
    row.weight.data.copy_(weight[:, mine])
    leaf = x[:, mine].reshape(SEQUENCE, BATCH, width).clone().requires_grad_()
    output, _ = row(leaf)
    output.backward(gradient[rows].reshape(output.shape))
    wanted, for_x, for_weight = by_hand(x[:, mine].contiguous(), weight[:, mine].contiguous(), gradient, recipe, fp8)
    both = torch.from_numpy(wanted)
    dist.all_reduce(both, group=layout.tensor.group)
    errors.append(error(output.reshape(-1, HIDDEN), both.numpy()[:, rows]))
    errors.append(error(leaf.grad.reshape(tokens, width), for_x))
    errors.append(error(row.weight.grad, for_weight))

    row.weight.requires_grad_(False)  # a frozen layer hands gradients on and has none
    row.weight.grad = None
    again = leaf.detach().clone().requires_grad_()
    frozen, _ = row(again)
    frozen.backward(gradient[rows].reshape(output.shape))
    assert torch.equal(frozen, output)
    assert torch.equal(again.grad, leaf.grad)
    assert row.weight.grad is None
    return errors


def _whole_models(layout: Any, parallel: ParallelConfig) -> dict[str, Any]:
    """Hidden states of the same weights with and without FP8, trained and frozen."""
    fp8: dict[str, Any] = {"fp8": "hybrid", "emulate_fp8": True}
    settings = {
        "none": PrecisionConfig(),
        "all": PrecisionConfig(**fp8),
        "but the first and last": PrecisionConfig(**fp8, first_last_layers_bf16=True),
        "but all": PrecisionConfig(**fp8, first_last_layers_bf16=True, num_layers_at_start_in_bf16=4),
    }
    tokens = torch.arange(2 * SEQUENCE).view(2, SEQUENCE) % 16
    positions = torch.arange(SEQUENCE).expand(2, -1)
    states, layers = {}, {}
    for name, precision in settings.items():
        part = _part(layout, parallel, precision)
        states[name] = part.chunks[0](tokens, positions, None).detach()
        layers[name] = [all(_is_fp8(layer)) for layer in part.chunks[0].decoder.layers]
        assert layers[name] == [any(_is_fp8(layer)) for layer in part.chunks[0].decoder.layers]
    frozen = _part(layout, parallel, settings["all"], trained=False)
    frozen.chunks[0].requires_grad_(False)
    states["frozen"] = frozen.chunks[0](tokens, positions, None)
    return {"states": states, "layers": layers}


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(_on_two_ranks, 2, timeout=200.0)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("fp8", FORMATS)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ["TP2", "TP2 + SP"])
def test_each_rank_scales_its_own_shards(ranks, name, recipe, fp8):
    for found in ranks:
        errors = found[f"{name}, {recipe}, {fp8}"]
        assert len(errors) == 6
        assert max(errors) < 1e-6, errors


@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", ["TP2", "TP2 + SP"])
def test_a_model_differs_just_where_its_layers_are_in_fp8(ranks, name):
    for found in ranks:
        states, layers = found[f"{name}, models"]["states"], found[f"{name}, models"]["layers"]
        assert layers["none"] == layers["but all"] == [False] * 4
        assert layers["all"] == [True] * 4
        assert layers["but the first and last"] == [False, True, True, False]
        assert torch.equal(states["but all"], states["none"])
        assert torch.equal(states["frozen"], states["all"])
        for one in ("all", "but the first and last"):
            difference = float((states[one] - states["none"]).norm() / states["none"].norm())
            assert 1e-3 < difference < 0.3


@pytest.mark.timeout(240)
def test_layers_are_counted_over_the_pipeline(ranks):
    assert [found["PP2"] for found in ranks] == [[[False] * 4, [True] * 4], [[True] * 4, [False] * 4]]
