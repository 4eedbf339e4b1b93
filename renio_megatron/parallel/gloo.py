"""One thread for all of a process's gloo connections, where torch has one for every process group.

torch gives each gloo group a device of its own, whose thread wakes a hundred times a second, whether anything is sent
or not. Megatron makes about forty groups on each rank: with a few ranks on a laptop, these threads take a good part of
its cores. Gloo itself lets groups share a device.
"""

from __future__ import annotations

import datetime
import os
from typing import Any

from torch.distributed import ProcessGroupGloo, Store, distributed_c10d

_TIMEOUT = datetime.timedelta(minutes=30)
"""torch's own, where no other is given."""

_devices: list[Any] = []


def gloo_group(store: Store, rank: int, size: int, timeout: datetime.timedelta = _TIMEOUT) -> ProcessGroupGloo:
    """A gloo group on the process's devices, which the first call makes. Takes what torch's constructor takes.

    The devices are torch's: one for each interface in GLOO_SOCKET_IFNAME, else that of the host's name.
    """
    if not _devices:
        names = os.environ.get("GLOO_SOCKET_IFNAME", "")
        found = [ProcessGroupGloo.create_device(interface=name) for name in names.split(",")] if names else []
        _devices.extend(found or [ProcessGroupGloo.create_default_device()])
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = timeout
    options._devices = list(_devices)
    options._threads = 2 * len(_devices)
    return ProcessGroupGloo(store, rank, size, options)


class _GlooGroups(type):
    """Makes and recognizes torch's groups, in the place of their class."""

    def __call__(cls, *args: Any, **kwargs: Any) -> ProcessGroupGloo:
        return gloo_group(*args, **kwargs)

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, ProcessGroupGloo)


class _OnOneDevice(metaclass=_GlooGroups):
    """What torch's functions find under the name `ProcessGroupGloo`."""


def share_gloo_device() -> None:
    """Lets all gloo groups that torch makes from now on share one device; to be called before the first is made."""
    distributed_c10d.ProcessGroupGloo = _OnOneDevice  # type: ignore[misc, assignment]
