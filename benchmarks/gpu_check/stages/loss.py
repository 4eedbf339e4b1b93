"""The losses beside other implementations: the quick grid of `benchmarks/loss.py`, a cell a unit."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

from gpu_check.record import Record
from gpu_check.unit import Setting, Unit
from loss_bench.grid import Bench, Grid, cpu_grid, quick_grid
from loss_bench.problem import Cell
from loss_bench.schemes import COMPILED, SCHEMES, Scheme

REPEATS = 12
TELLING = (("linear", 0.0, True), ("logits", 0.0, True), ("logits", 0.5, False), ("linear", 0.5, False))
"""(kind, beta, whether clipped) of the cells that come first."""


def units(setting: Setting) -> list[Unit]:
    """The device's cells, those of a whole vocabulary and of the recipes' objectives first."""
    grid = _grid(setting)
    bench: list[Bench] = []  # made when it is asked for: it measures the copy rate

    def ready() -> Bench:
        if not bench:
            repeats, warm_up = (2, 1) if setting.toy else (REPEATS, 3)
            bench.append(Bench(setting.device, repeats, warm_up, schemes=_schemes(setting)))
        return bench[0]

    cells = sorted(grid.cells(), key=_place)
    in_order = [Unit(cell.title, partial(_cell, cell=cell, ready=ready)) for cell in cells]
    telling = sum(cell.tp == 1 and _place(cell)[1] < len(TELLING) for cell in cells)
    return [
        Unit("copy rate", lambda record, setting: record.add("copy", ready().copy_rate, "B/s")),
        *in_order[:telling],
        Unit("memory of the fused form", partial(_memory, grid=grid, ready=ready)),
        *in_order[telling:],
    ]


def _schemes(setting: Setting) -> list[Scheme]:
    """All but the compiled one at toy size, where compiling would be all that is measured."""
    return [scheme for scheme in SCHEMES if not setting.toy or scheme is not COMPILED]


def _grid(setting: Setting) -> Grid:
    if not setting.toy:
        return quick_grid()
    small = {"shapes": [(32, 256)], "hidden": ((16, 24),), "memory": (16, 32), "memory_chunk": 8, "tp": (1, 2)}
    few = ((0.0, 0.05), (0.5, None))
    return dataclasses.replace(cpu_grid(), **small, divergences=few, linear=few[:1])


def _place(cell: Cell) -> tuple[int, int]:
    key = (cell.kind, cell.beta, cell.clip is not None)
    return cell.tp, TELLING.index(key) if key in TELLING else len(TELLING)


def _cell(record: Record, setting: Setting, cell: Cell, ready: Any) -> None:
    """Every scheme's time of forward and backward; the whole row in the detail."""
    broken = []

    def is_wanted(scheme: Scheme) -> bool:
        return not record.has(f"{cell.title}, {scheme.name}")

    for row in ready().rows_of(cell, is_wanted):
        record.add(f"{cell.title}, {row['scheme']}", row.get("both_s"), "s", row=row, **_why(row))
        if row["status"] == "error":
            broken.append(f"{row['scheme']}: {row['message']}")
    if broken:
        raise RuntimeError("; ".join(broken))


def _why(row: dict[str, Any]) -> dict[str, str]:
    return {} if row["status"] == "ok" else {"why": row.get("message", row["status"])}


def _memory(record: Record, setting: Setting, grid: Grid, ready: Any) -> None:
    """What the fused form takes beside its results, at two numbers of tokens."""
    for row in ready().fused_memory(grid):
        name = f"memory, {row['scheme']}, {row['tokens']} tokens, {row['head']} head"
        record.add(name, row.get("extra_bytes"), "B", row=row, **_why(row))
