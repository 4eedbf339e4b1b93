"""Progress display of a run: one live line on a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType

from rich.console import Console

from renio_megatron.training.metrics.live_bar import LiveBar
from renio_megatron.training.metrics.registry import family_of

PLAIN_INTERVAL_S = 2.0
EVALUATION_INTERVAL_S = 10.0
AVERAGED_STEPS = 20


class Progress:
    """A context manager that shows the progress of a run; made on rank 0 only.

    On a terminal it is one line with a bar, and evaluations stay as lines above it. Elsewhere (a log file, a pipe) it
    is a line for the first step, the last one and those with an evaluation, and for others at most every
    `PLAIN_INTERVAL_S` seconds; of an evaluation every `EVALUATION_INTERVAL_S` seconds.

    Args:
        title: name of the run.
        total: optimizer steps of the whole run.
        console: where to write; None is standard output.
        clock: seconds, monotonic.
    """

    def __init__(
        self, title: str, total: int, console: Console | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.title = title
        self.total = total
        self._clock = clock
        self._last: tuple[float, int] | None = None
        self._seconds_per_step: deque[float] = deque(maxlen=AVERAGED_STEPS)
        self._shown_at: float | None = None
        self._pending: str | None = None
        self._evaluation: tuple[int, str] | None = None
        self._evaluation_shown_at = 0.0
        self._bar = LiveBar(console, title, total, f"0/{total}")

    def __enter__(self) -> Progress:
        """Shows the empty bar."""
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Leaves the last state on the screen, also where the run ended early."""
        self._bar.stop()
        if self._pending is not None:
            self._bar.say(self._pending)

    def update(self, step: int, values: Mapping[str, float | None]) -> None:
        """Shows the state after `step` (0: before training); `values` by the names of `METRICS`, any may be missing."""
        now = self._clock()
        if self._last is not None and step > self._last[1]:
            self._seconds_per_step.append((now - self._last[0]) / (step - self._last[1]))
        self._last = (now, step)
        text = " ".join([f"{step:>{len(str(self.total))}}/{self.total}", *_parts(values), *self._timing(step, values)])
        evaluation = _evaluation(values)
        if self._bar.is_live:
            if evaluation:
                self._bar.say(f"{self.title} step {step}: {', '.join(evaluation)}")
            self._bar.update(step, self.total, text)
            return
        self._pending = " ".join([self.title, "step", text, *evaluation])
        due = self._shown_at is None or now - self._shown_at >= PLAIN_INTERVAL_S
        if due or evaluation or step >= self.total:
            self._bar.say(self._pending)
            self._shown_at, self._pending = now, None

    def evaluating(self, step: int, what: str, done: int, total: int) -> None:
        """Shows how many of an evaluation's completions are drawn after `step`; `what` is evaluated."""
        now = self._clock()
        if self._evaluation != (step, what):
            self._evaluation, self._evaluation_shown_at = (step, what), now
        text = f"evaluating {what}: {done}/{total} completions"
        if self._bar.is_live:
            self._bar.update(step, self.total, f"{step:>{len(str(self.total))}}/{self.total} {text}")
        elif now - self._evaluation_shown_at >= EVALUATION_INTERVAL_S:
            self._evaluation_shown_at = now
            self._bar.say(f"{self.title} step {step}: {text}")

    def _timing(self, step: int, values: Mapping[str, float | None]) -> list[str]:
        """Seconds of this step, and the time left at the mean pace of the last steps, evaluations included."""
        parts = []
        if (seconds := values.get("time/step_s")) is not None:
            parts.append(f"{seconds:.2f}s/step")
        if self._seconds_per_step and step < self.total:
            pace = sum(self._seconds_per_step) / len(self._seconds_per_step)
            parts.append(f"eta {format_duration(pace * (self.total - step))}")
        return parts


def format_duration(seconds: float) -> str:
    """Hours, minutes and seconds as a clock shows them.

    >>> format_duration(74.4), format_duration(3600)
    ('1:14', '1:00:00')
    """
    minutes, seconds_left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds_left:02d}" if hours else f"{minutes}:{seconds_left:02d}"


def _compact(value: float, digits: int = 3) -> str:
    """The value as text of nearly constant width."""
    return f"{value:.{digits}f}" if 0.01 <= abs(value) < 100.0 or value == 0.0 else f"{value:.3g}"


def _parts(values: Mapping[str, float | None]) -> list[str]:
    parts = []
    if (loss := values.get("loss")) is not None:
        parts.append(f"loss {_compact(loss)}")
    if (grad_norm := values.get("grad_norm")) is not None:
        parts.append(f"grad {_compact(grad_norm, 2)}")
    mean, largest = values.get("weight/mean"), values.get("weight/max")
    if mean is not None and largest is not None:
        parts.append(f"w {mean:.2f}/{largest:.2f}")
    if (accuracy := values.get("rollout/accuracy")) is not None:
        parts.append(f"acc {accuracy:.2f}")
    return parts


def _evaluation(values: Mapping[str, float | None]) -> list[str]:
    names = {"eval/accuracy_greedy": "greedy accuracy", "eval/accuracy_sampled": "sampled accuracy"}
    names |= {name: f"{name.split('/')[1]} avg@n" for name in values if family_of(name) == "eval/*/avg_at_n"}
    return [f"{text} {value:.3f}" for name, text in names.items() if (value := values.get(name)) is not None]
