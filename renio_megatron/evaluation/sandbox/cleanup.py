"""A directory that a hostile program has filled: its size, and its removal."""

from __future__ import annotations

import os
import stat


def disk_bytes(directory: str, max_entries: int) -> float:
    """Bytes that the files below a directory take, links not followed; infinite where there are too many of them."""
    total, count, ahead = 0.0, 0, [directory]
    while ahead:
        try:
            with os.scandir(ahead.pop()) as entries:
                for entry in entries:
                    count += 1
                    total += entry.stat(follow_symlinks=False).st_blocks * 512
                    if entry.is_dir(follow_symlinks=False):
                        ahead.append(entry.path)
                    if count > max_entries:
                        return float("inf")
        except OSError:  # removed meanwhile, closed, or a path too long for the kernel
            continue
    return total


def remove_directory(directory: str) -> None:
    """Removes a directory and all that is in it; no process may be writing there any more.

    Directories inside are first moved up to the top: neither depth nor the length of a path stops it. Links are
    removed, not followed.

    Raises:
        OSError: something cannot be removed.
    """
    os.chmod(directory, 0o700)
    top = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        number, waiting = 0, [""]
        while waiting:
            name = waiting.pop()
            inside = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=top) if name else os.dup(top)
            try:
                for entry in os.listdir(inside):
                    if not stat.S_ISDIR(os.stat(entry, dir_fd=inside, follow_symlinks=False).st_mode):
                        os.unlink(entry, dir_fd=inside)
                        continue
                    os.chmod(entry, 0o700, dir_fd=inside)
                    number += 1
                    os.rename(entry, moved := f".removed-{os.getpid()}-{number}", src_dir_fd=inside, dst_dir_fd=top)
                    waiting.append(moved)
            finally:
                os.close(inside)
            if name:
                os.rmdir(name, dir_fd=top)
    finally:
        os.close(top)
    os.rmdir(directory)
