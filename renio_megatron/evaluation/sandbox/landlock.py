"""Landlock: what a program may do with files, TCP ports, and processes outside its domain."""

from __future__ import annotations

import ctypes
import os
import stat
import struct

from renio_megatron.evaluation.sandbox import kernel

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # on every architecture
_ASK_VERSION = 1
_PATH_BENEATH = 1

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIRECTORY = 1, 2, 4, 8
_OF_THE_FIRST = (1 << 13) - 1
_REFER, _TRUNCATE, _IOCTL_DEVICE = 1 << 13, 1 << 14, 1 << 15
_SINCE = {1: _OF_THE_FIRST, 2: _REFER, 3: _TRUNCATE, 5: _IOCTL_DEVICE}  # version of the interface: rights
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEVICE
_TCP = 3  # bind and connect
_SCOPES = 3  # abstract UNIX sockets and signals
READ = _EXECUTE | _READ_FILE | _READ_DIRECTORY
DEVICE = _READ_FILE | _WRITE_FILE
EVERYTHING = (1 << 16) - 1


def version() -> int:
    """The version of the kernel's Landlock interface.

    Raises:
        OSError: the kernel has none, or it is switched off.
    """
    return kernel.call("syscall", _CREATE_RULESET, None, 0, _ASK_VERSION, what="Landlock")


def confine(allowed: dict[str, int], abi: int) -> int:
    """Prepares a domain in which every right that is known is denied but on what `allowed` names.

    Args:
        allowed: path -> rights there and below, such as `READ`.
        abi: version of the interface whose rights are used.

    Returns:
        A descriptor for `enter`, so that files are looked up before the uid is dropped.

    Raises:
        OSError: the kernel refuses, or a path is not there.
    """
    known = 0
    for since, rights in _SINCE.items():
        known |= rights if since <= abi else 0
    attributes = struct.pack("=QQQ", known, _TCP, _SCOPES)[: 8 if abi < 4 else 16 if abi < 6 else 24]
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    what = "making a Landlock ruleset"
    ruleset = kernel.call("syscall", _CREATE_RULESET, buffer, len(attributes), 0, what=what)
    for path, rights in allowed.items():
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            rights &= _OF_FILES
        rule = ctypes.create_string_buffer(struct.pack("=Qi", rights & known, descriptor), 12)
        kernel.call("syscall", _ADD_RULE, ruleset, _PATH_BENEATH, rule, 0, what=f"allowing {path} in Landlock")
        os.close(descriptor)
    return ruleset


def enter(ruleset: int) -> None:
    """Confines this process, and all that it starts, for good; no_new_privs must be set.

    Raises:
        OSError: the kernel refuses.
    """
    kernel.call("syscall", _RESTRICT_SELF, ruleset, 0, what="entering the Landlock domain")
    os.close(ruleset)
