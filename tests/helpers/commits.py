"""Files of other commits, for programs that compare this tree with one."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.helpers.paths import ROOT


@contextlib.contextmanager
def tree_of(revision: str) -> Iterator[Path]:
    """The files of a commit, in a folder of their own while the context lasts.

    Raises:
        SystemExit: there is no such commit; the status is 2.
    """
    git = ["git", "-C", str(ROOT)]
    if subprocess.run([*git, "rev-parse", "--verify", "-q", f"{revision}^{{commit}}"], capture_output=True).returncode:
        print(f"error: there is no commit '{revision}' here. Give a commit, a branch or a tag.", file=sys.stderr)
        raise SystemExit(2)
    with tempfile.TemporaryDirectory() as name:
        tree = Path(name) / "tree"
        subprocess.run([*git, "worktree", "add", "-q", "--detach", str(tree), revision], check=True)
        try:
            yield tree
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", str(tree)], check=True)
