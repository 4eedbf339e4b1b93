"""Runs in which a part of the ranks only scores, one after the other in one launch."""

from __future__ import annotations

import contextlib
import os
import random
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from renio_megatron.config.schema import DistillationConfig
from renio_megatron.config.teachers import teacher_parallel


def on_scoring_ranks(
    runs: Mapping[str, DistillationConfig],
    folder: Path,
    *,
    train: Callable[[DistillationConfig], Any],
    serve: Callable[[list[Any], Any], Any],
) -> dict[str, Any]:
    """What each run gives on this rank, by name.

    Every run has a world of its own, at a port of its own; afterwards the test's is joined again.

    Args:
        runs: by name.
        folder: for a file that the ranks meet at; on every rank the same.
        train: (config) -> what a rank that trains gives.
        serve: (teachers, layout) -> what one that only scores gives, after it has answered until the others are done.
    """
    from renio_megatron.megatron.runtime.initialize import start, stop
    from renio_megatron.runner.build_teachers import build_teacher_servers
    from renio_megatron.runner.inputs import read_inputs

    found: dict[str, Any] = {}
    port, world_size, ports = os.environ["MASTER_PORT"], dist.get_world_size(), _free_ports(len(runs))
    dist.broadcast_object_list(ports, src=0)
    dist.destroy_process_group()
    for own_port, (name, config) in zip(ports, runs.items(), strict=True):
        os.environ["MASTER_PORT"] = str(own_port)
        layout = start(
            config.parallel,
            seed=config.train.seed,
            teacher_parallel=teacher_parallel(config.parallel, config.teacher),
            num_teacher_ranks=config.num_teacher_ranks,
        )
        if layout.is_teacher_rank:
            found[name] = serve(build_teacher_servers(config, read_inputs(config), layout), layout)
        else:
            found[name] = train(config)
        stop()
    os.environ["MASTER_PORT"] = port
    store = dist.FileStore(str(folder / f"after {ports[0]}"), world_size)
    dist.init_process_group("gloo", store=store, rank=int(os.environ["RANK"]), world_size=world_size)
    return found


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens at; below those from which the system serves whoever connects to somewhere."""
    found: list[int] = []
    for port in random.SystemRandom().sample(range(16000, 32000), 1000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            found.append(port)
        if len(found) == count:
            break
    return found


def answer(teachers: list[Any]) -> int:
    """Serves until the ranks that train are done; the number of calls that were answered."""
    from renio_megatron.runner.run import _serve

    calls = 0
    while _serve(teachers):
        calls += 1
    return calls
