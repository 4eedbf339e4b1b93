"""On-policy distillation with ReNIO sample weights on Megatron-core.

The names below are the public interface for people with a training loop of their own; importing them does not import
Megatron. They are looked up on first use, so that `renio --help` does not pay for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from renio_megatron.config import LossConfig, WeightingConfig
    from renio_megatron.losses.distillation import DistillationOutput, distillation_loss
    from renio_megatron.losses.linear_distillation import linear_distillation_loss
    from renio_megatron.parallel.vocab import VocabShard

__version__ = "0.1.0"

_HOMES = {
    "DistillationOutput": "renio_megatron.losses.distillation",
    "distillation_loss": "renio_megatron.losses.distillation",
    "linear_distillation_loss": "renio_megatron.losses.linear_distillation",
    "VocabShard": "renio_megatron.parallel.vocab",
    "LossConfig": "renio_megatron.config",
    "WeightingConfig": "renio_megatron.config",
}
__all__ = [
    "DistillationOutput",
    "LossConfig",
    "VocabShard",
    "WeightingConfig",
    "distillation_loss",
    "linear_distillation_loss",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
