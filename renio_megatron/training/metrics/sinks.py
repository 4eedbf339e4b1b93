"""Sinks that write a run's metrics: metrics.jsonl and TensorBoard."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from renio_megatron.errors import CheckpointError, DataError, NumericsError
from renio_megatron.files import JsonLines, output_error, parse_row
from renio_megatron.training.metrics.registry import METRICS, ORDER, RENAMED_METRICS, family_of, metric_of

Observer: TypeAlias = Callable[[int, dict[str, float]], None]
"""(step, metrics) -> None: a sink's `write`, a progress line's `update`."""


class JsonlSink(JsonLines):
    """`metrics.jsonl`: one JSON object per line, keys in the order of `METRICS`; only whole lines are ever written.

    An existing file is continued; see `JsonLines` for its arguments and errors.
    """

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        """Appends the row of `step`; a value that is None is left out.

        Raises:
            NumericsError: a value is NaN or infinite.
        """
        self.append([{"step": int(step), **_row(step, values)}])


class TensorBoardSink:
    """The same scalars as TensorBoard events.

    Args:
        directory: where the event files go; it is created.
        purge_step: first step that a resumed run writes again; TensorBoard hides older events from there on.

    Raises:
        CheckpointError: the directory cannot be written.
    """

    def __init__(self, directory: str | Path, *, purge_step: int | None = None) -> None:
        # Seconds of import time that a run without TensorBoard need not pay.
        from torch.utils.tensorboard import SummaryWriter

        self.directory = Path(directory)
        try:
            self._writer = SummaryWriter(str(self.directory), purge_step=purge_step)
        except OSError as error:
            raise output_error(self.directory, error) from error

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        """Writes the values of `step` and waits until they are in the file.

        Raises:
            NumericsError: a value is NaN or infinite.
        """
        row = _row(step, values)
        try:
            for name, value in row.items():
                self._writer.add_scalar(name, value, int(step))
            self._writer.flush()
        except OSError as error:
            raise output_error(self.directory, error) from error

    def close(self) -> None:
        """Closes the event file."""
        try:
            self._writer.close()
        except OSError as error:
            raise output_error(self.directory, error) from error


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a file that `JsonlSink` wrote, in its order; a half-written last line is left out.

    Metrics of an earlier version get their current names.

    Raises:
        CheckpointError: the file cannot be read.
        DataError: a line other than a half-written last one is not a JSON object with a step.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"cannot read the metrics in {path}: {error.strerror or error}. Give the output directory of a run."
        ) from error
    whole, _, rest = content.rpartition(b"\n")
    rows = [parse_row(line, path, number) for number, line in enumerate(whole.splitlines(), start=1) if line.strip()]
    with contextlib.suppress(DataError):
        rows.append(parse_row(rest, path, len(rows) + 1))
    return [{RENAMED_METRICS.get(name, name): value for name, value in row.items()} for row in rows]


def _row(step: int, values: Mapping[str, float | None]) -> dict[str, float]:
    """The known values as floats in the order of `METRICS`, without the step."""
    for name in values:
        if family_of(name) not in METRICS:
            metric_of(name)
    known = sorted(values, key=lambda name: ORDER[family_of(name)])
    row = {name: float(value) for name in known if name != "step" and (value := values[name]) is not None}
    bad = [f"{name} = {value}" for name, value in row.items() if not math.isfinite(value)]
    if bad:
        raise NumericsError(
            f"step {step}: {', '.join(bad)}. The run has diverged: resume from an earlier checkpoint with a lower "
            "train.lr or a smaller train.clip_grad."
        )
    return row
