"""Megatron's process groups, which are globals of one module, for one layout or two.

Megatron looks its groups up at every use, also in code that takes no group as an argument (attention with fewer
key-value heads than tensor ranks, the embedding, the schedules). So a second model's layout is not passed as an
argument; its groups replace the globals while that model is built or runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from renio_megatron.config import ParallelConfig
from renio_megatron.parallel.layout import Axis, ParallelLayout

_pristine: dict[str, Any] = {}
_known: dict[tuple[Any, ...], dict[str, Any]] = {}
"""Groups of layouts in addition to the first one, by world and sizes: torch does not free groups."""


def make_groups(parallel: ParallelConfig) -> None:
    """Creates Megatron's groups of a layout, which replace those of another one.

    torch does not free groups, so a second run in the same layout reuses those of the first.
    """
    from megatron.core import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        _pristine.update(_globals(parallel_state))
    elif _sizes(parallel) == _present_sizes():
        return
    else:
        parallel_state.destroy_model_parallel()
    _initialize(parallel)


def current_layout(device: torch.device, rendezvous_seconds: float = 0.0) -> ParallelLayout:
    """This rank's layout in the current groups."""
    from megatron.core import parallel_state

    return ParallelLayout(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tensor=_axis(parallel_state.get_tensor_model_parallel_group()),
        pipeline=_axis(parallel_state.get_pipeline_model_parallel_group()),
        data=_axis(parallel_state.get_data_parallel_group()),
        context=_axis(parallel_state.get_context_parallel_group()),
        expert_model=_axis(parallel_state.get_expert_model_parallel_group()),
        expert_tensor=_axis(parallel_state.get_expert_tensor_parallel_group()),
        expert_data=_axis(parallel_state.get_expert_data_parallel_group()),
        expert_tensor_and_model=_axis(parallel_state.get_expert_tensor_and_model_parallel_group()),
        device=device,
        rendezvous_seconds=rendezvous_seconds,
    )


@dataclasses.dataclass(frozen=True)
class Place:
    """A second layout in addition to the current one.

    Attributes:
        layout: this rank's position in it.
        state: Megatron's globals for it.
    """

    layout: ParallelLayout
    state: dict[str, Any]

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Context in which its groups are the current ones. No backward pass of the other model may run inside."""
        from megatron.core import parallel_state

        before = _globals(parallel_state)
        vars(parallel_state).update(self.state)
        try:
            yield
        finally:
            vars(parallel_state).update(before)


def make_place(parallel: ParallelConfig, device: torch.device) -> Place:
    """A second layout of the same ranks; every rank calls this at the same time, after `make_groups`.

    Args:
        parallel: its sizes, which divide the world.
        device: this rank's device.
    """
    from megatron.core import parallel_state

    key = (dist.group.WORLD, *_sizes(parallel).items())
    with Place(current_layout(device), _known.get(key, _pristine)).entered():
        if key not in _known:
            _initialize(parallel)
            _known[key] = _globals(parallel_state)
        return Place(current_layout(device), _known[key])


def forget_groups() -> None:
    """Clears the records of groups after the world is destroyed."""
    _known.clear()


def _initialize(parallel: ParallelConfig) -> None:
    from megatron.core import parallel_state

    minutes = parallel.distributed_timeout_minutes
    parallel_state.initialize_model_parallel(**_sizes(parallel), distributed_timeout_minutes=minutes)


def _globals(module: ModuleType) -> dict[str, Any]:
    """The module's private variables, which hold its groups and sizes."""
    return {
        name: value
        for name, value in vars(module).items()
        if name.startswith("_") and not name.startswith("__") and not callable(value)
    }


def _sizes(parallel: ParallelConfig) -> dict[str, int]:
    return {
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "context_parallel_size": parallel.context_parallel_size,
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": parallel.expert_tensor_ranks,
    }


def _present_sizes() -> dict[str, int]:
    from megatron.core import parallel_state

    return {
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "context_parallel_size": parallel_state.get_context_parallel_world_size(),
        "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
        "expert_tensor_parallel_size": parallel_state.get_expert_tensor_parallel_world_size(),
    }


def _axis(group: dist.ProcessGroup) -> Axis:
    return Axis(group.size(), group.rank(), group, tuple(dist.get_process_group_ranks(group)))
