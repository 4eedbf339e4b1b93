"""`rollouts.jsonl`: the student's completions of each step, and their weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from renio_megatron.files import JsonLines
from renio_megatron.types import Rollout

RolloutObserver = Callable[[int, Sequence[Rollout], Sequence[float]], None]
"""(step, this rank's rollouts, their weights) -> None."""


class RolloutSink:
    """Writes one JSON object per line and sequence: step, prompt (its index), completion_ids, weight, finished; the
    teacher's name, where there are several; and unread_ids, the tokens behind rollout.prefix_length.

    An existing file is continued, as `JsonlSink` continues its own.

    Args:
        path: the file; its directory is created.
        purge_step: first step that a resumed run writes again; rows from there on are dropped. None keeps all.

    Raises:
        CheckpointError: the file cannot be opened or written.
        DataError: `purge_step` is given and the file was not written by this class.
    """

    def __init__(self, path: str | Path, *, purge_step: int | None = None) -> None:
        self._lines = JsonLines(path, purge_step=purge_step)

    def write(self, step: int, rollouts: Sequence[Rollout], weights: Sequence[float]) -> None:
        """Appends the sequences of `step`, in order, each with its weight.

        Raises:
            ValueError: not as many weights as sequences.
        """
        self._lines.append(
            {
                "step": int(step),
                "prompt": rollout.prompt.index,
                "completion_ids": list(rollout.completion_ids),
                "weight": float(weight),
                "finished": rollout.finished,
                **({"teacher": rollout.prompt.teacher} if rollout.prompt.teacher else {}),
                **({"unread_ids": list(rollout.unread_ids)} if rollout.unread_ids else {}),
            }
            for rollout, weight in zip(rollouts, weights, strict=True)
        )

    def close(self) -> None:
        """Closes the file."""
        self._lines.close()
