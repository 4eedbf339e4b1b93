"""Watches a run's metrics and says each notice once."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping

from renio_megatron.training.notices.of_answers import OF_ANSWERS
from renio_megatron.training.notices.of_learning import OF_LEARNING
from renio_megatron.training.notices.of_weights import OF_WEIGHTS
from renio_megatron.training.notices.rows import LONG, Row, Watched

logger = logging.getLogger(__name__)

NOTICES = (*OF_ANSWERS, *OF_WEIGHTS, *OF_LEARNING)
"""All of them; `docs/guides/runs.md` lists them."""


class Notices:
    """An observer of a run's metrics."""

    def __init__(self, watched: Watched, report: Callable[[str], None] = logger.warning) -> None:
        """`watched` are the run's settings; `report` receives each text."""
        self._watched, self._report = watched, report
        self._recent: deque[Row] = deque(maxlen=LONG)
        self._waiting = list(NOTICES)

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes a step's metrics; step 0 (the evaluation before training) and skipped steps are ignored."""
        if step == 0 or metrics.get("train/skipped_frac"):
            return
        self._recent.append((step, metrics))
        for notice in list(self._waiting):
            text = notice.check(self._recent, self._watched)
            if text is not None:
                self._waiting.remove(notice)
                self._report(text)
