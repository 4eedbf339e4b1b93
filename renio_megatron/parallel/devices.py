"""The device of a rank: its own GPU, or the CPU where no GPU is meant."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from renio_megatron.errors import ConfigError, Scope
from renio_megatron.parallel.nvml import num_gpus

_NO_DEVICE = ("", "-1", "NoDevFiles")
"""Values of CUDA_VISIBLE_DEVICES that hide all GPUs."""
_INSTEAD = "or set device=cpu, to run on the CPU"


def backend_and_device(local_rank: int) -> tuple[str, torch.device]:
    """Backend and device of a rank: NCCL on its own GPU where CUDA is, else gloo on the CPU.

    Raises:
        ConfigError: GPUs are meant, and cannot be used.
    """
    if torch.cuda.is_available():
        return "nccl", torch.device("cuda", local_rank % torch.cuda.device_count())
    if (problem := unusable_gpus(os.environ)) is not None:
        raise ConfigError(problem, scope=Scope.ALL_RANKS)
    return "gloo", torch.device("cpu")


def unusable_gpus(environment: Mapping[str, str]) -> str | None:
    """Why GPUs that somebody means cannot be used, where torch sees none; None where a CPU is meant.

    They are meant where CUDA_VISIBLE_DEVICES names one; or where the machine has some, and this torch is built for
    them: one without CUDA was chosen for the CPU.
    """
    named = environment.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        if named.strip() in _NO_DEVICE:
            return None
        who = f"CUDA_VISIBLE_DEVICES={named} names a GPU"
    elif torch.version.cuda is not None and (count := num_gpus() or _num_device_files()):
        who = f"this machine has {count} GPU{'s' * (count > 1)}"
    else:
        return None
    if torch.version.cuda is None:
        return (
            f"{who}, and this torch ({torch.__version__}) is built without CUDA. Install one that has it "
            f"(docs/guides/install.md), {_INSTEAD}."
        )
    return (
        f"{who}, and CUDA finds none that it can use ({_reason()}). Compare the driver with what torch "
        f"{torch.__version__} needs (`nvidia-smi`), {_INSTEAD}."
    )


def _reason() -> str:
    """Why CUDA does not start, in one line."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return " ".join(str(error).split()).partition(" Please check")[0]
    return "torch.cuda.is_available() is False"


def _num_device_files() -> int:
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def refuse_shared_gpus(store: dist.Store, rank: int, size: int, identity: str) -> None:
    """Raises `ConfigError` on every rank where two of them have the same GPU.

    They exchange it through a store, because the first NCCL operation would fail.

    Args:
        store: one that all ranks share.
        rank, size: this rank of how many.
        identity: `device_identity` of its device.
    """
    store.set(f"renio_gpu/{rank}", identity)
    if rank == 0:
        found = [store.get(f"renio_gpu/{other}").decode() for other in range(size)]
        store.set("renio_gpu/shared", _shared(found))
    if text := store.get("renio_gpu/shared").decode():
        raise ConfigError(text, scope=Scope.ALL_RANKS)


def _shared(identities: Sequence[str]) -> str:
    """A message about the first two ranks with one GPU; empty where each has its own, or none.

    >>> _shared(["GPU-1", "GPU-2"]), _shared(["", ""])
    ('', '')
    """
    for rank, identity in enumerate(identities):
        first = identities.index(identity)
        if identity and first != rank:
            return (
                f"ranks {first} and {rank} have the same GPU ({identity}): a node has more ranks than GPUs, or "
                f"LOCAL_RANK is wrong. Start one rank for each GPU (--nproc, torchrun's --nproc-per-node), {_INSTEAD}."
            )
    return ""


def device_name(device: torch.device) -> str:
    """Name of the device, with its memory in GiB where it is a GPU.

    >>> device_name(torch.device("cpu"))
    'cpu'
    """
    if device.type != "cuda":
        return device.type
    return (
        f"{torch.cuda.get_device_name(device)}, {torch.cuda.get_device_properties(device).total_memory / 2**30:.0f} GiB"
    )


def device_identity(device: torch.device) -> str:
    """Identifier of a GPU within its node; empty on a CPU, which ranks may share.

    >>> device_identity(torch.device("cpu"))
    ''
    """
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""
