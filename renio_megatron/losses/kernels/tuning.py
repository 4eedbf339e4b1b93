"""Launch configuration of a Triton kernel: block size, warps, pipeline stages, and parts of a row.

`triton.autotune` is not used: it runs a kernel many times on its real arguments, and the gradient is written over the
logits; without a driver it raises. Here a kernel is timed on its first rows, with a separate output.
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
    """One way to run a kernel: `block` entries at once by `warps` warps, `stages` of pipelined loads (1: plain
    loads into registers; more go through shared memory)."""

    block: int
    warps: int
    stages: int


FIXED = LaunchConfig(2048, 8, 1)
"""The configuration where nothing is timed: 8 entries per thread, so that all running sums stay in registers and 3 to 8
programs share a multiprocessor; their loads in flight hide the memory latency."""

CANDIDATES = (
    FIXED,
    LaunchConfig(1024, 4, 1),
    LaunchConfig(4096, 16, 1),
    LaunchConfig(4096, 8, 1),
    LaunchConfig(2048, 8, 3),
    LaunchConfig(4096, 8, 3),
)
"""Configurations that are timed. Larger blocks need more entries per thread and leave room for fewer warps: two models'
sums at 32 entries per thread fill a thread's registers."""

INTERPRETER_LAUNCH = LaunchConfig(32, 1, 1)
"""The configuration in the interpreter: blocks so small that a few columns fill several."""

TRIAL_ENTRIES = 1 << 26
"""Entries of a trial, and the least of a call that is worth timing: 128 MB in half precision, more than the cache."""

_fastest: dict[Hashable, LaunchConfig] = {}


def choose_launch(
    key: Hashable, rows: int, width: int, device: torch.device, trial: Callable[[LaunchConfig, int], object]
) -> LaunchConfig:
    """The fastest of `CANDIDATES` on a CUDA device, timed at the first large call of each key; `FIXED` for small calls,
    under `torch.use_deterministic_algorithms` (another configuration sums in another order) and inside a CUDA graph.

    Args:
        key: everything that the speed depends on: kernel, variant, dtypes, width. `losses.tune_kernels` tunes a run's
            keys before its first step.
        rows, width: shape of the call's logits.
        trial: runs the kernel with a configuration on so many of the rows; only its time is used.
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
    """Number of keys that are tuned, on all devices."""
    return len(_fastest)


def give_back_memory() -> None:
    """Frees the device memory that trials took, which torch would otherwise keep in its cache."""
    torch.cuda.empty_cache()


def _milliseconds(run: Callable[[], object]) -> float:
    """Median time of `run`; infinity where the device has no room for it."""
    try:
        return triton.testing.do_bench(run, warmup=5, rep=20, return_mode="median")
    except (triton.runtime.errors.OutOfResources, torch.cuda.OutOfMemoryError):
        return float("inf")


def cut_rows(rows: int, width: int, block: int, device: torch.device) -> tuple[int, int]:
    """(parts of a row, blocks of a part), so that the device is full and its last wave of programs small.

    Merging costs time for each part, so parts have at least 4 blocks, except where the device would idle.
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
