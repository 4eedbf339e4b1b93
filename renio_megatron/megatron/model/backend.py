"""Backend of a model's layers (Transformer Engine or local), and FP8's requirements on the GPU and on shapes."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch

from renio_megatron.config import ParallelConfig, PrecisionConfig, TrainConfig
from renio_megatron.errors import ConfigError
from renio_megatron.megatron.runtime.cudnn import torchs_cudnn
from renio_megatron.models.architecture import Architecture

INSTALL = (
    "Use NVIDIA's PyTorch image (nvcr.io/nvidia/pytorch), which comes with it, or install transformer-engine[pytorch], "
    "which is compiled against the installed torch"
)


@functools.cache
def te_problem() -> str | None:
    """The reason why Transformer Engine cannot be used, as text; None where it can. Checked once per process."""
    try:
        with torchs_cudnn():
            importlib.import_module("transformer_engine.pytorch")
    except Exception as error:  # half an installation raises RuntimeError, OSError or AttributeError
        return f"{type(error).__name__}: {error}"
    return None


def resolve_backend(precision: PrecisionConfig, device: torch.device, *, bf16: bool, has_adapters: bool = False) -> str:
    """The backend of a model's layers: `te` or `local`.

    `auto` is te on a GPU where Transformer Engine imports and the parameters are bf16: its fused attention does
    not support fp32. With `emulate_fp8` it is local, and with adapters, which exist for Megatron's own layers only.

    Args:
        precision: the model's settings.
        device: the model's device.
        bf16: whether its parameters are bf16.
        has_adapters: whether it has adapters.

    Raises:
        ConfigError: te where Transformer Engine does not import, or FP8 where the layers would be local.
    """
    section, problem = precision.section, te_problem()
    backend = precision.backend
    if backend == "te" and problem:
        raise ConfigError(f"{section}.backend=te, but Transformer Engine does not import ({problem}). {INSTALL}.")
    if backend == "auto":
        is_te = device.type == "cuda" and bf16 and not problem and not precision.emulate_fp8 and not has_adapters
        backend = "te" if is_te else "local"
    if backend == "local" and precision.fp8 is not None and not precision.emulate_fp8:
        why = f"Transformer Engine, which does not import here ({problem})" if problem else "a GPU"
        raise ConfigError(
            f"{section}.fp8={precision.fp8} needs {why}. {INSTALL}; or set {section}.emulate_fp8=true, which shows "
            "what FP8's rounding does, without either."
        )
    return backend


def check_capability(precision: PrecisionConfig, capability: tuple[int, int], cuda_version: str | None) -> None:
    """Raises `ConfigError` where a GPU lacks the FP8 products of a model; without FP8 nothing is checked.

    Args:
        precision: the model's settings, of backend te.
        capability: compute capability of the GPU, for example (9, 0) of an H100.
        cuda_version: that torch was built for, for example `12.8`.

    >>> check_capability(PrecisionConfig(fp8="hybrid", fp8_recipe="blockwise"), (9, 0), "12.9")
    >>> check_capability(PrecisionConfig(fp8="hybrid", fp8_recipe="mxfp8"), (9, 0), "12.9")
    Traceback (most recent call last):
    ...
    renio_megatron.errors.ConfigError: precision.fp8_recipe=mxfp8 needs a GPU of compute capability 10.x (Blackwell); \
this one has 9.0. Set precision.fp8_recipe=blockwise or tensorwise.
    """
    if precision.fp8 is None or precision.emulate_fp8:
        return
    section, recipe = precision.section, precision.fp8_recipe
    has = f"this one has {capability[0]}.{capability[1]}"
    if capability < (8, 9):
        raise ConfigError(
            f"{section}.fp8={precision.fp8} needs a GPU of compute capability 8.9 or higher (Ada, Hopper); {has}. "
            f"Set {section}.fp8=null, or {section}.emulate_fp8=true."
        )
    if recipe == "mxfp8" and not (10, 0) <= capability < (12, 0):
        raise ConfigError(
            f"{section}.fp8_recipe=mxfp8 needs a GPU of compute capability 10.x (Blackwell); {has}. "
            f"Set {section}.fp8_recipe={'blockwise or ' if capability >= (9, 0) else ''}tensorwise."
        )
    if recipe != "blockwise":
        return
    if capability < (9, 0):
        raise ConfigError(
            f"{section}.fp8_recipe=blockwise needs a GPU of compute capability 9.0 or higher (Hopper); {has}. "
            f"Set {section}.fp8_recipe=tensorwise."
        )
    if cuda_version is not None and tuple(int(part) for part in cuda_version.split(".")[:2]) < (12, 9):
        raise ConfigError(
            f"{section}.fp8_recipe=blockwise needs CUDA 12.9 or later; torch was built for {cuda_version}. "
            f"Set {section}.fp8_recipe=tensorwise, or use a newer image."
        )


def fp8_multiple(precision: PrecisionConfig) -> int:
    """The number of which rows and columns of an FP8 product's factors must be multiples; 1 where nothing is in FP8.

    cuBLAS requires multiples of 16 elements in each row; MXFP8 scales blocks of 32, in both directions. Blockwise
    scaling uses 32 as well.

    >>> fp8_multiple(PrecisionConfig()), fp8_multiple(PrecisionConfig(fp8="hybrid", fp8_recipe="mxfp8"))
    (1, 32)
    """
    if precision.fp8 is None or precision.emulate_fp8:
        return 1
    return 32 if precision.fp8_recipe in ("blockwise", "mxfp8") else 16


def check_weight_shapes(architecture: Architecture, parallel: ParallelConfig, precision: PrecisionConfig) -> None:
    """Raises `ConfigError` where a weight of a tensor-parallel rank has a size that FP8 products do not support; names
    it."""
    multiple, ranks = fp8_multiple(precision), parallel.tensor_model_parallel_size
    heads, groups, width = architecture.num_attention_heads, architecture.num_query_groups, architecture.kv_channels
    sizes = {
        "hidden_size": architecture.hidden_size,
        "intermediate_size / tensor ranks": architecture.ffn_hidden_size // ranks,
        "query, key and value rows / tensor ranks": (heads + 2 * groups) * width // ranks,
        "query rows / tensor ranks": heads * width // ranks,
    }
    for name, size in sizes.items():
        if size % multiple:
            raise ConfigError(
                f"{precision.section}.fp8={precision.fp8}: {name} is {size}, and FP8 products with "
                f"fp8_recipe={precision.fp8_recipe} take multiples of {multiple}. Lower "
                f"parallel.tensor_model_parallel_size ({ranks}) where that helps, or set {precision.section}.fp8=null."
            )


def check_model(
    architecture: Architecture,
    parallel: ParallelConfig,
    train: TrainConfig,
    precision: PrecisionConfig,
    backend: str,
    device: torch.device,
) -> None:
    """Raises `ConfigError` where Transformer Engine cannot compute this model here, before anything is built."""
    if backend != "te":
        return
    check_weight_shapes(architecture, parallel, precision)
    if precision.fp8 is not None and precision.first_last_layers_bf16:
        layers = architecture.num_layers // parallel.pipeline_model_parallel_size
        for key in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
            if getattr(precision, key) > layers:
                raise ConfigError(
                    f"{precision.section}.{key}={getattr(precision, key)} is more than the {layers} layers of a "
                    "pipeline rank. Lower it."
                )
    if device.type != "cuda":
        return
    check_capability(precision, torch.cuda.get_device_capability(device), torch.version.cuda)
    if not train.bf16 and parallel.context_parallel_size > 1:
        raise ConfigError(
            f"{precision.section}.backend=te with train.bf16=false: Transformer Engine's attention of fp32 numbers has "
            "no context parallelism. Set train.bf16=true, or backend=local."
        )


def can_fuse_weight_gradients(device: torch.device, *, bf16: bool) -> bool:
    """Whether products may add weight gradients to the fp32 buffer themselves.

    Megatron requires apex's extension even where Transformer Engine's layers work without it, because the LM head is
    Megatron's own layer.
    """
    if device.type != "cuda" or not bf16:
        return False
    try:
        importlib.import_module("fused_weight_gradient_mlp_cuda")
    except Exception:  # built for another torch, it raises whatever its loader raises
        return False
    return True


def megatron_settings(precision: PrecisionConfig, backend: str, *, trained: bool) -> dict[str, Any]:
    """Fields of Megatron's TransformerConfig that follow from a model's precision.

    A frozen model's FP8 weights are kept in FP8.

    >>> megatron_settings(PrecisionConfig(), "te", trained=True)
    {}
    """
    if backend != "te" or precision.fp8 is None:
        return {}
    fp8_param = precision.fp8_param_gather or not trained
    return {
        "fp8": precision.fp8,
        "fp8_recipe": precision.fp8_recipe,
        "fp8_param": fp8_param,
        "first_last_layers_bf16": precision.first_last_layers_bf16,
        "num_layers_at_start_in_bf16": precision.num_layers_at_start_in_bf16,
        "num_layers_at_end_in_bf16": precision.num_layers_at_end_in_bf16,
        # Data-parallel ranks may have different numbers of packed micro-batches: a sum over them would deadlock.
        "tp_only_amax_red": True,
    }


def describe_backend(
    precision: PrecisionConfig, device: torch.device, *, bf16: bool, has_adapters: bool = False
) -> str:
    """Backend and precision of a model, for a line about a run; with the reason where adapters decide the backend.

    >>> describe_backend(PrecisionConfig(backend="local"), torch.device("cpu"), bf16=True)
    'local bf16'
    """
    backend = resolve_backend(precision, device, bf16=bf16, has_adapters=has_adapters)
    text = f"{backend} {'bf16' if bf16 else 'fp32'}"
    if backend != resolve_backend(precision, device, bf16=bf16):
        text += " (Transformer Engine's layers take no adapters)"
    if precision.fp8 is None:
        return text
    kind = "emulated FP8" if precision.emulate_fp8 else "FP8"
    text += f" with {kind} {precision.fp8} {precision.fp8_recipe}"
    if precision.first_last_layers_bf16:
        text += (
            f" but {precision.num_layers_at_start_in_bf16} first and {precision.num_layers_at_end_in_bf16} last layers"
        )
    return text
