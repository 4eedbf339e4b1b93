"""Programs that a stage starts."""

from __future__ import annotations

import os
import subprocess

from gpu_check.machine import ROOT
from gpu_check.unit import Setting
from renio_megatron.cli.launch import end_with_parent

SECONDS = 60.0
"""That a program may take on a GPU machine; five times as long at toy size, where a laptop may be busy."""
OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What this process may have set for itself; the port is taken."""


def output_of(setting: Setting, command: list[str], *, with_errors: bool = False, **environment: str) -> str:
    """What a program prints, standard error after standard output's last line where `with_errors`.

    Raises:
        RuntimeError: it failed; the end of what it said.
        subprocess.TimeoutExpired: it took longer than `SECONDS`.
    """
    inherited = {name: value for name, value in os.environ.items() if name not in OF_A_RANK}
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",  # libraries write what they like
        timeout=SECONDS * (5 if setting.toy else 1),
        check=False,
        preexec_fn=end_with_parent,
    )
    if done.returncode != 0:
        raise RuntimeError(f"exit code {done.returncode}: {(done.stdout + done.stderr)[-1500:]}")
    return done.stdout + (done.stderr if with_errors else "")
