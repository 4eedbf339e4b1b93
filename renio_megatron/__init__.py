"""On-policy distillation with ReNIO sample weights on Megatron-core.

The names below are the public interface for custom training loops; importing them does not import Megatron. They are
imported lazily, so that `renio --help` does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from renio_megatron.config import LossConfig, WeightingConfig
    from renio_megatron.losses.distillation import DistillationOutput, distillation_loss
    from renio_megatron.losses.linear_distillation import linear_distillation_loss
    from renio_megatron.losses.sample_weights import sample_weights
    from renio_megatron.objective.reference import reference_objective
    from renio_megatron.parallel.vocab import VocabShard, gather_sequence, reshard_rows

__version__ = "0.1.0"

_HOMES = {
    "DistillationOutput": "renio_megatron.losses.distillation",
    "distillation_loss": "renio_megatron.losses.distillation",
    "linear_distillation_loss": "renio_megatron.losses.linear_distillation",
    "sample_weights": "renio_megatron.losses.sample_weights",
    "reference_objective": "renio_megatron.objective.reference",
    "VocabShard": "renio_megatron.parallel.vocab",
    "gather_sequence": "renio_megatron.parallel.vocab",
    "reshard_rows": "renio_megatron.parallel.vocab",
    "LossConfig": "renio_megatron.config",
    "WeightingConfig": "renio_megatron.config",
}
__all__ = [
    "DistillationOutput",
    "LossConfig",
    "VocabShard",
    "WeightingConfig",
    "distillation_loss",
    "gather_sequence",
    "linear_distillation_loss",
    "reference_objective",
    "reshard_rows",
    "sample_weights",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
