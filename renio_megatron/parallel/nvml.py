"""What NVIDIA's driver says of a machine's GPUs (NVML), without a CUDA context and without torch."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any


def num_gpus() -> int:
    """GPUs of the machine, also those that CUDA_VISIBLE_DEVICES hides; 0 without a driver that works."""
    count = ctypes.c_uint()
    with _nvml() as library:
        if library is None or library.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
            return 0
    return count.value


def compute_capability() -> tuple[int, int] | None:
    """Compute capability of the machine's first GPU; None without a GPU or driver."""
    device, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
    with _nvml() as library:
        failed = library is None or (
            library.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(device))
            or library.nvmlDeviceGetCudaComputeCapability(device, ctypes.byref(major), ctypes.byref(minor))
        )
    return None if failed else (major.value, minor.value)


@contextlib.contextmanager
def _nvml() -> Iterator[Any]:
    """The library, while it is open; None where it is missing or cannot be opened."""
    library = None
    with contextlib.suppress(OSError, AttributeError):
        found = ctypes.CDLL("libnvidia-ml.so.1")
        library = found if found.nvmlInit_v2() == 0 else None
    try:
        yield library
    finally:
        if library is not None:
            library.nvmlShutdown()
