"""Slows a run's draws down while a file is there, so that a test can do something in the middle of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from tests.helpers.jobs import injected

SECONDS = 10.0
"""From a request to stop to the end of all, on a machine that does other things as well; the draws take far longer."""

# Passes of a phase take longer while a file of its name is there; the first of them leaves another file.
_PATCH = """
def patch(module):
    import os, pathlib, time
    from renio_megatron.megatron.student.sampler import MegatronSampler

    sample, forward = MegatronSampler.sample, MegatronSampler._forward
    slow, inside = pathlib.Path(FOLDER, PHASE), pathlib.Path(FOLDER, "in " + PHASE)
    calls, is_slow = 0, False

    def in_a_phase(self, prompts, sampling_params, *, rng_stream, on_group=None):
        nonlocal calls, is_slow
        is_phase = PHASE == ("evaluating" if rng_stream == (0, 1) else "drawing")
        calls += is_phase
        is_slow = is_phase and calls > AFTER and slow.exists()
        return sample(self, prompts, sampling_params, rng_stream=rng_stream, on_group=on_group)

    def slow_forward(self, *args):
        if is_slow:
            inside.touch()
            time.sleep(PAUSE)
        return forward(self, *args)

    MegatronSampler.sample, MegatronSampler._forward = in_a_phase, slow_forward
"""


class SlowDraws:
    """Draws of training (`drawing`) or of evaluations (`evaluating`) that take `pause` seconds a pass.

    Those after the first `after` calls of the sampler are slow: one for a step, two for an evaluation.

    Attributes:
        path: for PYTHONPATH of the run.
    """

    def __init__(self, folder: Path, phase: str, *, after: int, ranks: tuple[str, ...], pause: float = 0.5) -> None:
        patch = _PATCH
        for word, value in (("FOLDER", str(folder)), ("PHASE", phase), ("AFTER", after), ("PAUSE", pause)):
            patch = patch.replace(word, repr(value))
        self.path = injected(folder, patch, ranks)
        self._slow, self._inside = folder / phase, folder / f"in {phase}"
        self._slow.touch()

    def wait(self, failed: Callable[[], str | None], seconds: float = 150.0) -> None:
        """Until a slow pass has begun; fails with what `failed` says, where it says something."""
        end = time.monotonic() + seconds
        while not self._inside.exists():
            problem = failed()
            assert problem is None, problem
            assert time.monotonic() < end, f"no slow pass after {seconds} s"
            time.sleep(0.01)

    def end(self) -> None:
        """A run that is started from now on has none."""
        self._slow.unlink()
