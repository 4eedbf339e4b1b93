"""Patches that make megatron-core run on a machine without CUDA, over gloo; a no-op with CUDA.

megatron-core assumes a GPU in five ways, and uses collectives that gloo lacks; each gets one patch, and every call that
needed one is counted in `CALLS`, so that a test notices when a new version needs something else:

    A  functions of torch.cuda (current_device, synchronize, RNG state, streams) and Tensor.cuda
    B  literal device="cuda" and pin_memory=True in tensor factories: the listed modules get a substitute for `torch`
    C  the optimizer compares type strings 'torch.cuda.FloatTensor': Tensor.type returns them, to that package only
    D  experts' token counts are copied to the host on a CUDA stream, and only where they are on a GPU
    E  tensor ranks of an expert gather and reduce-scatter pieces of different lengths, which gloo does not support
    F  the optimizer, its norm and scaling, and the router's products are Transformer Engine's or Apex's wherever one of
       them imports, GPU or not, and theirs are CUDA kernels: modules get Megatron's fallback for when neither imports

The patches change torch for the whole process. They are installed at program start, never on import.
"""

from __future__ import annotations

import collections
import contextlib
import importlib
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

CALLS: collections.Counter[str] = collections.Counter()
"""Number of calls that needed each patch, by name."""

_FACTORIES = (
    *("zeros", "ones", "empty", "full", "zeros_like", "ones_like", "empty_like", "full_like"),
    *("tensor", "as_tensor", "arange", "linspace", "eye", "rand", "randn", "randint"),
)

_MODULES_WITH_LITERAL_CUDA = (
    "dist_checkpointing.exchange_utils",
    "dist_checkpointing.strategies.state_dict_saver",
    "distributed.param_and_grad_buffer",
    "models.common.embeddings.rope_utils",
    "optimizer.clip_grads",
    "optimizer.distrib_optimizer",
    "optimizer.grad_scaler",
    "optimizer.optimizer",
    "pipeline_parallel.schedules",
    "tensor_parallel.data",
    "transformer.utils",
    "utils",
)

_WITHOUT_THEM: dict[str, dict[str, Any]] = {
    "optimizer": {"Adam": torch.optim.AdamW, "SGD": torch.optim.SGD, "USING_PYTORCH_OPTIMIZER": True},
    "optimizer.distrib_optimizer": {
        "Adam": torch.optim.Adam,
        "HAVE_APEX_OR_TE": False,
        "USING_TE_OPTIMIZER": False,
        "USING_APEX_OPTIMIZER": False,
    },
    "optimizer.optimizer": {
        "multi_tensor_applier": "local_multi_tensor_applier",
        "multi_tensor_scale_impl": "local_multi_tensor_scale",
    },
    "optimizer.clip_grads": {
        "multi_tensor_applier": "local_multi_tensor_applier",
        "l2_norm_impl": "local_multi_tensor_l2_norm",
        "multi_tensor_scale_impl": "local_multi_tensor_scale",
        "multi_tensor_scale_tensor_impl": None,  # megatron-core 0.19 has it
    },
    "transformer.moe.moe_utils": {"te_general_gemm": None},
}
"""Attributes of Megatron's modules where neither package of patch F imports; a text names a function of its `utils`."""

_installed = False


def install() -> None:
    """Installs the patches, once per process; a no-op where CUDA is available."""
    global _installed
    if _installed or torch.cuda.is_available():
        return
    _installed = True
    cpu = torch.device("cpu")
    _replace(torch.cuda, "current_device", lambda *args, **kwargs: cpu)
    _replace(torch.cuda, "synchronize", lambda *args, **kwargs: None)
    _replace(torch.cuda, "get_rng_state", lambda *args, **kwargs: torch.get_rng_state())
    _replace(torch.cuda.random, "get_rng_state", lambda *args, **kwargs: torch.get_rng_state())
    stream = _NoStream()
    _replace(torch.cuda, "current_stream", lambda *args, **kwargs: stream)
    _replace(torch.cuda, "default_stream", lambda *args, **kwargs: stream)
    _replace(torch.cuda, "stream", lambda *args, **kwargs: contextlib.nullcontext())
    _replace(torch.Tensor, "cuda", lambda self, *args, **kwargs: self)
    _report_cuda_types_to_the_optimizer()
    _compute_without_other_packages()
    stand_in = _TorchOnCpu()
    for name in _MODULES_WITH_LITERAL_CUDA:
        module = importlib.import_module("megatron.core." + name)
        if getattr(module, "torch", None) is torch:
            module.torch = stand_in  # type: ignore[attr-defined]
    dispatch: Any = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    dispatch.MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = stream  # else it makes one
    _replace(dispatch, "maybe_move_tensor_to_cpu", _counts_on_the_host)
    # The state of the CPU's generator is restored anyway; torch would keep the call, with its stack, for a later CUDA.
    random: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    _replace(random, "_set_cuda_rng_state", lambda *args, **kwargs: None)
    mappings: Any = importlib.import_module("megatron.core.tensor_parallel.mappings")
    mappings._gather_along_first_dim = _gather_in_equal_pieces(mappings._gather_along_first_dim)
    mappings._reduce_scatter_along_first_dim = _reduce_whole(mappings._reduce_scatter_along_first_dim)


def _gather_in_equal_pieces(real: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def gather(piece: torch.Tensor, group: Any, sizes: list[int] | None = None, *args: Any) -> torch.Tensor:
        if sizes is None or group.size() == 1:
            return real(piece, group, sizes, *args)
        CALLS["gather of uneven pieces"] += 1
        padded = piece.new_zeros(max(sizes), *piece.shape[1:])
        padded[: len(piece)] = piece
        pieces = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(pieces, padded, group=group)
        return torch.cat([piece[:size] for piece, size in zip(pieces, sizes, strict=True)])

    return gather


def _reduce_whole(real: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def reduce_scatter(whole: torch.Tensor, group: Any, sizes: list[int] | None = None, *args: Any) -> torch.Tensor:
        if sizes is None or group.size() == 1:
            return real(whole, group, sizes, *args)
        CALLS["reduce-scatter of uneven pieces"] += 1
        total = whole.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total.split(sizes)[group.rank()].clone()

    return reduce_scatter


def _counts_on_the_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Converts a tensor to numpy also on the CPU, unlike Megatron's function; split sizes for gloo must be numbers."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


class _NoStream:
    """A substitute for a CUDA stream on the CPU, where all work is already complete."""

    def wait_stream(self, *args: Any) -> None:
        """Returns at once."""

    def wait_event(self, *args: Any) -> None:
        """Returns at once."""

    def synchronize(self) -> None:
        """Returns at once."""

    def record_event(self, *args: Any) -> _NoStream:
        """Returns itself."""
        return self


class _TorchOnCpu(types.ModuleType):
    """`torch` with tensor factories that read device="cuda" as the CPU and do not pin memory."""

    def __init__(self) -> None:
        super().__init__("torch")
        for name in _FACTORIES:
            self.__dict__[name] = _on_cpu(getattr(torch, name), name)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def __dir__(self) -> list[str]:
        return dir(torch)


def _on_cpu(factory: Callable[..., torch.Tensor], name: str) -> Callable[..., torch.Tensor]:
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            CALLS[f"torch.{name}(device='cuda')"] += 1
            kwargs["device"] = "cpu"
        if kwargs.pop("pin_memory", None):
            CALLS[f"torch.{name}(pin_memory=True)"] += 1
        return factory(*args, **kwargs)

    return make


def _replace(owner: Any, name: str, function: Callable[..., Any]) -> None:
    def counted(*args: Any, **kwargs: Any) -> Any:
        CALLS[f"{getattr(owner, '__name__', owner)}.{name}"] += 1
        return function(*args, **kwargs)

    setattr(owner, name, counted)


def _report_cuda_types_to_the_optimizer() -> None:
    real_type = torch.Tensor.type

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = real_type(self, *args, **kwargs)
        if not args and not kwargs and isinstance(answer, str) and self.device.type == "cpu":
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.startswith("megatron.core.optimizer"):
                CALLS["Tensor.type()"] += 1
                return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    torch.Tensor.type = type_  # type: ignore[method-assign, assignment]


def _compute_without_other_packages() -> None:
    if importlib.import_module("megatron.core.optimizer").USING_PYTORCH_OPTIMIZER:
        return
    CALLS["functions of Transformer Engine or Apex"] += 1
    functions = importlib.import_module("megatron.core.utils")
    for name, values in _WITHOUT_THEM.items():
        module = importlib.import_module("megatron.core." + name)
        for key, value in values.items():
            if hasattr(module, key):
                setattr(module, key, getattr(functions, value) if isinstance(value, str) else value)
