"""The table, the JSON file and the picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from loss_bench.bars import Bar
from loss_bench.measure import floor_bytes
from loss_bench.problem import Cell

Row = dict[str, Any]
BASE = {"logits": "ours, overwriting", "linear": "linear, then ours"}
"""Whose time the others are divided by."""
WIDTH = 33
MARKERS = "osD^v<>Px*"


def cell_table(cell: Cell, rows: Sequence[Row], *, is_cuda: bool) -> str:
    """One cell's rows as text: milliseconds on a GPU, on a CPU times as ratios to the base's forward and backward."""
    last = "gemm" if cell.hidden else "copy"
    base = next((row["both_s"] for row in rows if row["scheme"] == BASE[cell.kind] and row["status"] == "ok"), None)
    unit = "ms" if is_cuda else f"x {BASE[cell.kind]}"
    floor = f"; our passes must move {floor_bytes(cell)} B/entry"
    if cell.hidden:
        found = next((row for row in rows if "gemm_s" in row), None)
        floor = (
            f"; bare GEMMs {found['gemm_s'] * 1e3:.2f} ms, {found['gemm_flops'] / 1e12:.3g} TFLOP/s" if found else ""
        )
    heads = ("forward", "backward", "both", "ratio", "B/entry", last, "peak MiB", "loss err", "grad err")
    lines = [
        f"\n{cell.title} [{unit}{floor}]",
        f"{'':{WIDTH}}" + "".join(f"{head:>10}" for head in heads) + "  weights",
    ]
    for row in rows:
        if row["status"] != "ok":
            lines.append(f"  {row['scheme']:{WIDTH - 2}}  {row['status']}")
            continue
        times = [row[f"{name}_s"] for name in ("forward", "backward", "both")]
        divisor = 1e-3 if is_cuda else base
        fields = [
            *(_number(value / divisor if divisor else None, ".3f") for value in times),
            _number(row["both_s"] / base if base else None, ".2f"),
            _number(row.get("bytes_per_entry"), ".1f"),
            _number(row.get("gemm_share" if cell.hidden else "copy_share"), ".1%"),
            _number(row["peak_bytes"] / 2**20, ".1f"),
            _number(row.get("loss_error"), ".1e"),
            _number(row.get("gradient_error"), ".1e"),
        ]
        lines.append(
            f"  {row['scheme']:{WIDTH - 2}}" + "".join(f"{text:>10}" for text in fields) + f"  {row['weights']}"
        )
    return "\n".join(lines)


def _number(value: float | None, style: str) -> str:
    return "-" if value is None else format(value, style)


def memory_table(rows: Sequence[Row]) -> str:
    """The fused form's memory as text."""
    lines = ["\nMemory of the fused form beside its results"]
    for row in rows:
        found = row["status"]
        if found == "ok":
            found = f"{row['extra_bytes'] / 2**20:.1f} MiB, declared {row['declared_bytes'] / 2**20:.1f} MiB"
        lines.append(f"  {row['scheme']:{WIDTH}} N={row['tokens']}, {row['head']} head: {found}")
    return "\n".join(lines)


def collectives_table(counts: Sequence[Row]) -> str:
    """Collectives as text."""
    if not counts:
        return ""
    tokens = counts[0]["tokens"]
    lines = [f"\nCollectives of one rank of two, counted over gloo, {tokens} tokens: calls (bytes a token)"]
    lines.append(f"{'':{WIDTH}}{'beta':>6}{'clip':>6}{'forward':>14}{'backward':>14}")
    for row in counts:
        ways = [f"{row[f'{way}_calls']} ({row[f'{way}_bytes_per_token']:.3g})" for way in ("forward", "backward")]
        clip = "none" if row["clip"] is None else f"{row['clip']:g}"
        lines.append(f"  {row['scheme']:{WIDTH - 2}}{row['beta']:6g}{clip:>6}" + "".join(f"{way:>14}" for way in ways))
    return "\n".join(lines)


def bars_table(bars: Sequence[Bar]) -> str:
    """The bars as text."""
    return "\n".join(f"  {bar.verdict:12}  {bar.name}: {bar.measured}, needed {bar.needed}" for bar in bars)


def write_json(path: Path, **parts: Any) -> None:
    """Everything that was measured."""
    path.write_text(json.dumps(parts, indent=1) + "\n")


def draw(path: Path, rows: Sequence[Row], device: str) -> None:
    """A PNG with time and peak memory of every scheme, for the largest whole vocabulary of each kind of cell."""
    chosen = [found for kind in ("logits", "linear") if (found := _largest_cells(rows, kind))]
    figure = Figure(figsize=(14, 1 + 4.5 * max(1, len(chosen))), dpi=90, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"Distillation losses on {device}")
    columns = (("both_s", 1e3, "forward and backward, ms"), ("peak_bytes", 2**-20, "peak memory, MiB"))
    for line, found in enumerate(chosen):
        first, labels = found[0], list(dict.fromkeys(_label(row) for row in found))
        where = f"one shard of TP={first['tp']}" if first["tp"] > 1 else "TP=1"
        axes = [figure.add_subplot(len(chosen), 2, 2 * line + column) for column in (1, 2)]
        for axis, (key, factor, name) in zip(axes, columns, strict=True):
            for number, scheme in enumerate(dict.fromkeys(row["scheme"] for row in found)):
                mine = [row for row in found if row["scheme"] == scheme]
                values, places = [row[key] * factor for row in mine], [labels.index(_label(row)) for row in mine]
                axis.scatter(values, places, s=70, marker=MARKERS[number % len(MARKERS)], label=scheme)
            axis.set(
                xscale="log", xlabel=name, title=f"{first['kind']}: N={first['tokens']}, L={first['width']}, {where}"
            )
            axis.set_yticks(range(len(labels)), labels)
            axis.invert_yaxis()
            axis.grid(alpha=0.3)
        axes[1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path)


def _largest_cells(rows: Sequence[Row], kind: str) -> list[Row]:
    """Measured rows of one kind at the smallest TP and there the largest shape."""
    found = [row for row in rows if row["kind"] == kind and row["status"] == "ok"]
    keys = [(-row["tp"], row["tokens"], row["width"]) for row in found]
    return [row for row, key in zip(found, keys, strict=True) if key == max(keys)]


def _label(row: Row) -> str:
    divergence = {0.0: "KL", 1.0: "reverse KL"}.get(row["beta"], "JSD")
    head = f"\n{row['teacher_hidden']}, {row['head']}" if row["head"] else ""
    return f"{divergence}{', clipped' if row['clip'] is not None else ''}{head}"
