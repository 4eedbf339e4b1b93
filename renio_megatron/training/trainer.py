"""The training loop: prompts, the algorithm's step, metrics, evaluation, checkpoints; independent of Megatron."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from renio_megatron.errors import CheckpointError, NumericsError
from renio_megatron.parallel.stopping import Abandoned
from renio_megatron.training.algorithms import Algorithm
from renio_megatron.training.interfaces import Checkpointer
from renio_megatron.training.metrics.sinks import Observer
from renio_megatron.types import Prompt

MAX_SKIPPED_STEPS = 10
"""Steps in a row that may be skipped. Where 30% are, by chance, ten in a row come once in 170,000 steps."""


@dataclass
class Trainer:
    """Everything a run needs, and the loop over it.

    Attributes:
        algorithm: one optimizer step.
        prompts: (start, count) -> prompts of the run's endless order.
        checkpointer: saves and restores the run.
        train_iters, global_batch_size: steps of the run, sequences of a step.
        data_rank, data_size: this rank's share of each step: consecutive sequences.
        save_interval: steps between checkpoints; the last step is saved in any case.
        evaluate: step -> accuracies of the current student; None: no evaluation.
        evaluate_every: steps between evaluations; the start and the end are evaluated as well.
        observers: called with every step's metrics, and with the evaluation before the first step as step 0.
        stop_requested: called after every step, on every rank, whether the run must stop; all ranks get one answer.
            Draws, and evaluations, may also raise `Abandoned` on every rank.
        step, cursor: optimizer steps done, prompts used.
        stopped: whether `run` ended because a stop was requested.
    """

    algorithm: Algorithm
    prompts: Callable[[int, int], Sequence[Prompt]]
    checkpointer: Checkpointer
    train_iters: int
    global_batch_size: int
    data_rank: int = 0
    data_size: int = 1
    save_interval: int = 100
    evaluate: Callable[[int], dict[str, float]] | None = None
    evaluate_every: int = 0
    observers: Sequence[Observer] = ()
    stop_requested: Callable[[], bool] = lambda: False
    step: int = 0
    cursor: int = 0
    stopped: bool = False
    _skipped: int = field(default=0, init=False)
    _untold: dict[str, float] | None = field(default=None, init=False)
    """Metrics of the last step, where its evaluation was given up."""

    def resume(self) -> int:
        """Restores the newest checkpoint, where there is one; returns its step, 0 for a new run.

        Raises:
            CheckpointError: it is of another kind of run.
        """
        found = self.checkpointer.load()
        if found is not None:
            self.step, state = found
            mine, saved = self.algorithm.state().keys(), state["algorithm"].keys()
            if mine != saved:
                raise CheckpointError(
                    f"the checkpoint is of another kind of run: its algorithm keeps {sorted(saved)}, this one "
                    f"{sorted(mine)}. Write its model with `renio export` and give that as `model`."
                )
            self.cursor, self._untold = state["cursor"], state.get("untold")
            self.algorithm.restore(state["algorithm"])
        return self.step

    def run(self) -> dict[str, float]:
        """Runs the remaining steps, or until a stop is requested; returns the last step's metrics.

        A step of which the draws, or the evaluation after it, are given up leaves the state after the last update. The
        run goes on with the draws, or with the evaluation.

        Raises:
            NumericsError: a metric that is not finite, or `MAX_SKIPPED_STEPS` steps in a row that were skipped.
            CheckpointError: the state cannot be written.
        """
        try:
            metrics = self._run()
        except Abandoned:
            self.stopped, metrics = True, {}
            if self.step:
                self.checkpointer.save(self.step, self._state())
        self.checkpointer.finish()
        return metrics

    def _run(self) -> dict[str, float]:
        metrics: dict[str, float] = {}
        if self.step == 0 and self.evaluate is not None:
            self._tell(0, self.evaluate(0))
        while (self.step < self.train_iters or self._untold is not None) and not self.stopped:
            if self._untold is None:
                self._untold = self._train_step()
            metrics = self._untold
            if self.evaluate is not None and self._is_due(self.evaluate_every):
                metrics = metrics | self.evaluate(self.step)
            self._tell(self.step, metrics)
            self._untold = None
            self._check_progress(metrics)
            self.checkpointer.poll()
            self.stopped = self.step < self.train_iters and self.stop_requested()
            if self.stopped or self._is_due(self.save_interval):
                self.checkpointer.save(self.step, self._state())
        return metrics

    def next_prompts(self) -> Sequence[Prompt]:
        """This rank's prompts of the next step."""
        share = self.global_batch_size // self.data_size
        return self.prompts(self.cursor + self.data_rank * share, share)

    def _train_step(self) -> dict[str, float]:
        start = time.perf_counter()
        metrics = self.algorithm.step(self.next_prompts(), self.step + 1)
        self.step += 1
        self.cursor += self.global_batch_size
        seconds = time.perf_counter() - start
        metrics["time/step_s"] = seconds
        if "rollout/tokens" in metrics:
            metrics["tokens_per_s"] = metrics["rollout/tokens"] / seconds
        return metrics

    def _check_progress(self, metrics: dict[str, float]) -> None:
        """Raises `NumericsError` after too many consecutive skipped steps: the cause is persistent."""
        self._skipped = self._skipped + 1 if metrics.get("train/skipped_frac") == 1.0 else 0
        if self._skipped and self._skipped >= min(MAX_SKIPPED_STEPS, self.train_iters):
            raise NumericsError(
                f"steps {self.step - self._skipped + 1} to {self.step} were all left out, because their gradients were "
                "not finite (train.skip_nonfinite_steps): the student has stopped learning. Lower train.lr, check the "
                "data and both models' weights for values that are not finite, or train in fp32."
            )

    def _is_due(self, interval: int) -> bool:
        """Whether this step closes an interval, or the run."""
        return interval > 0 and (self.step % interval == 0 or self.step == self.train_iters)

    def _tell(self, step: int, metrics: dict[str, float]) -> None:
        bad = [name for name, value in metrics.items() if value != value or abs(value) == float("inf")]
        if bad:
            raise NumericsError(
                f"step {step}: {', '.join(bad)} is not finite. Lower the learning rate, or check the data of this step."
            )
        for observer in self.observers:
            observer(step, {"step": step, **metrics})

    def _state(self) -> dict[str, Any]:
        untold = {} if self._untold is None else {"untold": self._untold}
        return {"cursor": self.cursor, "algorithm": self.algorithm.state(), **untold}
