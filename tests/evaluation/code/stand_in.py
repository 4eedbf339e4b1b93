"""A sandbox that keeps nothing out: a plain process, with the face of the real ones; and the benchmark files' rows."""

from __future__ import annotations

import contextlib
import functools
import gzip
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from renio_megatron.evaluation.code.sandbox_face import Limits

_START = (
    "import os, resource; os.dup2({fd}, 3, inheritable=False); "
    "resource.setrlimit(resource.RLIMIT_AS, ({memory}, {memory})); "
    "exec(compile(open({path!r}).read(), '<harness>', 'exec'), globals())"
)


@dataclass(frozen=True)
class PlainOutcome:
    exit_code: int | None
    stopped: str | None
    stdout: bytes
    stderr: bytes
    result: bytes
    seconds: float


class PlainProcess:
    """Runs programs in a process of this user. `runs` counts them."""

    name = "plain process"

    def __init__(self) -> None:
        self.runs = 0

    def run(self, source: str, stdin: bytes = b"", limits: Limits | None = None) -> PlainOutcome:
        limits, begin, stopped = limits or Limits(), time.monotonic(), []
        self.runs += 1
        read, write = os.pipe()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "source.py"
            path.write_text(source, "utf-8")
            start = _START.format(fd=write, memory=limits.memory_bytes, path=str(path))
            child = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", start],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=(write,),
                cwd=folder,
                start_new_session=True,
            )
            os.close(write)

            def stop(why: str) -> None:
                stopped.append(why)
                with contextlib.suppress(OSError):
                    os.killpg(child.pid, signal.SIGKILL)

            def drain(descriptor: int, into: bytearray) -> None:
                while data := os.read(descriptor, 1 << 16):
                    into += data
                    if len(into) > limits.output_bytes:
                        del into[limits.output_bytes :]
                        stop("output")
                        break

            def feed() -> None:
                with contextlib.suppress(OSError), child.stdin:
                    child.stdin.write(stdin)

            streams = [bytearray() for _ in range(3)]
            descriptors = (child.stdout.fileno(), child.stderr.fileno(), read)
            threads = [threading.Thread(target=drain, args=pair) for pair in zip(descriptors, streams, strict=True)]
            threads.append(threading.Thread(target=feed))
            for thread in threads:
                thread.start()
            try:
                code = child.wait(limits.wall_s)
            except subprocess.TimeoutExpired:
                stop("time")
                code = child.wait()
            with contextlib.suppress(OSError):
                os.killpg(child.pid, signal.SIGKILL)
            for thread in threads:
                thread.join()
            os.close(read)
            child.stdout.close()
            child.stderr.close()
        output, errors, result = map(bytes, streams)
        why = stopped[0] if stopped else None
        return PlainOutcome(None if why else code, why, output, errors, result, time.monotonic() - begin)


@functools.cache
def rows(file: Path) -> dict[str, dict]:
    """The rows of a benchmark's file, by task."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return {row["task_id"]: row for row in map(json.loads, lines)}


def all_rows(shared: Path) -> dict[str, dict]:
    """The rows of HumanEval+ and MBPP+."""
    folder = shared / "data"
    return rows(folder / "humanevalplus.jsonl.gz") | rows(folder / "mbppplus.jsonl.gz")
