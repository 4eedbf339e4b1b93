"""One stage, in a process of its own: `python -m gpu_check.child STAGE FOLDER SECONDS [--toy]`."""

from __future__ import annotations

import gc
import importlib
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path

from gpu_check import machine
from gpu_check.record import Record

LEAST_SECONDS = 5.0
"""Left over, no unit is begun: it would be cut off."""
FAULT, NO_DEVICE, NO_TIME, BROKEN = 1, 2, 3, 4
"""Exit codes: a unit had a fault; there is no GPU; the time did not suffice; a fresh process is to go on."""


def main(arguments: list[str]) -> int:
    """0 where every unit has run without a fault, else one of the codes above."""
    stage, folder, seconds, toy = arguments[0], Path(arguments[1]), float(arguments[2]), "--toy" in arguments
    deadline = time.monotonic() + seconds
    if os.environ.get("GPU_CHECK_HANG") == stage:
        _hang()
    command = f"scripts/gpu_check.sh {stage}{' --toy' if toy else ''}"
    record = Record(folder / f"{stage}.json", machine.header(command, toy=toy))
    if record.is_complete:
        return 0
    import torch

    from renio_megatron.cli.launch import quiet_environment

    quiet_environment()
    if toy:
        torch.set_num_threads(1)
    elif not torch.cuda.is_available():
        print("error: torch sees no GPU here; --toy runs every stage at toy size on a CPU", file=sys.stderr)
        return NO_DEVICE
    from gpu_check.unit import Setting

    setting = Setting(torch.device("cpu") if toy else torch.device("cuda", 0), toy, folder)
    module = importlib.import_module(f"gpu_check.stages.{stage}")
    if (why := getattr(module, "obstacle", lambda setting: None)(setting)) is not None:
        print(f"  skipped: {why}", flush=True)
        record.close(skipped=why)
        return 0
    failed = False
    for unit in module.units(setting):
        if record.is_done(unit.name):
            continue
        if time.monotonic() > deadline - LEAST_SECONDS:
            print(f"  {unit.name}: not begun, the time is up", flush=True)
            return NO_TIME
        began, problem = time.monotonic(), None
        try:
            unit.run(record, setting)
            if setting.is_cuda:
                torch.cuda.synchronize()  # a kernel's fault belongs to the unit that launched it
        except Exception as error:  # the other units still have something to say
            traceback.print_exc()
            problem, failed = f"{type(error).__name__}: {error}"[:2000], True
        record.finish(unit.name, problem)
        print(f"  {unit.name}: {'done' if problem is None else 'FAILED'}, {time.monotonic() - began:.1f} s", flush=True)
        gc.collect()
        if setting.is_cuda:
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
                left = torch.cuda.memory_allocated()
            except Exception as error:  # after an illegal access nothing works in this process
                print(f"  the device answers no more: {error}", flush=True)
                return BROKEN
            if left > getattr(module, "LEAVES_AT_MOST", left):
                print(f"  {left / 2**30:.1f} GiB are still taken: another process goes on", flush=True)
                return BROKEN
    record.close()
    return FAULT if failed else 0


def _hang() -> None:
    """For the test of the limits: neither this process nor its child, in a session of its own, ends by itself."""
    subprocess.Popen(["sleep", "100000"], start_new_session=True)
    while True:
        time.sleep(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
