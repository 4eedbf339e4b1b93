"""Sharded state of a learner's weights and optimizer for Megatron's checkpoints, independent of the layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor

from renio_megatron.megatron.model.build import ModelPart
from renio_megatron.megatron.model.lora import is_adapter
from renio_megatron.megatron.runtime.mcore_compat import make_adam_loadable, own_steps
from renio_megatron.megatron.student.learner import MegatronLearner

# The only format of a distributed optimizer's state that loads in any layout: each parameter's moments in its shape.
# Copied at every use, because Megatron adds the current groups to it.
_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}


def sharded_weights(part: ModelPart) -> dict[str, Any]:
    """The weights, a dictionary for each chunk: its names are local, the tensors' own keys are those of the whole
    model.

    Both backends write the same keys. The extra state of Transformer Engine's modules is used under delayed scaling
    only, for its scales; a model with delayed scaling reads no other checkpoint. For a model with adapters these are
    the only weights: the rest comes from the base model.
    """
    keeps_scales = part.config.fp8 is not None and part.config.fp8_recipe == "delayed"
    has_adapters = part.lora.r is not None

    def is_kept(key: str) -> bool:
        return is_adapter(key) if has_adapters else keeps_scales or not key.endswith("_extra_state")

    return _sharded(part, _METADATA, is_kept)


def sharded_model(part: ModelPart, form: dict[str, Any]) -> dict[str, Any]:
    """The weights of the base model alone: without adapters, and without extra state of Transformer Engine's modules.

    Args:
        part: the model.
        form: entries of Megatron's `metadata` that determine a checkpoint's names of layers.
    """
    return _sharded(part, {**_METADATA, **form}, lambda key: not is_adapter(key) and not key.endswith("_extra_state"))


def _sharded(part: ModelPart, metadata: dict[str, Any], is_kept: Callable[[str], bool]) -> dict[str, Any]:
    part.sync_params()
    states = [chunk.sharded_state_dict(metadata=dict(metadata)) for chunk in part.chunks]
    return {
        str(number): {key: value for key, value in state.items() if is_kept(key)} for number, state in enumerate(states)
    }


def restore_weights(part: ModelPart, loaded: dict[str, Any]) -> None:
    """Restores loaded weights; `loaded` has the keys of `sharded_weights`."""
    for number, chunk in enumerate(part.chunks):
        chunk.load_state_dict(loaded[str(number)], strict=False)


Averages = Sequence[tuple[torch.nn.Parameter, torch.Tensor]]
"""Averages of some of a model's parameters, each with its parameter and of the same shape."""

_AVERAGE = "teacher_average"
"""Prefix of the keys of averages; the model's own key of the parameter follows."""


def sharded_averages(weights: dict[str, Any], part: ModelPart, averages: Averages) -> dict[str, Any]:
    """Averages as a checkpoint holds them: sharded and stored once, like the model's parameters.

    Args:
        weights: `sharded_weights` of `part`.
        part: the model.
        averages: each with a parameter of `part`.
    """
    value_of = {id(parameter): value for parameter, value in averages}
    return {
        str(number): {
            name: make_sharded_optimizer_tensor(weights[str(number)][name], value_of[id(parameter)], _AVERAGE)
            for name, parameter in chunk.named_parameters()
            if id(parameter) in value_of
        }
        for number, chunk in enumerate(part.chunks)
    }


@torch.no_grad()
def restore_averages(part: ModelPart, averages: Averages, loaded: dict[str, Any]) -> None:
    """Copies loaded averages to their places; `loaded` has the keys of `sharded_averages`."""
    value_of = {id(parameter): value for parameter, value in averages}
    for number, chunk in enumerate(part.chunks):
        for name, parameter in chunk.named_parameters():
            if id(parameter) in value_of:
                value_of[id(parameter)].copy_(loaded[str(number)][name])


def sharded_state(learner: MegatronLearner, *, loading: bool) -> dict[str, Any]:
    """The state of the model and the optimizer that the ranks write, or with `loading` expect."""
    make_adam_loadable(learner.optimizer)
    model = sharded_weights(learner.part)
    optimizer = learner.optimizer.sharded_state_dict(model, is_loading=loading, metadata=dict(_METADATA))
    return {"model": model, "optimizer": optimizer}


def restore_state(learner: MegatronLearner, loaded: dict[str, Any]) -> None:
    """Restores loaded state; `loaded` has the keys of `sharded_state`."""
    restore_weights(learner.part, loaded["model"])
    learner.optimizer.load_state_dict(loaded["optimizer"])
    own_steps(learner.optimizer)
    learner.spare_rows.keep()
