"""The interface to megatron-core, which no other folder imports.

The rest of the package uses protocols and layouts. The names below are for custom training loops; they are imported,
and Megatron with them, at first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from renio_megatron.megatron.own_loop import LoopBatch, MegatronDistillation, StepWeights, TeacherHidden

_OWN_LOOP = ("LoopBatch", "MegatronDistillation", "StepWeights", "TeacherHidden")
__all__ = ["LoopBatch", "MegatronDistillation", "StepWeights", "TeacherHidden", "run_on_cpu"]


def run_on_cpu() -> None:
    """Makes megatron-core run without a GPU, over gloo; call it before Megatron is imported. A no-op with CUDA."""
    import_module("renio_megatron.megatron.runtime.cpu_patches").install()


def __getattr__(name: str) -> Any:
    if name in _OWN_LOOP:
        return getattr(import_module("renio_megatron.megatron.own_loop"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
