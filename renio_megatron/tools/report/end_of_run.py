"""The report at the end of a run: before and after, its curves, and where things are."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from renio_megatron.errors import CheckpointError

logger = logging.getLogger(__name__)

_HELD = ("config.yaml", "metrics.jsonl", "curves.png", "rollouts.jsonl", "tensorboard", "evaluations", "checkpoints")


def report_end(directory: Path, given: str, title: str, report: Callable[[str], None]) -> None:
    """Prints a table of a run that is complete, draws its curves, and says what its directory holds.

    Args:
        directory: output_dir of the run.
        given: that directory as the user wrote it.
        title: name of the run in the picture.
        report: called with each line.
    """
    from rich.console import Console

    from renio_megatron.tools.report.curves import plot_curves
    from renio_megatron.tools.report.table import run_table, summarize
    from renio_megatron.training.metrics.sinks import read_metrics

    rows = read_metrics(directory / "metrics.jsonl")
    try:
        plot_curves({title: rows}, directory / "curves.png")
    except CheckpointError as error:  # the run itself is complete
        logger.warning("%s", error)
    Console().print(run_table(summarize(rows, title)))
    held = [f"{name}/" if (directory / name).is_dir() else name for name in _HELD if (directory / name).exists()]
    report(f"done: {given} holds {', '.join(held)}")
    if (directory / "checkpoints").is_dir():
        report(
            f"the model: `renio export {given} DIRECTORY`; more steps: the same command with a larger train.train_iters"
        )
