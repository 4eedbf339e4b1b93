"""What the measurements were made with."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from gpu_check.record import now
from loss_bench.driver import ask_driver, version_of

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    *("torch", "triton", "megatron-core", "transformers", "numpy", "transformer-engine", "liger-kernel"),
    *("nvidia-cudnn-cu13", "nvidia-cublas", "nvidia-nccl-cu13"),
)
FIELDS = ("name", "driver_version", "memory.total", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit")
"""What the driver is asked for."""


def header(command: str, *, toy: bool) -> dict[str, Any]:
    """The facts of a stage's file."""
    told = ask_driver(FIELDS)
    versions = {name: found for name in PACKAGES if (found := version_of(name)) is not None}
    gpu, driver = told.pop("name", None), told.pop("driver_version", None)
    return {
        "commit": commit(),
        "gpu": None if toy else gpu,
        "driver": driver,
        "versions": {"python": platform.python_version(), **versions},
        "machine": {"cpu_count": os.cpu_count(), **told},
        "command": command,
        "date": now()[:10],
        "toy": toy,
    }


def commit() -> str:
    """What GPU_CHECK_COMMIT says; else the checkout's commit, with a digest of what differs from it; else unknown.

    A copy of the files without git's own folder cannot know it.
    """
    if given := os.environ.get("GPU_CHECK_COMMIT"):
        return given
    try:
        name = _git("rev-parse", "--short=12", "HEAD").decode().strip()
        difference = _git("diff", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return f"{name}-dirty-{hashlib.sha256(difference).hexdigest()[:8]}" if difference else name


def _git(*arguments: str) -> bytes:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, timeout=20, check=True).stdout
