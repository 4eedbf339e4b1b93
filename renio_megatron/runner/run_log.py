"""Outputs of a run while it trains: metrics, TensorBoard, rollouts, progress, warnings about settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from renio_megatron.config.schema import DistillationConfig, JobConfig
from renio_megatron.evaluation.evaluator import EvaluationObserver
from renio_megatron.losses.sample_weights import SampleWeights
from renio_megatron.runner.run_directory import RunDirectory
from renio_megatron.training.metrics.sinks import JsonlSink, Observer, TensorBoardSink
from renio_megatron.training.notices.observer import Notices
from renio_megatron.training.notices.rows import Watched
from renio_megatron.training.rollout_log import RolloutObserver, RolloutSink
from renio_megatron.types import Rollout

ProgressMaker = Callable[[str, int], AbstractContextManager[Any]]
"""(title, steps of the run) -> a context manager whose value has the methods of `metrics.progress.Progress`."""


class RunLog:
    """Receives every step's metrics and rollouts; writes and shows them while it is open, on the first rank."""

    def __init__(
        self,
        config: JobConfig,
        directory: RunDirectory,
        *,
        is_main: bool,
        title: str,
        progress: ProgressMaker | None = None,
    ) -> None:
        """Creates no file yet.

        Args:
            config: the settings.
            directory: directory of the files.
            is_main: whether this is the first rank; the others write and show nothing.
            title, progress: shows the run's progress under this title; None: nothing is shown.
        """
        self._config, self._directory = config, directory
        self._is_main, self._title, self._progress = is_main, title, progress
        self._observers: list[Observer] = []
        self._evaluating: list[EvaluationObserver] = []
        self._rollout_observers: list[RolloutObserver] = []

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Passes all metrics of a step to the outputs."""
        for observer in self._observers:
            observer(step, values)

    def evaluating(self, step: int, what: str, done: int, total: int) -> None:
        """Shows how far an evaluation is."""
        for observer in self._evaluating:
            observer(step, what, done, total)

    def rollouts(self, step: int, rollouts: Sequence[Rollout], sample: SampleWeights) -> None:
        """Passes this rank's rollouts of a step, with their weights, to the outputs."""
        for observer in self._rollout_observers:
            observer(step, rollouts, sample.weights.tolist())

    @contextmanager
    def opened(self, resumed_from: int) -> Iterator[None]:
        """Writes steps after `resumed_from` while the context lasts; later rows of an earlier start are dropped.

        Raises:
            CheckpointError, DataError: a file that cannot be written, or was not written by a run.
        """
        purge_step = resumed_from + 1 if resumed_from else 0
        with ExitStack() as stack:
            if self._is_main:
                for sink in (
                    JsonlSink(self._directory.metrics, purge_step=purge_step),
                    TensorBoardSink(self._directory.tensorboard, purge_step=purge_step),
                ):
                    stack.callback(sink.close)
                    self._observers.append(sink.write)
                if self._progress is not None:
                    shown = stack.enter_context(self._progress(self._title, self._config.train.train_iters))
                    self._observers.append(shown.update)
                    self._evaluating.append(shown.evaluating)
                self._observers.append(Notices(_watched(self._config)).update)
                if isinstance(self._config, DistillationConfig):
                    self._open_of_distillation(self._config, stack, purge_step)
            yield

    def _open_of_distillation(self, config: DistillationConfig, stack: ExitStack, purge_step: int) -> None:
        if config.rollout.log:
            log = RolloutSink(self._directory.rollouts, purge_step=purge_step)
            stack.callback(log.close)
            self._rollout_observers.append(log.write)


def _watched(config: JobConfig) -> Watched:
    """What notices read of the settings."""
    if not isinstance(config, DistillationConfig):
        return Watched(num_sequences=config.train.global_batch_size)
    return Watched(config.weighting, config.loss, config.train.global_batch_size, is_prefix=config.rollout.prefix)
