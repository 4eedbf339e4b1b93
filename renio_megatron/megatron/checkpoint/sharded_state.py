"""A learner's weights and optimizer state as Megatron's checkpoints hold them: by parameter, whatever the layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor

from renio_megatron.megatron.model.build import ModelPart
from renio_megatron.megatron.model.lora import is_adapter
from renio_megatron.megatron.runtime.mcore_compat import make_adam_loadable, own_steps
from renio_megatron.megatron.student.learner import MegatronLearner

# The only form of a distributed optimizer's state that loads in any layout: each parameter's moments in its own shape.
# Copied at every use, because Megatron adds the present groups to it.
_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}


def sharded_weights(part: ModelPart) -> dict[str, Any]:
    """The weights, a dictionary for each chunk: names are local in it, the tensors' own keys are the whole model's.

    Both backends write the same keys. What Transformer Engine's modules add to them holds something under delayed
    scaling only, its scales; a model with delayed scaling reads no other checkpoint. Of a model with adapters they are
    those alone: the rest is what it was loaded from.
    """
    keeps_scales = part.config.fp8 is not None and part.config.fp8_recipe == "delayed"
    has_adapters = part.lora.r is not None

    def is_kept(key: str) -> bool:
        return is_adapter(key) if has_adapters else keeps_scales or not key.endswith("_extra_state")

    return _sharded(part, _METADATA, is_kept)


def sharded_model(part: ModelPart, form: dict[str, Any]) -> dict[str, Any]:
    """The same of the model alone: without adapters, and without what Transformer Engine's modules add.

    Args:
        part: the model.
        form: entries of Megatron's `metadata` that say under which names a checkpoint keeps layers.
    """
    return _sharded(part, {**_METADATA, **form}, lambda key: not is_adapter(key) and not key.endswith("_extra_state"))


def _sharded(part: ModelPart, metadata: dict[str, Any], is_kept: Callable[[str], bool]) -> dict[str, Any]:
    part.sync_params()
    states = [chunk.sharded_state_dict(metadata=dict(metadata)) for chunk in part.chunks]
    return {
        str(number): {key: value for key, value in state.items() if is_kept(key)} for number, state in enumerate(states)
    }


def restore_weights(part: ModelPart, loaded: dict[str, Any]) -> None:
    """Puts loaded weights back; `loaded` has the keys of `sharded_weights`."""
    for number, chunk in enumerate(part.chunks):
        chunk.load_state_dict(loaded[str(number)], strict=False)


Averages = Sequence[tuple[torch.nn.Parameter, torch.Tensor]]
"""Values beside some of a model's parameters, each of its parameter's shape."""

_AVERAGE = "teacher_average"
"""What the keys of averages begin with; the model's own key of the parameter follows."""


def sharded_averages(weights: dict[str, Any], part: ModelPart, averages: Averages) -> dict[str, Any]:
    """Averages as a checkpoint holds them: cut, and kept once, as the model's parameters are.

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
    """What the ranks write, or with `loading` expect, of the model and the optimizer."""
    make_adam_loadable(learner.optimizer)
    model = sharded_weights(learner.part)
    optimizer = learner.optimizer.sharded_state_dict(model, is_loading=loading, metadata=dict(_METADATA))
    return {"model": model, "optimizer": optimizer}


def restore_state(learner: MegatronLearner, loaded: dict[str, Any]) -> None:
    """Puts loaded state back; `loaded` has the keys of `sharded_state`."""
    restore_weights(learner.part, loaded["model"])
    learner.optimizer.load_state_dict(loaded["optimizer"])
    own_steps(learner.optimizer)
    learner.spare_rows.keep()
