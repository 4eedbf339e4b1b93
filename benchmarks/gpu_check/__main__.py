"""Runs the stages one after the other, each in a process of its own and within its limit: `scripts/gpu_check.sh`."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path

from gpu_check import machine, supervise
from gpu_check.child import BROKEN, NO_DEVICE, NO_TIME
from gpu_check.record import problems, read

LIMITS = {"smoke": 100.0, "kernels": 60.0, "loss": 110.0, "step": 110.0, "fp8": 100.0, "cli": 140.0}
"""Stages in their order, and the seconds that each may take. All but the first fit into one command of 520 s."""
SAYS = {
    "smoke": "one of each kind of call, and the device's rates",
    "kernels": "each kernel and the fused loss against fp64",
    "loss": "the losses beside other implementations, and what ours must reach",
    "step": "steps of a 1.7B student and a 4B teacher: time, memory, what the GPU waits",
    "fp8": "the same in FP8 by Transformer Engine: losses, log ratios, verdicts, weights",
    "cli": "`renio train`, and a first step beside the CPU's",
}
TOY_LIMIT = 600.0
NOWHERE = "there is no GPU"


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="gpu_check.sh", description="What a machine with a GPU has to show. Goes on where it was cut off."
    )
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(LIMITS)}; all where none is named")
    parser.add_argument("--seconds", type=float, help="for all of it; a stage that does not fit is cut off")
    parser.add_argument("--toy", action="store_true", help="at toy size, on a CPU")
    parser.add_argument("--list", action="store_true", help="the stages and their limits; runs nothing")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_check"), help="folder of the results")
    parser.add_argument(
        "--tables", type=Path, metavar="FOLDER", help="writes what FOLDER holds into docs/; runs nothing else"
    )
    options = parser.parse_args(arguments)
    unknown = [name for name in options.stages if name not in LIMITS]
    if unknown:
        parser.error(f"there is no stage {', '.join(unknown)}; there are {', '.join(LIMITS)}")
    return options


def main(arguments: list[str]) -> int:
    """0 where every stage that was asked for is complete and without a fault, 2 where there is no GPU, else 1."""
    options = parse(arguments)
    if options.list:
        for name, limit in LIMITS.items():
            print(f"{name:8} {limit:4.0f} s  {SAYS[name]}")
        return 0
    if options.tables is not None:
        from gpu_check.tables import write_tables

        return write_tables(options.tables, machine.ROOT / "docs")
    stages = options.stages or list(LIMITS)
    deadline = time.monotonic() + (options.seconds or float("inf"))
    options.out.mkdir(parents=True, exist_ok=True)
    supervise.adopt_orphans()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    said: dict[str, str] = {}
    for stage in stages:
        said[stage] = run_stage(stage, options, deadline)
        if said[stage] == NOWHERE:  # the child has said what to do; it would be the same for the others
            return NO_DEVICE
        print(f"{stage}: {said[stage]}", flush=True)
    summary = "\n".join(f"{stage}: {text}" for stage, text in said.items())
    (options.out / "summary.txt").write_text(summary + "\n", encoding="utf-8")
    print(f"\n== summary ({options.out})\n{summary}")
    return 0 if all(text.startswith(("complete", "skipped")) for text in said.values()) else 1


def run_stage(stage: str, options: argparse.Namespace, deadline: float) -> str:
    """Runs a stage, unless its results are there; how it ended, in words."""
    path = options.out / f"{stage}.json"
    limit = min(TOY_LIMIT if options.toy else LIMITS[stage], deadline - time.monotonic())
    before = read(path)
    began = time.monotonic()
    if (
        before is not None
        and before["complete"]
        and (before["commit"], before["toy"]) == (machine.commit(), options.toy)
    ):
        return _words(before) + ", from before"
    if limit < 1:
        return "not begun, the time is up"
    print(f"== {stage}", flush=True)
    command, log = [sys.executable, "-m", "gpu_check.child", stage, str(options.out)], options.out / f"{stage}.txt"
    code: int | None = BROKEN
    while code == BROKEN and (left := limit - (time.monotonic() - began)) > 1:
        code = supervise.run([*command, f"{left:g}", *(["--toy"] if options.toy else [])], log, left)
    if code == NO_DEVICE:
        return NOWHERE
    took = f", {time.monotonic() - began:.0f} s"
    found = read(path)
    if code is None:
        return f"CUT OFF after {limit:.0f} s, {_count(found)}"
    if found is None or not found["complete"]:
        return ("NOT FINISHED, its time was up, " if code == NO_TIME else f"FAILED ({code}), ") + _count(found) + took
    return _words(found) + took


def _words(found: dict) -> str:
    if found["skipped"] is not None:
        return f"skipped: {found['skipped']}"
    wrong = problems(found)
    if wrong:
        return f"FAULTS in {len(wrong)} of {len(found['units'])}: " + "; ".join(f"{k}: {v}" for k, v in wrong.items())
    return f"complete, {_count(found)}"


def _count(found: dict | None) -> str:
    return f"{0 if found is None else len(found['measurements'])} measurements"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
