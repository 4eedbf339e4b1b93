"""Teacher in the student's layout: forward-only scoring, and final hidden states for the loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from renio_megatron.config import HeadConfig, TrainConfig
from renio_megatron.data.batching.collate import collate
from renio_megatron.losses.token_logp import linear_token_logp
from renio_megatron.megatron.model.schedules import run_forward
from renio_megatron.megatron.teacher.logp import broadcast_teacher_logp
from renio_megatron.megatron.teacher.payload import RecomputedPayload, StoredPayload, align
from renio_megatron.megatron.teacher.weights import Averages, TeacherWeights
from renio_megatron.parallel.vocab import LmHead
from renio_megatron.training.targets import HiddenStateTargets
from renio_megatron.types import MicroBatch, Rollout


class SharedLayoutTeacher:
    """Scores the teacher's view of each prompt with the student's completion.

    Attributes:
        weights: the teacher's weights.

    Of its pass only the final hidden states at completion rows are kept; the loss applies the LM head to them chunk by
    chunk.
    """

    def __init__(
        self,
        weights: TeacherWeights,
        train: TrainConfig,
        head: HeadConfig,
        *,
        temperature: float,
        pad_id: int,
        payload_device: str = "device",
    ) -> None:
        """Scores with `weights`; log-probabilities are at `temperature`, hidden states are stored on
        `payload_device`."""
        # With other weights than a frozen model's no pass is possible in the middle of the student's step.
        assert type(weights) is TeacherWeights or payload_device != "recompute"
        part = weights.part
        self.weights, self._part = weights, part
        self._head_config = head
        self._temperature = temperature
        self._payload_device = payload_device
        self._batch_layout = part.batch_layout(pad_id, train.micro_batch_size, train.max_tokens_per_micro_batch)

    @property
    def averages(self) -> Averages:
        """The averages that a checkpoint must hold."""
        return self.weights.averages

    @property
    def head(self) -> LmHead:
        """The LM head, sharded like the student's."""
        return self.weights.head

    def after_update(self, *, skipped: bool) -> None:
        """Updates a teacher that follows the student; `skipped`: the student's step was skipped."""
        self.weights.after_update(skipped=skipped)

    def prefetch(self, rollouts: Sequence[Rollout]) -> None:
        """Does nothing: the ranks that would score them are sampling."""

    def score(self, rollouts: Sequence[Rollout], student_batches: Sequence[MicroBatch]) -> HiddenStateTargets:
        """Log-probabilities of the sampled tokens, and the hidden states for the loss.

        Args:
            rollouts: this rank's rollouts.
            student_batches: the same rollouts as the student's micro-batches; the payload has their row order.
        Raises:
            NumericsError: a log-probability is NaN or infinite.
        """
        part, layout = self._part, self._part.layout
        if not rollouts:  # one of several teachers, of whose sequences this rank has none
            return HiddenStateTargets(torch.zeros(0, device=layout.device), [], self._head_of)
        micro_batches = self._arrange(rollouts)

        def keep(index: int, micro_batch: MicroBatch, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
            logp = linear_token_logp(rows, self.head, micro_batch.target_ids, self._head_config, self._temperature)
            return logp, self._place(rows)

        with self.weights.activated():
            kept = run_forward(part, micro_batches, keep)
        logp = broadcast_teacher_logp([logp for logp, _ in kept], micro_batches, layout)
        rows = [states for _, states in kept if states is not None]
        if self._payload_device == "recompute":
            width, dtype = part.config.hidden_size, part.config.params_dtype
            bytes_of = [len(batch.token_index) * width * dtype.itemsize for batch in student_batches]
            payload_of = RecomputedPayload(rollouts, student_batches, self._hidden_states)
            return HiddenStateTargets(logp, payload_of, self._head_of, payload_bytes=max(bytes_of))
        if not rows:
            return HiddenStateTargets(logp, [], self._head_of)
        payload = StoredPayload(align(rows, micro_batches, student_batches, layout.context.group), layout.device)
        sizes = payload.part_bytes
        waiting = max(sizes) if self._payload_device == "host" else sum(sizes)
        return HiddenStateTargets(logp, payload, self._head_of, payload_bytes=waiting)

    def _head_of(self) -> LmHead:
        return self.head

    def tune(self, num_tokens: int) -> None:
        """Tunes the kernels of `score`, for micro-batches of at most `num_tokens` completion tokens."""
        self._part.tune_scores(self._head_config, self._temperature, num_tokens)

    def close(self) -> None:
        """Does nothing: no ranks wait for this teacher."""

    def _arrange(self, rollouts: Sequence[Rollout]) -> list[MicroBatch]:
        micro_batches = collate(rollouts, audience="teacher", batch_layout=self._batch_layout)
        return [micro_batch.to(self._part.layout.device) for micro_batch in micro_batches]

    def _place(self, rows: torch.Tensor) -> torch.Tensor | None:
        """The rows on the device where they are stored for the loss; None where they are recomputed."""
        if self._payload_device == "device":
            return rows
        if self._payload_device == "recompute":
            return None
        waiting = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=rows.is_cuda)
        return waiting.copy_(rows)

    def _hidden_states(self, rollouts: Sequence[Rollout], student_batch: MicroBatch) -> torch.Tensor:
        """Hidden states for the loss of one of the student's micro-batches; `rollouts` are its own, in its order."""
        micro_batches = self._arrange(rollouts)
        rows = run_forward(self._part, micro_batches, lambda index, micro_batch, states: states)
        return align(rows, micro_batches, [student_batch], self._part.layout.context.group)[0]
