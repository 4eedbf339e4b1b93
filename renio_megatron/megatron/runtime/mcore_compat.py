"""Compatibility with versions of megatron-core: differences and workarounds, each with its reason.

| what | 0.16.1 | 0.19.2 |
|---|---|---|
| patches of `cpu_patches.py` | all but streams | also streams: DDP's buffers use the current one |
| `finalize_model_grads(num_tokens)` | divides by a float above 0 | clamps it at 1 first; never used here |
| Adam's `step` in a distributed optimizer's checkpoint | see `make_adam_loadable`, `own_steps` | the same |
| deprecation messages on stderr | few | more; `cli/launch.py` sets their loggers to errors |
| a checkpoint's state that is independent of ranks | in `common.pt` | with the tensors, as `common_state` |
| writer of an asynchronous checkpoint | Megatron itself | nvidia-resiliency-ext, unless set: `own_writer` |
| the router's product without Transformer Engine | a NameError: `define_missing_gemm` | plain torch |
| `AsyncCallsQueue(persistent=True)` | hangs without CUDA | not used |
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.transformer.moe import moe_utils


def own_writer() -> dict[str, str]:
    """Arguments of `dist_checkpointing.save` that select Megatron's own writer, where this must be set."""
    told = "async_strategy" in inspect.signature(dist_checkpointing.save).parameters
    return {"async_strategy": "mcore"} if told else {}


def define_missing_gemm() -> None:
    """Defines `te_general_gemm` as None where Megatron's router reads that name without having imported it.

    It evaluates `te_general_gemm is not None`, on a GPU as on a CPU.
    """
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def make_adam_loadable(optimizer: Any) -> None:
    """Fills two gaps between Megatron's distributed optimizer and torch's AdamW, which is used without apex and TE.

    Before the first step AdamW has no state, and Megatron reads the `step` in it; and when loading, Megatron copies
    every entry of the state from tensors that do not hold `step`, which is stored in the parameter groups instead. With
    the optimizers of apex and Transformer Engine neither applies.

    Args:
        optimizer: result of `get_megatron_optimizer`.
    """
    for one, inner in _distributed_adams(optimizer):
        for group in inner.param_groups:
            for parameter in group["params"]:
                if not inner.state[parameter]:
                    inner.state[parameter] = {
                        "step": torch.zeros((), dtype=torch.float32),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }
        if not hasattr(one, "_renio_set_states"):
            one._renio_set_states = one._set_main_param_and_optimizer_states
            one._set_main_param_and_optimizer_states = functools.partial(_set_with_step, one)


def own_steps(optimizer: Any) -> None:
    """Gives every parameter a separate `step` after loading.

    Megatron puts one tensor into the state of all of them, and AdamW increments it once for each: after one step a
    resumed run would apply the bias correction of hundreds of steps.
    """
    for _, inner in _distributed_adams(optimizer):
        for state in inner.state.values():
            state["step"] = state["step"].clone()


def _distributed_adams(optimizer: Any) -> Iterator[tuple[Any, torch.optim.Optimizer]]:
    """Megatron's distributed optimizers that are built on torch's AdamW, each with its AdamW."""
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = getattr(one, "optimizer", None)
        is_distributed = hasattr(one, "_set_main_param_and_optimizer_states")
        if is_distributed and isinstance(inner, (torch.optim.Adam, torch.optim.AdamW)):
            yield one, inner


def _set_with_step(optimizer: Any, model_param: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
    """Megatron's loader of one parameter's state, with the `step` that it looks up."""
    group, order = optimizer.model_param_group_index_map[model_param]
    state = optimizer.optimizer.state[optimizer.optimizer.param_groups[group]["params"][order]]
    if "step" in state:
        tensors = {**tensors, "step": state["step"]}
    optimizer._renio_set_states(model_param, tensors)
