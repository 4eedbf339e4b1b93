"""Description of the world at a run's start, and warnings about differences between nodes."""

from __future__ import annotations

import os
import platform
import socket
from importlib import metadata

import torch
import torch.distributed as dist

import renio_megatron
from renio_megatron.config import LoraConfig, ParallelConfig, PrecisionConfig
from renio_megatron.megatron.model.backend import describe_backend
from renio_megatron.parallel.collectives import gather_objects
from renio_megatron.parallel.devices import device_name
from renio_megatron.parallel.layout import ParallelLayout


def describe_world(layout: ParallelLayout) -> tuple[str, list[str]]:
    """One line about the world, and a warning for each unexpected difference between nodes; the same on every rank.

    One collective of short strings.

    Args:
        layout: this rank's layout, in the world that was just joined.
    """
    reports = gather_objects(rank_report(layout))
    return world_line(layout, reports), differences(reports)


def rank_report(layout: ParallelLayout) -> tuple[str, str, str]:
    """(node, versions, device) of this rank, as text."""
    return _node(), versions(), device_name(layout.device)


def world_line(layout: ParallelLayout, reports: list[tuple[str, str, str]]) -> str:
    """The line about the world.

    Args:
        layout: the first rank's layout.
        reports: (node, versions, device) of each rank.

    >>> world_line(ParallelLayout(), [("a", "torch 2.13.0", "cpu")])
    'world of 1 rank on 1 node, TP 1 x PP 1 x DP 1; no backend, cpu; torch 2.13.0; rendezvous 0.0 s'
    """
    nodes = len({node for node, _, _ in reports})
    parallel = ParallelConfig(
        tensor_model_parallel_size=layout.tensor.size,
        pipeline_model_parallel_size=layout.pipeline.size,
        context_parallel_size=layout.context.size,
        expert_model_parallel_size=layout.expert_model.size,
    )
    sizes = parallel.describe(layout.data.size * parallel.model_ranks)
    backend = dist.get_backend() if dist.is_initialized() else "no backend"
    return (
        f"world of {_count(layout.world_size, 'rank')} on {_count(nodes, 'node')}, {sizes}; {backend}, "
        f"{reports[0][2]}; {reports[0][1]}; rendezvous {layout.rendezvous_seconds:.1f} s"
    )


def describe_layers(
    student: PrecisionConfig,
    teacher: PrecisionConfig | None,
    device: torch.device,
    *,
    bf16: bool,
    teacher_bf16: bool | None = None,
    has_adapters: bool = False,
) -> str:
    """Backend and precision of the models' layers, also in sampling and scoring.

    Args:
        student: precision of the student.
        teacher: precision of the teacher; None where there is none, or where it is the student without its adapters.
        device: device of both models.
        bf16: whether the student's parameters are bf16.
        teacher_bf16: whether the teacher's parameters are bf16; None: as the student's.
        has_adapters: whether the student has adapters.

    >>> emulated = PrecisionConfig(fp8="e4m3", emulate_fp8=True)
    >>> describe_layers(PrecisionConfig(), emulated, torch.device("cpu"), bf16=False)
    'layers: student local fp32, teacher local fp32 with emulated FP8 e4m3 tensorwise'

    Raises:
        ConfigError: layers that cannot be built here; see `megatron.backend.resolve_backend`.
    """
    text = f"layers: student {describe_backend(student, device, bf16=bf16, has_adapters=has_adapters)}"
    if teacher is None:
        return text
    return f"{text}, teacher {describe_backend(teacher, device, bf16=bf16 if teacher_bf16 is None else teacher_bf16)}"


def describe_trained(lora: LoraConfig) -> str:
    """The trained parameters of the student, in words.

    >>> describe_trained(LoraConfig(r=8, targets=["v_proj", "q_proj"]))
    'adapters alone are trained: r 8, scale 2, on q_proj, v_proj'
    >>> describe_trained(LoraConfig())
    'the whole student is trained'
    """
    if lora.r is None:
        return "the whole student is trained"
    return f"adapters alone are trained: r {lora.r}, scale {lora.scale:g}, on {', '.join(lora.names)}"


def differences(reports: list[tuple[str, str, str]]) -> list[str]:
    """A warning for versions, and one for devices, that differ from the first rank's.

    >>> differences([("a", "torch 1", "cpu"), ("b", "torch 2", "cpu")])
    ['rank 1 on b has torch 2, rank 0 has torch 1: install the same on all nodes.']
    """
    found = []
    for column, advice in ((1, "install the same on all nodes"), (2, "the slowest one sets the pace")):
        for rank, report in enumerate(reports):
            if report[column] != reports[0][column]:
                what = f"rank {rank} on {report[0]} has {report[column]}, rank 0 has {reports[0][column]}"
                found.append(f"{what}: {advice}.")
                break
    return found


def versions() -> str:
    """Versions of this package and of the packages that it computes with."""
    found = {"renio": renio_megatron.__version__, "torch": torch.__version__}
    for package in ("megatron-core", "transformer-engine", "triton"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["CUDA"] = torch.version.cuda
    return ", ".join(f"{name} {version}" for name, version in {**found, "Python": platform.python_version()}.items())


def _node() -> str:
    """The host name, with the launcher's number where several launchers share the host."""
    number = os.environ.get("GROUP_RANK") or os.environ.get("SLURM_NODEID") or "0"
    return f"{socket.gethostname()} (node {number})"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
