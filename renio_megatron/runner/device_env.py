"""CUDA and NCCL environment variables for the hardware and the layout, each with its reason.

CUDA reads them on first use, so they are set before any code uses a GPU, and the compute capability is queried from
the driver (`parallel.nvml`), which creates no CUDA context.
"""

from __future__ import annotations

import logging
import os
from collections.abc import MutableMapping
from dataclasses import dataclass

from renio_megatron.config.schema import JobConfig
from renio_megatron.parallel.nvml import compute_capability

logger = logging.getLogger(__name__)
BLACKWELL = (10, 0)
"""Compute capability from which on CUDA keeps the order of kernel launches without CUDA_DEVICE_MAX_CONNECTIONS=1."""


@dataclass(frozen=True)
class Variable:
    """One environment variable.

    Attributes:
        name, value: the variable and its value; value None: it must not be "1".
        reason: the reason, for the user.
    """

    name: str
    value: str | None
    reason: str


def hardware_variables(
    capability: tuple[int, int] | None,
    *,
    tensor_size: int,
    context_size: int,
    uses_fsdp: bool = False,
    is_deterministic: bool = False,
) -> tuple[Variable, ...]:
    """The variables that a rank needs; none without a GPU.

    Args:
        capability: compute capability of the GPUs, for example (9, 0) for an H100; None: there is no GPU.
        tensor_size, context_size: tensor-parallel and context-parallel size.
        uses_fsdp: whether parameters are sharded by FSDP, which gathers them while it computes.
        is_deterministic: whether runs must be bitwise reproducible.
    Source: the checks of Megatron-LM's arguments, and its comments on overlap in the tensor-parallel layers.

    >>> [(v.name, v.value) for v in hardware_variables((9, 0), tensor_size=2, context_size=1)]
    [('CUDA_DEVICE_MAX_CONNECTIONS', '1')]
    >>> hardware_variables((10, 0), tensor_size=2, context_size=1)
    ()
    """
    if capability is None:
        return ()
    found = []
    if uses_fsdp:
        reason = "FSDP gathers parameters beside the computation, which takes more than one hardware queue"
        found.append(Variable("CUDA_DEVICE_MAX_CONNECTIONS", None, reason))
    elif capability < BLACKWELL and (tensor_size > 1 or context_size > 1):
        reason = (
            "before Blackwell, only one hardware queue starts a tensor- or context-parallel collective before the "
            "matrix product that it overlaps with"
        )
        found.append(Variable("CUDA_DEVICE_MAX_CONNECTIONS", "1", reason))
    if is_deterministic:
        reason = "sums inside NVLink switches do not give the same bits each time"
        found.append(Variable("NCCL_ALGO", "^NVLS", reason))
    return tuple(found)


def set_variables(variables: tuple[Variable, ...], environment: MutableMapping[str, str]) -> list[str]:
    """Sets the unset variables; different values set by the user are kept, with a returned warning for each.

    >>> wanted, mine = (Variable("NCCL_ALGO", "^NVLS", "the bits differ"),), {"NCCL_ALGO": "Ring"}
    >>> set_variables(wanted, mine)
    ['NCCL_ALGO=Ring is kept, where ^NVLS is advised: the bits differ. Unset it if that was not meant.']
    """
    warnings = []
    for variable in variables:
        present = environment.get(variable.name)
        if present is None:
            if variable.value is not None:
                environment[variable.name] = variable.value
        elif present == "1" if variable.value is None else present != variable.value:
            advised = "another value, or none," if variable.value is None else variable.value
            warnings.append(
                f"{variable.name}={present} is kept, where {advised} is advised: {variable.reason}. "
                "Unset it if that was not meant."
            )
    return warnings


def use_device(device: str | None) -> None:
    """Hides all GPUs from this process where `device` is `cpu`; must come before CUDA is used."""
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def set_hardware_variables_of(config: JobConfig) -> None:
    """Sets CUDA's and NCCL's variables that the user has not set, before CUDA is used; warns about conflicts."""
    use_device(config.device)
    variables = hardware_variables(
        None if config.device == "cpu" else compute_capability(),
        tensor_size=config.parallel.tensor_model_parallel_size,
        context_size=config.parallel.context_parallel_size,
        is_deterministic=config.train.deterministic_mode,
    )
    for warning in set_variables(variables, os.environ):
        if int(os.environ.get("RANK", "0")) == 0:
            logger.warning(warning)
