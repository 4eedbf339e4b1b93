"""What the caller's process tells the supervisor's, which imports neither dataclasses nor typing: they cost 40 ms."""

from __future__ import annotations

import marshal

RESULT_FD = 3
"""The descriptor on which a program gives its result."""


class Job:
    """One run of a program.

    Attributes:
        backend: a name of `SANDBOXES`.
        source: the program's text.
        limits: the fields of `Limits`.
        parent: process id of the caller.
        directory: private directory that the supervisor makes and removes, for back ends without a /tmp of their own.
        executable, home: the base interpreter's file and prefix, symbolic links resolved.
        binds: (real path, path) of what the interpreter needs: files and directories that the program may read.
        sites: directories of installed packages, which are appended to the program's sys.path.
        environment: variables of the program that depend on the caller's machine.
        newest_abi: Landlock's rights up to this version of its interface are used; tests lower it.
    """

    def __init__(
        self,
        *,
        backend: str,
        source: str,
        limits: dict[str, float],
        parent: int,
        directory: str,
        executable: str,
        home: str,
        binds: list[tuple[str, str]],
        sites: list[str],
        environment: dict[str, str],
        newest_abi: int,
    ) -> None:
        self.backend = backend
        self.source = source
        self.limits = limits
        self.parent = parent
        self.directory = directory
        self.executable = executable
        self.home = home
        self.binds = binds
        self.sites = sites
        self.environment = environment
        self.newest_abi = newest_abi

    def to_bytes(self) -> bytes:
        """The job as bytes for the same Python version."""
        return marshal.dumps(vars(self))

    @staticmethod
    def from_bytes(content: bytes) -> Job:
        """The job of `to_bytes`."""
        return Job(**marshal.loads(content))
