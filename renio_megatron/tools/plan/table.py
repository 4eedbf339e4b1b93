"""The table of `renio plan`: one line per item in memory, one column per kind of rank."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from renio_megatron.tools.plan.memory import HELD, PHASES, RankMemory

MAX_COLUMNS = 4


def plan_table(ranks: Sequence[RankMemory], memory: float | None, reserve: float) -> Table:
    """Memory of each kind of rank, in GiB, or in MiB where all numbers are small.

    Args:
        ranks: the plan. With many kinds only a few are shown, the largest included.
        memory: bytes of a GPU; None leaves the last lines out.
        reserve: bytes of it that are reserved for uncounted memory.
    """
    largest, shown = max(ranks, key=lambda rank: rank.peak), _shown(ranks)
    unit, factor = ("GiB", 2**30) if (memory or largest.peak) >= 2**30 else ("MiB", 2**20)

    def line(label: str, values: Sequence[float | None], *, end: bool = False, style: str | None = None) -> None:
        cells = ["-" if value is None else f"{value / factor:.2f}" for value in values]
        table.add_row(label, *cells, end_section=end, style=style)

    table = Table(title=f"{unit} on each rank", title_justify="left")
    table.add_column("", no_wrap=True)
    for rank in shown:
        table.add_column(_title(rank, ranks), justify="right", no_wrap=True)
    held = [label for label in HELD if any(label in rank.held for rank in shown)]
    for label in held:
        line(label, [rank.held.get(label) for rank in shown], end=label == held[-1])
    for phase in PHASES:
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


def _shown(ranks: Sequence[RankMemory]) -> list[RankMemory]:
    """All kinds, or of many the first, the largest and the last; where some only score, the largest and last of each.

    The last ranks that train have the loss, the last ones that score the teacher's logits.
    """
    if len(ranks) <= MAX_COLUMNS:
        return list(ranks)
    training = [rank for rank in ranks if rank.student_stage is not None]
    scoring = [rank for rank in ranks if rank.student_stage is None]
    if not scoring:
        chosen = [ranks[0], max(ranks, key=lambda rank: rank.peak), ranks[-1]]
    else:
        chosen = [one for some in (training, scoring) for one in (max(some, key=lambda rank: rank.peak), some[-1])]
    return [rank for rank in ranks if any(rank is one for one in chosen)]


def _title(rank: RankMemory, ranks: Sequence[RankMemory]) -> str:
    """Title of a column: its pipeline ranks, and where some ranks only score, its task."""
    mine, theirs = rank.student_stage, rank.teacher_stage
    is_split = any(other.student_stage is None for other in ranks)
    num_mine = len({other.student_stage for other in ranks} - {None})
    num_theirs = len({other.teacher_stage for other in ranks} - {None})
    if is_split:
        who, stage, count = ("training", mine, num_mine) if mine is not None else ("scoring", theirs, num_theirs)
        return f"{who} {stage}" if count > 1 else who
    if all(other.student_stage == other.teacher_stage for other in ranks):
        return f"stage {mine}" if num_mine > 1 else "any rank"
    words = [f"stage {mine}"] if num_mine > 1 else []
    words += [f"teacher's {theirs}"] if num_theirs > 1 else []
    return "\n".join(words)
