"""What a Python program needs of this machine: the interpreter, the standard library, installed packages."""

from __future__ import annotations

import functools
import os
import sys
import sysconfig
from pathlib import Path

_SYSTEM = (
    *("/lib", "/lib32", "/lib64", "/libx32", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/libx32"),
    *("/nix/store", "/etc/ld.so.cache", "/etc/alternatives", "/usr/share/zoneinfo"),
)
"""The dynamic loader and what it loads, with what their links lead through; time zones."""
_PROCESSOR_SETTINGS = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
"""Variables that make a library work on this machine's processor."""


@functools.cache
def interpreter() -> tuple[Path, Path]:
    """The base interpreter's file and its prefix, links resolved: a virtual environment's is a link to it.

    Raises:
        OSError: this Python does not know where it lies.
    """
    if not sys.executable:
        raise OSError("this Python does not know its own file (sys.executable is empty)")
    return Path(sys.executable).resolve(strict=True), Path(sys.base_prefix).resolve(strict=True)


def sites() -> list[str]:
    """Directories of installed packages on sys.path, links resolved, in their order.

    The caller's own code is not among them: neither its working directory nor its home, nor a path without packages.
    """
    return _sites(tuple(sys.path), os.path.realpath("."), os.path.realpath(os.path.expanduser("~")))


@functools.lru_cache(maxsize=8)
def _sites(entries: tuple[str, ...], *callers: str) -> list[str]:
    found = []
    for entry in entries:
        path = Path(entry).resolve()
        if not path.is_dir() or str(path) in (*callers, "/"):
            continue
        if path.name in ("site-packages", "dist-packages") or next(path.glob("*.dist-info"), None) is not None:
            found.append(str(path))
    return list(dict.fromkeys(found))


def binds() -> list[tuple[str, str]]:
    """(path, path in the program's root) of files and directories, those around others first.

    The first is real but for links at the top such as /lib, which are links there as well.
    """
    return _binds(tuple(sites()))


@functools.lru_cache(maxsize=8)
def _binds(packages: tuple[str, ...]) -> list[tuple[str, str]]:
    executable, prefix = interpreter()
    wanted = [path for path in map(Path, _SYSTEM) if path.exists()]
    paths = sysconfig.get_paths()
    for place in {prefix, Path(sys.base_prefix), Path(sys.base_exec_prefix), Path(sys.prefix)}:
        wanted += [place / name for name in ("lib", "lib64") if (place / name).is_dir()]
    wanted += [
        Path(paths[name]) for name in ("stdlib", "platstdlib", "purelib", "platlib") if Path(paths[name]).is_dir()
    ]
    wanted += [executable, *map(Path, packages)]
    found: dict[str, str] = {}
    for path in wanted:
        if path.parent == Path("/") and path.is_symlink():
            found[str(path)] = str(path)
        found[str(path.resolve())] = str(path.resolve())
        if str(path.parent.resolve()) == str(path.parent) and not path.is_symlink():
            continue
        if path.parent != Path("/"):
            found[str(path)] = str(path.resolve())
    real = {target for target, source in found.items() if target == source and not Path(target).is_symlink()}
    covered = {target for target in real if real & set(map(str, Path(target).parents))}
    kept = [(source, target) for target, source in found.items() if target not in covered]
    return sorted(kept, key=lambda pair: (pair[1].count("/"), pair[1]))


def environment() -> dict[str, str]:
    """Variables that a program's libraries need on this machine."""
    found = {name: os.environ[name] for name in _PROCESSOR_SETTINGS if name in os.environ}
    shown = {Path(source) for source, _ in binds()}
    searched = [Path(entry).resolve() for entry in os.environ.get("LD_LIBRARY_PATH", "").split(":") if entry]
    if kept := [str(path) for path in searched if shown & {path, *path.parents}]:
        found["LD_LIBRARY_PATH"] = ":".join(kept)
    return found
