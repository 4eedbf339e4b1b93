"""How a Triton kernel cuts its rows: entries at once, warps, loads under way, and parts of a row.

`triton.autotune` is not used: it runs a kernel many times on its real arguments, and the gradient is written over the
logits; without a driver it raises. Here a kernel is timed on its first rows, with an output of its own.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
import triton

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LaunchConfig:
    """One way to run a kernel: `block` entries at once by `warps` warps, `stages` of loads under way (1: plain loads
    into registers; more go through shared memory)."""

    block: int
    warps: int
    stages: int


FIXED = LaunchConfig(2048, 8, 1)
"""Where nothing is timed: 8 entries a thread, so that all running sums stay in registers and 3 to 8 programs share a
multiprocessor; their loads in flight are what hides the memory's latency."""

CANDIDATES = (
    FIXED,
    LaunchConfig(1024, 4, 1),
    LaunchConfig(4096, 16, 1),
    LaunchConfig(4096, 8, 1),
    LaunchConfig(2048, 8, 3),
    LaunchConfig(4096, 8, 3),
)
"""What is timed. Larger blocks need more entries a thread and leave room for fewer warps: two models' sums at 32
entries a thread fill a thread's registers."""

INTERPRETER_LAUNCH = LaunchConfig(32, 1, 1)
"""In the interpreter: blocks so small that a few columns fill several."""

TRIAL_ENTRIES = 1 << 26
"""Entries of a trial, and from how many on one is worth its seconds: 128 MB in half precision, more than the cache."""

_fastest: dict[Hashable, LaunchConfig] = {}


def choose_launch(
    key: Hashable, rows: int, width: int, device: torch.device, trial: Callable[[LaunchConfig, int], object]
) -> LaunchConfig:
    """The fastest of `CANDIDATES` on a CUDA device, timed at the first large call of each key; `FIXED` for small calls,
    under `torch.use_deterministic_algorithms` (another cut sums in another order) and inside a CUDA graph.

    Args:
        key: what the speed depends on: kernel, variant, dtypes, width. `tune` asks for a run's keys before its first
            step.
        rows, width: of the call, [rows, width] entries.
        trial: runs the kernel with a cut on so many of the rows; nothing but its time is used.
    """
    if device.type != "cuda":
        return INTERPRETER_LAUNCH
    if torch.are_deterministic_algorithms_enabled():
        return FIXED
    key = (device.index, key)
    if key not in _fastest:
        if rows * width < TRIAL_ENTRIES or torch.cuda.is_current_stream_capturing():
            return FIXED
        few = -(-TRIAL_ENTRIES // width)
        _fastest[key] = min(CANDIDATES, key=lambda launch: _milliseconds(functools.partial(trial, launch, few)))
        _log.debug("%s runs as %s", key, _fastest[key])
    return _fastest[key]


def num_tuned() -> int:
    """How many keys have a fastest cut, on all devices."""
    return len(_fastest)


def give_back_memory() -> None:
    """Returns what trials took of a device's memory, which torch keeps for later otherwise."""
    torch.cuda.empty_cache()


def _milliseconds(run: Callable[[], object]) -> float:
    """Median time of `run`; infinity where the device has no room for it."""
    try:
        return triton.testing.do_bench(run, warmup=5, rep=20, return_mode="median")
    except (triton.runtime.errors.OutOfResources, torch.cuda.OutOfMemoryError):
        return float("inf")


def cut_rows(rows: int, width: int, block: int, device: torch.device) -> tuple[int, int]:
    """(parts of a row, blocks of a part), so that the device is full and its last wave of programs small.

    A part costs its share of merging, so that parts are of 4 blocks at least, except where the device would idle.
    """
    blocks = max(1, -(-width // block))
    processors = _processors(device)
    enough = -(-32 * processors // rows)
    parts = max(min(enough, blocks // 4), min(-(-4 * processors // rows), blocks), 1)
    blocks_of_part = -(-blocks // parts)
    return -(-blocks // blocks_of_part), blocks_of_part


@functools.cache
def _processors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; 1 of any other."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
