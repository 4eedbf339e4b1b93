"""Rank and world size of tasks that `srun` started without torchrun, from Slurm's variables. No torch here."""

from __future__ import annotations

import re
from collections.abc import Mapping

from renio_megatron.errors import ConfigError

_FIRST_SPECIAL_STEP = 0xFFFFFFF0
"""First id of Slurm's special steps, such as batch scripts and interactive shells; no rank runs in them."""

_TASK = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST", "SLURM_JOB_ID")
_TORCHRUN = ("RANK", "WORLD_SIZE")


def rank_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Environment variables to add so that this process is a rank; empty where it already is one, or is not a task.

    torchrun's variables take precedence. Otherwise each task of an `srun` with more than one task is a rank and gets
    RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE where Slurm reports it, MASTER_ADDR (the step's first node) and
    MASTER_PORT (from the job id, so that two jobs on a node do not collide). MASTER_ADDR and MASTER_PORT are kept if
    already set.

    Raises:
        ConfigError: only some of the variables are set, or they are not numbers or not a valid place in a world.

    >>> task = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "9", "SLURM_LOCALID": "1"}
    >>> found = rank_variables({**task, "SLURM_STEP_NODELIST": "gpu[03-04]", "SLURM_JOB_ID": "77"})
    >>> found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"], found["MASTER_ADDR"], found["MASTER_PORT"]
    ('9', '16', '1', 'gpu03', '15077')
    """
    given = [name for name in _TORCHRUN if name in environment]
    if len(given) == 1:
        (missing,) = set(_TORCHRUN) - set(given)
        raise ConfigError(
            f"{given[0]} is set and {missing} is not: this looks like half of a rank. Start the ranks by torchrun or "
            f"srun, which set both, or unset {given[0]}."
        )
    for name in given:
        if not environment[name].isdecimal():
            raise ConfigError(f"{name} must be a whole number; got {environment[name]!r}. Unset it, or use torchrun.")
    if given:
        _check_place(environment)
    if given or not _is_task(environment):
        return {}
    missing_names = [name for name in _TASK if not environment.get(name)]
    if missing_names:
        raise ConfigError(
            f"srun started this as one of several tasks, but {', '.join(missing_names)} is not set, so its rank is not "
            "known. A container may have dropped Slurm's variables: let all SLURM_* through, or use torchrun."
        )
    found = {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "MASTER_ADDR": environment.get("MASTER_ADDR") or first_host(environment["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(15000 + int(environment["SLURM_JOB_ID"]) % 15000),
    }
    per_node = environment.get("SLURM_STEP_TASKS_PER_NODE", "")
    if re.fullmatch(r"\d+(\(x\d+\))?", per_node):  # the same number on every node
        found["LOCAL_WORLD_SIZE"] = per_node.partition("(")[0]
    return found


def _check_place(environment: Mapping[str, str]) -> None:
    """Raises `ConfigError` where a rank's variables are inconsistent; torch would wait for ranks that never join."""
    rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    if rank >= size:
        raise ConfigError(
            f"RANK={rank} with WORLD_SIZE={size}: ranks are numbered from 0 to {size - 1}. Correct one of them, or use "
            "torchrun."
        )
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        if not environment.get(name, "0").isdecimal():
            raise ConfigError(f"{name} must be a whole number; got {environment[name]!r}. Unset it, or use torchrun.")
    port = environment.get("MASTER_PORT", "1")
    if port and not (port.isdecimal() and 0 < int(port) < 2**16):
        raise ConfigError(
            f"MASTER_PORT must be a port, 1 to 65535; got {port!r}. Give one that is free on rank 0's node, alike on "
            "all ranks."
        )


def _is_task(environment: Mapping[str, str]) -> bool:
    """Whether srun started this process as one of several tasks; a single task starts its ranks itself."""
    step = environment.get("SLURM_STEP_ID", "")
    if not step.isdecimal() or int(step) >= _FIRST_SPECIAL_STEP:
        return False
    return environment.get("SLURM_STEP_NUM_TASKS") != "1"


def first_host(nodes: str) -> str:
    """The first name of Slurm's list of nodes.

    >>> first_host("gpu[003-010,12],login1"), first_host("a1,a2"), first_host("r[1-2]n[05,7]-ib")
    ('gpu003', 'a1', 'r1n05-ib')
    """
    first = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first)
