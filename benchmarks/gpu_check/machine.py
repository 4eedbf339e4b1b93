"""What the measurements were made with."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from gpu_check.record import now

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    *("torch", "triton", "megatron-core", "transformers", "numpy", "transformer-engine", "liger-kernel"),
    *("nvidia-cudnn-cu13", "nvidia-cublas", "nvidia-nccl-cu13"),
)


def header(command: str, *, toy: bool) -> dict[str, Any]:
    """The facts of a stage's file."""
    gpu, driver, more = _gpu()
    return {
        "commit": commit(),
        "gpu": None if toy else gpu,
        "driver": driver,
        "versions": {"python": platform.python_version(), **_versions()},
        "machine": {"cpu_count": os.cpu_count(), **more},
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


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _gpu() -> tuple[str | None, str | None, dict[str, str]]:
    """Name, driver, and clocks and power limit as the driver tells them."""
    fields = ("name", "driver_version", "memory.total", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit")
    if shutil.which("nvidia-smi") is None:
        return None, None, {}
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:
        return None, None, {}
    values = [value.strip() for value in done.stdout.strip().split(",")]
    if done.returncode != 0 or len(values) != len(fields):
        return None, None, {}
    told = dict(zip(fields, values, strict=True))
    return told.pop("name"), told.pop("driver_version"), told
