"""Losses over a large vocabulary side by side: ours, the plain expression, and the schemes of other projects.

    python benchmarks/loss.py            the full grid of this device (a GPU: an hour or more; --budget ends it earlier)
    python benchmarks/loss.py --quick    on a GPU: N = 8192, TP 1 and 8, under 5 minutes

Same inputs, one process. Writes a table, loss.json and loss.png to --out and ends with what the loss must reach, as
lines of pass or FAIL. TP > 1 is one shard on one device without communication: the time of its passes, not of a group;
collectives are counted by two ranks over gloo. Extra: `pip install renio-megatron[bench]` for Liger-Kernel.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path

import torch

from loss_bench import collectives, tables
from loss_bench.bars import judge
from loss_bench.grid import Bench, Grid, cpu_grid, full_grid, quick_grid
from loss_bench.machine import clocks, describe

REPEATS = {"cuda": 30, "cpu": 9}
QUICK_SECONDS = 270.0


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"a GPU's short grid; ends after {QUICK_SECONDS:g} s")
    parser.add_argument("--out", type=Path, default=Path("runs/loss_benchmark"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", help="N x V, for example 8192x151936,1024x151936")
    parser.add_argument("--tp", help="for example 1,8")
    parser.add_argument("--hidden", help="student:teacher, for example 2048:4096; `none` leaves the heads out")
    parser.add_argument("--divergences", help="beta:clip, for example 0:0.05,0.5:none; of logits and of heads")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"))
    parser.add_argument("--repeats", type=int, help="calls that a median is over")
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--budget", type=float, help="seconds after which no cell is begun")
    parser.add_argument("--no-collectives", action="store_true", help="leaves the two ranks out")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here; leave the option out to measure the CPU.")
    return options


def grid_of(options: argparse.Namespace) -> Grid:
    """The device's grid with what the command line changes."""
    grid = cpu_grid() if options.device == "cpu" else quick_grid() if options.quick else full_grid()
    changes: dict[str, object] = {}
    if options.shapes:
        changes["shapes"] = [tuple(map(int, shape.split("x"))) for shape in options.shapes.split(",")]
        changes["memory"] = ()
    if options.tp:
        changes["tp"] = [int(tp) for tp in options.tp.split(",")]
    if options.hidden:
        pairs = [] if options.hidden == "none" else options.hidden.split(",")
        changes["hidden"] = [tuple(map(int, pair.split(":"))) for pair in pairs]
        changes["memory"] = () if not pairs else changes.get("memory", grid.memory)
    if options.divergences:
        pairs = [pair.split(":") for pair in options.divergences.split(",")]
        chosen = [(float(beta), None if clip == "none" else float(clip)) for beta, clip in pairs]
        changes["divergences"] = changes["linear"] = chosen
    if options.dtype:
        changes["dtype"] = getattr(torch, options.dtype)
    return dataclasses.replace(grid, **changes)


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints and writes; 1 where a scheme broke, else 0, also where a bar is not reached."""
    begin = time.monotonic()
    options = parse(arguments)
    grid, device = grid_of(options), torch.device(options.device)
    is_cuda = device.type == "cuda"
    if not is_cuda:
        torch.set_num_threads(1)
    budget = options.budget or (QUICK_SECONDS if options.quick else float("inf"))
    options.out.mkdir(parents=True, exist_ok=True)
    machine = describe(device)
    name = machine.get("gpu", machine["cpu"])
    print(f"{name}, torch {machine['torch']}, triton {machine['triton']}, Liger-Kernel {machine['liger_kernel']}")

    counts = []
    if not options.no_collectives:
        counts = collectives.count(list(dict.fromkeys(grid.divergences)))
        print(tables.collectives_table(counts), flush=True)
    bench = Bench(device, options.repeats or REPEATS[device.type], options.warm_up, deadline=begin + budget)
    print(f"\ncopy: {bench.copy_rate / 1e9:.0f} GB/s; medians of {bench.repeats} calls", flush=True)

    def write() -> None:
        rates = {"copy_bytes_per_s": bench.copy_rate}
        bars = [dataclasses.asdict(bar) for bar in judge(bench.rows, is_cuda=is_cuda)]
        parts = {"machine": machine, "rates": rates, "rows": bench.rows, "collectives": counts, "bars": bars}
        tables.write_json(options.out / "loss.json", **parts, cells_left_out=bench.left_out)

    if grid.memory and grid.hidden:
        print(tables.memory_table(bench.fused_memory(grid)), flush=True)
    for cell in grid.cells():
        rows = bench.cell(cell)
        if rows:
            print(tables.cell_table(cell, rows, is_cuda=is_cuda), flush=True)
            write()
    machine["clocks_at_end"] = clocks() if is_cuda else {}
    write()
    tables.draw(options.out / "loss.png", bench.rows, name)
    broken = [row for row in bench.rows if row["status"] == "error"]
    for row in broken:
        print(f"\nerror: {row['scheme']}, {row['title']}: {row['message']}")
    print(f"\nBars of {'an H100 or H200' if is_cuda else 'a CPU'}")
    print(tables.bars_table(judge(bench.rows, is_cuda=is_cuda)))
    left = f"; {bench.left_out} cells left out, their time was up" if bench.left_out else ""
    print(f"\n{time.monotonic() - begin:.0f} s; {options.out}/loss.json, loss.png{left}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
