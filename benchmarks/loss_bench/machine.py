"""What a figure was measured on."""

from __future__ import annotations

import datetime
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

import renio_megatron
from loss_bench.driver import ask_driver, version_of


def describe(device: torch.device) -> dict[str, Any]:
    """Device, versions, command line and date."""
    found: dict[str, Any] = {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "renio_megatron": renio_megatron.__version__,
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "liger_kernel": version_of("liger-kernel"),
        "cpu": _cpu(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "gpu_bytes": properties.total_memory,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
            "cuda": torch.version.cuda,
            **clocks(),
        }
    return found


def _cpu() -> str:
    """The processor's model."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def clocks() -> dict[str, str]:
    """Driver, clocks and power limit as the driver tells them; nothing where it does not."""
    return ask_driver(("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit"))
