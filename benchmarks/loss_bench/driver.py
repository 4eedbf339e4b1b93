"""What the driver and the installed packages say of themselves; without torch."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from importlib import metadata


def ask_driver(fields: Sequence[str]) -> dict[str, str]:
    """These fields of the first GPU, as nvidia-smi names and tells them; nothing where it does not."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:
        return {}
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return dict(zip(fields, values, strict=True)) if done.returncode == 0 and len(values) == len(fields) else {}


def version_of(name: str) -> str | None:
    """Of an installed package; None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
