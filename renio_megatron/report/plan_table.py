"""The table of `renio plan`: a line for each thing in memory, a column a pipeline rank."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from renio_megatron.plan.memory import RankMemory

MOST_COLUMNS = 4


def plan_table(ranks: Sequence[RankMemory], memory: float | None, reserve: float) -> Table:
    """What each pipeline rank holds, in GiB, or in MiB where all of it is little.

    Args:
        ranks: the plan. Of many pipeline ranks only the first, the largest and the last are shown.
        memory: bytes of a GPU; None leaves the last lines out.
        reserve: bytes of it that are left for what is not counted.
    """
    largest = max(ranks, key=lambda rank: rank.peak)
    shown = list(ranks) if len(ranks) <= MOST_COLUMNS else _distinct([ranks[0], largest, ranks[-1]])
    unit, factor = ("GiB", 2**30) if (memory or largest.peak) >= 2**30 else ("MiB", 2**20)

    def line(label: str, values: Sequence[float | None], *, end: bool = False, style: str | None = None) -> None:
        cells = ["-" if value is None else f"{value / factor:.2f}" for value in values]
        table.add_row(label, *cells, end_section=end, style=style)

    table = Table(title=f"{unit} on each rank", title_justify="left")
    table.add_column("", no_wrap=True)
    for rank in shown:
        table.add_column(f"stage {rank.pipeline_rank}" if len(ranks) > 1 else "any rank", justify="right", no_wrap=True)
    held = list(largest.held)
    for label in held:
        line(label, [rank.held[label] for rank in shown], end=label == held[-1])
    for phase in ranks[-1].phases:  # the last pipeline rank has them all
        labels = list(dict.fromkeys(label for rank in shown for label in rank.phases.get(phase, {})))
        for label in labels:
            values = [rank.phases.get(phase, {}).get(label) for rank in shown]
            line(f"{phase}: {label}", values, end=label == labels[-1])
    line("at the peak", [rank.peak for rank in shown], style="bold")
    table.add_row("the peak is in", *(rank.peak_phase for rank in shown))
    if memory is not None:
        line("reserve", [reserve] * len(shown))
        line("left over", [memory - reserve - rank.peak for rank in shown])
    return table


def _distinct(ranks: Sequence[RankMemory]) -> list[RankMemory]:
    return list({rank.pipeline_rank: rank for rank in ranks}.values())
