"""A single cuDNN per process: Transformer Engine uses the one that torch has loaded."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import torch

_MAPS = Path("/proc/self/maps")
_ASKED_FIRST = ("CUDNN_HOME", "CUDNN_PATH")
"""Variables in which Transformer Engine looks for cuDNN before it looks into the CUDA toolkit."""


@contextlib.contextmanager
def torchs_cudnn() -> Iterator[None]:
    """Context for the import of Transformer Engine: CUDNN_HOME is the folder of the cuDNN that torch has loaded.

    Transformer Engine searches the CUDA toolkit before it uses a loaded library. Where the toolkit has another version,
    the process has two; the second cannot load its parts, and attention silently falls back to a matrix of scores that
    is materialized and saved (seen with cuDNN 9.14 in the toolkit and 9.19 with torch). The user's settings are kept.
    """
    folder = None if any(os.environ.get(name) for name in _ASKED_FIRST) else torchs_folder()
    if folder is None:
        yield
        return
    os.environ["CUDNN_HOME"] = folder
    try:
        yield
    finally:
        del os.environ["CUDNN_HOME"]


def torchs_folder() -> str | None:
    """Folder of torch's cuDNN: the loaded one, else the one that torch's package comes with; None without any."""
    if (loaded := loaded_folder(_maps(), "libcudnn.so")) is not None:
        return loaded
    packaged = Path(torch.__file__).parent.parent / "nvidia" / "cudnn" / "lib"
    return str(packaged) if any(packaged.glob("libcudnn.so*")) else None


def _maps() -> str:
    """This process's /proc/self/maps; empty where the system has none."""
    try:
        return _MAPS.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def loaded_folder(maps: str, library: str) -> str | None:
    """Folder of a shared library that a process has loaded, by its /proc/PID/maps; None where there is none of that
    name.

    >>> loaded_folder("7f00-7f10 r-xp 00000000 08:01 42    /site/nvidia/cudnn/lib/libcudnn.so.9\\n", "libcudnn.so")
    '/site/nvidia/cudnn/lib'
    >>> loaded_folder("7f00-7f10 r-xp 00000000 08:01 42    /lib/libcudnn_ops.so.9\\n", "libcudnn.so") is None
    True
    """
    for line in maps.splitlines():
        path = PurePosixPath(line[line.find("/") :]) if "/" in line else None
        if path is not None and (path.name == library or path.name.startswith(f"{library}.")):
            return str(path.parent)
    return None
