"""Several "nodes" on one machine: the shipped multi-node scripts as processes, and a stand-in for Slurm's commands.

As a module it is the stand-in: `python -m tests.helpers.clusters srun --nodes 2 --ntasks-per-node 2 ... COMMAND` starts
the tasks with Slurm's variables, passes SIGTERM on to them, and ends with the highest exit code, as srun does.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.helpers import warm
from tests.helpers.jobs import descendants, python_path
from tests.helpers.paths import ROOT

RECIPE = str(ROOT / "examples" / "modchain.yaml")
SETTINGS = (
    "train.global_batch_size=8",
    "train.micro_batch_size=4",
    "rollout.max_completion_length=8",
    "evaluate.every=0",
    "evaluate.samples=null",
    "parallel.distributed_timeout_minutes=1",
)


class Cluster:
    """Launchers in sessions of their own, in a working directory of their own; none outlives the `with`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._processes: list[subprocess.Popen[str]] = []
        left_out = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        kept = {name: value for name, value in os.environ.items() if name not in left_out}
        self.environment = {
            **kept,
            "PYTHON": str(warm.interpreter(folder)),
            "PYTHONPATH": python_path(),
            "OMP_NUM_THREADS": "1",
        }

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            for pid in (*descendants(process.pid), process.pid):
                if process.poll() is None:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            process.wait()

    def start(self, *command: str, log: str, **environment: str) -> subprocess.Popen[str]:
        """A process whose two outputs go to the file `log`."""
        process = warm.Popen(
            command,
            cwd=self.folder,
            env=self.environment | environment,
            stdout=(self.folder / log).open("a"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
        )
        self._processes.append(process)
        return process

    def text(self, log: str) -> str:
        return (self.folder / log).read_text()

    def rows(self, run: str) -> list[dict[str, Any]]:
        """The whole lines of a run's metrics."""
        path = self.folder / run / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def wait_for(self, run: str, step: int, seconds: float) -> None:
        """Until the metrics of a step are written."""
        end = time.monotonic() + seconds
        while not any(row["step"] >= step for row in self.rows(run)):
            logs = "\n".join(path.read_text() for path in self.folder.glob("*.log"))
            assert all(process.poll() is None for process in self._processes), f"ended before step {step}: {logs}"
            assert time.monotonic() < end, f"no step {step} after {seconds} s: {logs}"
            time.sleep(0.05)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_listener(port: int, seconds: float) -> None:
    """Until somebody on this machine accepts connections at a port."""
    end = time.monotonic() + seconds
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert time.monotonic() < end, f"nobody listens at port {port} after {seconds} s"
        time.sleep(0.05)


def slurm_commands(folder: Path) -> str:
    """A directory with stand-ins of sbatch, srun and scontrol, which note what they were given in `folder`."""
    (folder / "bin").mkdir()
    for name in ("sbatch", "srun", "scontrol"):
        path = folder / "bin" / name
        path.write_text(
            f'#!/bin/sh\necho "$@" >>"{folder}/{name}.txt"\n'
            f'PYTHONPATH="{python_path()}:$PYTHONPATH" exec "{sys.executable}" -m tests.helpers.clusters {name} "$@"\n'
        )
        path.chmod(0o755)
    return str(folder / "bin")


def _srun(arguments: list[str]) -> int:
    """Starts the tasks. Options are `--name value` or `--name=value`; `--label` alone has no value."""
    options: dict[str, str] = {}
    while arguments[0].startswith("--"):
        name, _, value = arguments.pop(0).partition("=")
        options[name] = value or ("" if name == "--label" else arguments.pop(0))
    nodes, per_node = int(options["--nodes"]), int(options["--ntasks-per-node"])
    tasks: list[subprocess.Popen[bytes]] = []
    signal.signal(signal.SIGTERM, lambda number, _: [task.send_signal(number) for task in tasks])
    for task in range(nodes * per_node):
        place = {
            "SLURM_STEP_ID": "0",
            "SLURM_STEP_NUM_TASKS": str(nodes * per_node),
            "SLURM_STEP_TASKS_PER_NODE": f"{per_node}(x{nodes})",
            "SLURM_STEP_NODELIST": os.environ["SLURM_JOB_NODELIST"],
            "SLURM_PROCID": str(task),
            "SLURM_LOCALID": str(task % per_node),
            "SLURM_NODEID": str(task // per_node),
        }
        tasks.append(subprocess.Popen(arguments, env=os.environ | place))
    codes = [task.wait() for task in tasks]
    return max(code if code >= 0 else 128 - code for code in codes)


def _main(name: str, arguments: list[str]) -> int:
    if name == "srun":
        return _srun(arguments)
    if name == "scontrol" and arguments[:2] == ["show", "hostnames"]:
        print("127.0.0.1\n127.0.0.2")
    return 0


if __name__ == "__main__":
    raise SystemExit(_main(sys.argv[1], sys.argv[2:]))
