"""A stand-in for the package `transformer_engine`: the few names that megatron-core imports, computing on the CPU.

It keeps Transformer Engine's contracts (read in its source, 2.20): where parameters carry which marks, which shapes FP8
products refuse, that FP8 weights are cached until somebody says "first micro-batch", that parameters in FP8 remember
their high-precision initial value, and that modules put an extra state into checkpoints. It shares no arithmetic with
the package: attention is a plain softmax, tensor parallelism plain collectives. FP8 is real rounding to float8_e4m3fn
and float8_e5m2 with one scale a tensor, whatever the recipe.
"""

from __future__ import annotations

import contextlib
import enum
import itertools
import math
import sys
import types

import torch
import torch.distributed as dist

from tests.fakes import te_optimizers

VERSION = "2.12.0"
PRODUCTS: list[tuple[str, int, bool]] = []
"""(weight's shape as rows x columns, rows of the input, whether in FP8) of every forward product so far."""


class Quantization:
    """What `fp8_autocast` and `fp8_model_init` have switched on."""

    recipe = None
    init_recipe = None
    keeps_initial_values = False


def install():
    """Puts the package into sys.modules; before anything imports megatron. The real one's library stays out."""
    sys.modules["transformer_engine_torch"] = None
    package = _module("transformer_engine", __version__=VERSION, __path__=[])
    common = _module("transformer_engine.common", __path__=[])
    common.recipe = _module("transformer_engine.common.recipe", Format=Format, **RECIPES)
    package.common = common
    pytorch = _module("transformer_engine.pytorch", __path__=[], **{c.__name__: c for c in MODULES})
    package.pytorch = pytorch
    pytorch.fp8_autocast, pytorch.fp8_model_init = fp8_autocast, fp8_model_init
    parts = {
        "fp8": {
            "FP8GlobalStateManager": GlobalState,
            "fp8_autocast": fp8_autocast,
            "fp8_model_init": fp8_model_init,
        },
        "distributed": {
            "CudaRNGStatesTracker": type("CudaRNGStatesTracker", (), {}),
            "checkpoint": checkpoint,
            "activation_recompute_forward": contextlib.nullcontext,
        },
        "ops": {name: type(name, (torch.nn.Module,), {}) for name in ("Sequential", "FusibleOperation")},
        "tensor": {"QuantizedTensor": QuantizedTensor, "__path__": []},
        "module": {"__path__": []},
        "optimizers": te_optimizers.NAMES,
        "router": dict.fromkeys(
            ("fused_compute_score_for_moe_aux_loss", "fused_moe_aux_loss", "fused_topk_with_score_function")
        ),
    }
    for name, values in parts.items():
        setattr(pytorch, name, _module(f"transformer_engine.pytorch.{name}", **values))
    base = _module("transformer_engine.pytorch.module.base", get_dummy_wgrad=None, TransformerEngineBaseModule=Base)
    pytorch.module.base = base
    pytorch.tensor.float8_tensor = _module("transformer_engine.pytorch.tensor.float8_tensor", Float8Tensor=GlobalState)


def _module(name, **values):
    module = types.ModuleType(name)
    module.__dict__.update(values)
    sys.modules[name] = module
    return module


class Format(enum.Enum):
    E4M3 = 1
    HYBRID = 2


def _recipe(name):
    def __init__(self, fp8_format=Format.HYBRID, **unused):
        self.fp8_format, self.multiple = fp8_format, 32 if name == "MXFP8BlockScaling" else 16

    return type(name, (), {"__init__": __init__})


RECIPES = {
    name: _recipe(name)
    for name in ("DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling")
}


@contextlib.contextmanager
def fp8_autocast(enabled=True, fp8_recipe=None, fp8_group=None):
    before, Quantization.recipe = Quantization.recipe, fp8_recipe if enabled else None
    try:
        yield
    finally:
        Quantization.recipe = before


@contextlib.contextmanager
def fp8_model_init(enabled=True, recipe=None, preserve_high_precision_init_val=False):
    Quantization.init_recipe = recipe if enabled else None
    Quantization.keeps_initial_values = preserve_high_precision_init_val
    try:
        yield
    finally:
        Quantization.init_recipe = None


class GlobalState:
    @staticmethod
    def is_fp8_enabled():
        return Quantization.recipe is not None


def checkpoint(function, *args, distribute_saved_activations, get_rng_state_tracker, tp_group, **kwargs):
    return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False, **kwargs)


def rounded(tensor, dtype=torch.float8_e4m3fn):
    scale = tensor.abs().amax().float().clamp(min=1e-30) / torch.finfo(dtype).max
    return ((tensor.float() / scale).to(dtype).float() * scale).to(tensor.dtype)


class QuantizedTensor(torch.Tensor):
    """A parameter that holds values of FP8 only, whatever is copied into it."""

    def copy_(self, source, non_blocking=False):
        with torch._C.DisableTorchFunctionSubclass():
            torch.Tensor.copy_(self, rounded(source.to(self.dtype)))
        return self

    def dequantize(self):
        return self.detach().as_subclass(torch.Tensor).clone()


class _Product(torch.autograd.Function):
    """rows @ weight.T; under FP8 of rounded factors, which must have shapes that FP8 products take."""

    @staticmethod
    def forward(ctx, rows, weight, used_weight, recipe):
        if recipe is not None:
            for tensor in (rows, weight):
                if len(tensor) % 8 or tensor.shape[1] % 16:
                    raise ValueError(f"FP8 execution requires ... divisible by 8 and ... 16, got {list(tensor.shape)}")
                if recipe.multiple == 32 and (len(tensor) % 32 or tensor.shape[1] % 32):
                    raise ValueError(f"MXFP8 requires tensor dims that are divisible by 32, got {list(tensor.shape)}")
            rows = rounded(rows)
        ctx.save_for_backward(rows, used_weight)
        ctx.recipe = recipe
        return rows @ used_weight.t()

    @staticmethod
    def backward(ctx, gradient):
        rows, weight = ctx.saved_tensors
        if ctx.recipe is not None:
            if len(rows) % 16:
                raise ValueError("Leading dimension requirement on B for FP8 GEMM. Caller must pad.")
            hybrid = ctx.recipe.fp8_format is Format.HYBRID
            gradient = rounded(gradient, torch.float8_e5m2 if hybrid else torch.float8_e4m3fn)
        return gradient @ weight, gradient.t() @ rows, None, None


def _all_gather(tensor, group):
    pieces = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(pieces, tensor.contiguous(), group=group)
    return torch.cat(pieces)


def _reduce_scatter(tensor, group):
    tensor = tensor.clone()
    dist.all_reduce(tensor, group=group)
    return tensor.chunk(group.size())[group.rank()].contiguous()


def _all_reduce(tensor, group):
    tensor = tensor.clone()
    dist.all_reduce(tensor, group=group)
    return tensor


def _same(tensor, group):
    return tensor.clone()


class _Communicate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, group, there, back):
        ctx.group, ctx.back = group, back
        return there(tensor, group)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.back(gradient, ctx.group), None, None, None


class Base(torch.nn.Module):
    """What all modules share: an extra state in checkpoints, as Transformer Engine's have."""

    def get_extra_state(self):
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state):
        pass


class RMSNorm(Base):
    def __init__(self, normalized_shape=None, eps=1e-5, *, sequence_parallel, params_dtype, hidden_size=None, **unused):
        super().__init__()
        self.sequence_parallel, self.eps = sequence_parallel, eps
        self.weight = torch.nn.Parameter(torch.ones(normalized_shape or hidden_size, dtype=params_dtype))
        self.weight.sequence_parallel = sequence_parallel

    def forward(self, hidden):
        return _normed(hidden, self.weight, self.eps)


class LayerNorm(RMSNorm):
    """Only there to be imported."""


def _normed(hidden, weight, eps):
    wide = hidden.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight.float()).to(hidden.dtype)


class Linear(Base):
    norm_name = None

    def __init__(
        self,
        in_features,
        out_features,
        *,
        sequence_parallel,
        tp_group,
        tp_size,
        init_method,
        bias,
        return_bias,
        parallel_mode,
        params_dtype,
        device,
        fuse_wgrad_accumulation=False,
        **unused,
    ):
        super().__init__()
        assert not return_bias and not fuse_wgrad_accumulation
        self.parallel_mode, self.tp_group, self.tp_size = parallel_mode, tp_group, tp_size
        self.sequence_parallel = sequence_parallel and tp_size > 1
        self.save_original_input = False
        rows = out_features // tp_size if parallel_mode == "column" else out_features
        columns = in_features // tp_size if parallel_mode == "row" else in_features
        weight = torch.empty(rows, columns, dtype=params_dtype)
        init_method(weight)
        initial, self.is_quantized = weight.clone(), Quantization.init_recipe is not None
        if self.is_quantized:
            assert device != "cpu", "FP8 parameters are made by CUDA kernels"
            weight = rounded(weight).as_subclass(QuantizedTensor)
        self.weight = torch.nn.Parameter(weight)
        if self.is_quantized and Quantization.keeps_initial_values:
            self.weight._high_precision_init_val = initial
        self._mark(self.weight, 1 if parallel_mode == "row" else 0)
        self.bias = torch.nn.Parameter(torch.zeros(rows, dtype=params_dtype)) if bias else None
        if bias:
            self._mark(self.bias, 0)
        self._cached_weight = None

    def _mark(self, parameter, dim):
        parameter.tensor_model_parallel, parameter.partition_dim, parameter.partition_stride = True, dim, 1

    def forward(self, hidden, is_first_microbatch=None):
        recipe, column = Quantization.recipe, self.parallel_mode == "column"
        if column and self.tp_size > 1:
            there, back = (_all_gather, _reduce_scatter) if self.sequence_parallel else (_same, _all_reduce)
            hidden = _Communicate.apply(hidden, self.tp_group, there, back)
        rows = hidden.reshape(-1, hidden.shape[-1])
        PRODUCTS.append(("x".join(str(size) for size in self.weight.shape), len(rows), recipe is not None))
        weight = self.weight.dequantize() if self.is_quantized else self.weight
        output = _Product.apply(rows, weight, self._used(weight, recipe, is_first_microbatch), recipe)
        if self.bias is not None:
            output = output + self.bias
        output = output.view(*hidden.shape[:-1], -1)
        if not column and self.tp_size > 1:
            there, back = (_reduce_scatter, _all_gather) if self.sequence_parallel else (_all_reduce, _same)
            output = _Communicate.apply(output, self.tp_group, there, back)
        return output

    def _used(self, weight, recipe, is_first_microbatch):
        """The weight as the product reads it; between micro-batches the one of the first."""
        if recipe is None or self.is_quantized:
            return weight.detach()
        if is_first_microbatch is None:
            return rounded(weight.detach())
        if is_first_microbatch or self._cached_weight is None:
            self._cached_weight = rounded(weight.detach())
        return self._cached_weight


class LayerNormLinear(Linear):
    def __init__(
        self, in_features, out_features, *, eps, normalization, zero_centered_gamma, return_layernorm_output, **more
    ):
        super().__init__(in_features, out_features, **more)
        assert normalization == "RMSNorm" and not return_layernorm_output
        self.eps = eps
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(in_features, dtype=more["params_dtype"]))
        self.layer_norm_weight.sequence_parallel = self.sequence_parallel

    def forward(self, hidden, is_first_microbatch=None):
        return super().forward(_normed(hidden, self.layer_norm_weight, self.eps), is_first_microbatch)


class GroupedLinear(Base):
    """Only there to be imported."""


class DotProductAttention(Base):
    """Softmax attention of [s, b, heads, width] (sbhd) or [tokens, heads, width] (thd), each sequence alone."""

    def __init__(
        self,
        num_attention_heads,
        kv_channels,
        *,
        num_gqa_groups,
        attn_mask_type,
        softmax_scale=None,
        cp_group=None,
        cp_global_ranks=None,
        cp_stream=None,
        cp_comm_type="p2p",
        **unused,
    ):
        super().__init__()
        self.scale = softmax_scale or 1 / math.sqrt(kv_channels)
        self.repeats = num_attention_heads // num_gqa_groups
        self.set_context_parallel_group(cp_group, cp_global_ranks, cp_stream, cp_comm_type)

    def set_context_parallel_group(self, cp_group, cp_global_ranks, cp_stream, cp_comm_type="p2p"):
        self.cp_group, self.cp_global_ranks = cp_group, cp_global_ranks
        self.cp_stream, self.cp_comm_type = cp_stream, cp_comm_type

    def forward(self, query, key, value, attention_mask=None, *, attn_mask_type, qkv_format="sbhd", **packing):
        assert attention_mask is None and (qkv_format == "thd") == attn_mask_type.startswith("padding")
        if qkv_format == "thd":
            query, key, value = (tensor.unsqueeze(1) for tensor in (query, key, value))
            boundaries = packing["cu_seqlens_q"].tolist()
            lengths = [stop - start for start, stop in itertools.pairwise(boundaries)]
            assert packing["cu_seqlens_kv"].tolist() == boundaries and packing["max_seqlen_q"] == max(lengths)
        else:
            boundaries = [0, len(query) * (self.cp_group.size() if self.cp_group else 1)]
        is_causal = "causal" in attn_mask_type
        if self.cp_group is None:
            assert qkv_format != "thd" or boundaries[-1] == len(query)
            output = self._sequences(query, key, value, boundaries, is_causal)
        else:
            output = self._everybody(query, key, value, boundaries, is_causal)
        return output.flatten(1) if qkv_format == "thd" else output.flatten(2)

    def _everybody(self, query, key, value, boundaries, is_causal):
        """Every rank gathers everything, computes everything and keeps its own positions."""
        size, rank = self.cp_group.size(), self.cp_group.rank()
        held = [_held(boundaries, size, number) for number in range(size)]
        order = torch.cat(held).argsort()
        whole = [_Communicate.apply(t, self.cp_group, _all_gather, _reduce_scatter)[order] for t in (query, key, value)]
        return self._sequences(*whole, boundaries, is_causal)[held[rank]]

    def _sequences(self, query, key, value, boundaries, is_causal):
        if len(query) != len(key):
            assert not is_causal  # decoding
            return self._one(query, key, value, is_causal)
        pieces = [slice(start, stop) for start, stop in itertools.pairwise(boundaries)]
        return torch.cat([self._one(query[p], key[p], value[p], is_causal) for p in pieces])

    def _one(self, query, key, value, is_causal):
        key, value = (tensor.repeat_interleave(self.repeats, dim=2).float() for tensor in (key, value))
        scores = torch.einsum("qbhd,kbhd->bhqk", query.float(), key) * self.scale
        if is_causal:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
        return torch.einsum("bhqk,kbhd->qbhd", scores.softmax(-1), value).to(query.dtype)


def _held(boundaries, size, rank):
    """Positions of the rank's two chunks of every sequence: the first ranks' second chunks come last."""
    chunks = [torch.arange(start, stop).chunk(2 * size) for start, stop in itertools.pairwise(boundaries)]
    return torch.cat([piece for sequence in chunks for piece in (sequence[rank], sequence[2 * size - 1 - rank])])


MODULES = (Base, RMSNorm, LayerNorm, Linear, LayerNormLinear, GroupedLinear, DotProductAttention)
