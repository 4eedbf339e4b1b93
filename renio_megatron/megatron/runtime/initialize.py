"""Initialization of a rank: backend, process groups, seeds, and its `ParallelLayout`."""

from __future__ import annotations

import datetime
import importlib
import logging
import os
import socket
import time
import warnings
from dataclasses import replace

import torch
import torch.distributed as dist

from renio_megatron.config import ParallelConfig
from renio_megatron.errors import ConfigError, LayoutError, Scope
from renio_megatron.megatron.runtime import cpu_patches
from renio_megatron.megatron.runtime.cudnn import torchs_cudnn
from renio_megatron.megatron.runtime.process_groups import current_layout, forget_groups, make_groups
from renio_megatron.parallel.devices import backend_and_device, device_identity, refuse_shared_gpus
from renio_megatron.parallel.gloo import share_gloo_device
from renio_megatron.parallel.layout import Axis, ParallelLayout
from renio_megatron.parallel.worlds import WorldBridge, join_two_worlds

logger = logging.getLogger(__name__)


def start(
    parallel: ParallelConfig,
    *,
    seed: int,
    deterministic_mode: bool = False,
    teacher_parallel: ParallelConfig | None = None,
    num_teacher_ranks: int = 0,
) -> ParallelLayout:
    """Initializes torch.distributed and Megatron's process groups; returns this rank's layout.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, as torchrun sets them. May be called again in the
    same process: groups of another layout are then created.

    Args:
        parallel: sizes of the model axes; the data-parallel size is what remains of the world.
        seed: seed of Megatron's random-number trackers.
        deterministic_mode: allow torch and the kernels of the loss only choices that are the same in every run.
        teacher_parallel: layout of the last ranks, which only score, in a separate world; the data-parallel size is
            what remains of them.
        num_teacher_ranks: number of these ranks; 0 where there is no such layout.

    Raises:
        LayoutError: sizes that do not divide the world.
        ConfigError: a broken Transformer Engine, no rendezvous address, GPUs that cannot be used or are shared.
    """
    warnings.filterwarnings("ignore", module=r"megatron\..*")
    check_transformer_engine()
    cpu_patches.install()
    if deterministic_mode:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS when CUDA is first used
        os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"  # read by Transformer Engine's attention
        torch.use_deterministic_algorithms(True)
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    backend, device = backend_and_device(int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        share_gloo_device()
    begin = time.monotonic()
    if not dist.is_initialized():
        _check_address()
        timeout = datetime.timedelta(minutes=parallel.distributed_timeout_minutes)
        try:
            if num_teacher_ranks:
                _bridges[:] = [join_two_worlds(backend, timeout, num_teacher_ranks)]
            else:
                dist.init_process_group(backend, timeout=timeout)
        except (dist.DistError, OSError, ValueError) as error:
            raise ConfigError(_no_meeting(error)) from error
        if device.type == "cuda":
            world = bridge().axis if num_teacher_ranks else Axis(dist.get_world_size(), dist.get_rank())
            store = bridge().store if num_teacher_ranks else dist.distributed_c10d._get_default_store()
            refuse_shared_gpus(store, world.rank, world.size, device_identity(device))
    rendezvous_seconds = time.monotonic() - begin
    world_size, is_teacher_rank = dist.get_world_size(), False
    if num_teacher_ranks:
        assert teacher_parallel is not None
        is_teacher_rank = bridge().axis.rank >= bridge().axis.size - num_teacher_ranks
        parallel = teacher_parallel if is_teacher_rank else parallel
    if world_size % parallel.model_ranks:
        raise LayoutError(
            f"one copy of the model takes {parallel.model_ranks} ranks (tensor x pipeline x context), which does not "
            f"divide the {world_size} ranks of this job. Start a multiple of {parallel.model_ranks}."
        )
    make_groups(parallel)
    # No layer draws from a generator in training (masks of adapters are functions of the token), so the null tracker
    # is enough, on the CPU as well.
    model_parallel_cuda_manual_seed(seed, inference_rng_tracker=True, force_reset_rng=True)
    return replace(current_layout(device, rendezvous_seconds), is_teacher_rank=is_teacher_rank)


_bridges: list[WorldBridge] = []


def bridge() -> WorldBridge:
    """The bridge between the ranks that train and those that only score, where `start` made two worlds of them."""
    return _bridges[0]


def _check_address() -> None:
    """Raises `ConfigError` where an environment variable for the rendezvous is missing or unusable."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if not os.environ.get(name)]
    if missing:
        raise ConfigError(
            f"a rank needs {', '.join(names)}; {', '.join(missing)} is not set. torchrun sets them all, and under srun "
            "renio takes them from Slurm's variables; otherwise set them: the address and a free port of rank 0's node."
        )
    address = os.environ["MASTER_ADDR"]
    try:
        socket.getaddrinfo(address, None)
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"MASTER_ADDR={address} is no address that this node knows ({error}). Give the name or address of rank 0's "
            "node, alike on all ranks."
        ) from error


def _no_meeting(error: Exception) -> str:
    """The message of a failed rendezvous, in one line."""
    place = f"MASTER_ADDR={os.environ['MASTER_ADDR']}, MASTER_PORT={os.environ['MASTER_PORT']}"
    text = " ".join(str(error).split()).partition(" Exception raised from")[0]
    if "EADDRINUSE" in text:
        return (
            f"another program has the port where the ranks should meet ({place}). Set MASTER_PORT to a free one, alike "
            "on all ranks; torchrun and renio find one themselves."
        )
    return (
        f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} did not meet the others ({place}): {text}. All ranks "
        "need the same address and port, which is open on rank 0's node, and have to start within "
        "parallel.distributed_timeout_minutes."
    )


def check_transformer_engine() -> bool:
    """Whether Transformer Engine imports; it is optional.

    Raises:
        ConfigError: it is installed, but broken, or a package that its modules for torch need is missing. The import of
            megatron-core would fail with it.
    """
    try:
        with torchs_cudnn():
            importlib.import_module("transformer_engine")
    except ImportError:
        return False
    except Exception as error:  # half an installation raises RuntimeError, OSError or AttributeError
        raise _broken_transformer_engine("transformer_engine", error) from error
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:
        raise _broken_transformer_engine("transformer_engine.pytorch", error) from error
    return True


def _broken_transformer_engine(name: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"transformer_engine is installed but {name} cannot be imported ({type(error).__name__}: {error}), and "
        "megatron-core imports it where it is there. Uninstall it, or use an image that comes with it.",
        scope=Scope.ALL_RANKS,
    )


def stop() -> None:
    """Destroys the process groups."""
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
    forget_groups()
    _bridges.clear()
