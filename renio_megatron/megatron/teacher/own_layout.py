"""Student side of a frozen teacher in a separate layout, on the student's ranks or on dedicated ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from renio_megatron.megatron.teacher.logp import broadcast_teacher_logp
from renio_megatron.megatron.teacher.payload import ShardedPayload, gather_pieces
from renio_megatron.megatron.teacher.scoring import ScoringEndpoint, ScoringRequest
from renio_megatron.megatron.teacher.weights import Averages
from renio_megatron.parallel.layout import ParallelLayout
from renio_megatron.parallel.row_exchange import RowAllToAll, RowsOf, sum_over
from renio_megatron.parallel.vocab import LmHead
from renio_megatron.training.targets import HiddenStateTargets
from renio_megatron.types import MicroBatch, Rollout


class OwnLayoutTeacher(ScoringEndpoint):
    """Scores the student's completions in the teacher's layout; on every rank of the student."""

    averages: Averages = ()
    """State for a checkpoint: none, its weights never change."""

    def after_update(self, *, skipped: bool) -> None:
        """Does nothing: the teacher does not follow the student."""

    @property
    def head(self) -> LmHead:
        """The LM head, sharded like the student's; on the student's last stage."""
        assert self._head is not None
        return self._head

    def prefetch(self, rollouts: Sequence[Rollout]) -> None:
        """Starts the scoring of a part of a step's rollouts on dedicated ranks while the student draws the others.

        Without such ranks everything is scored by `score`.

        Args:
            rollouts: some of this student rank's rollouts; every rank calls it equally often.
        """
        if self._bridge is not None:
            self._read(self._request(ScoringRequest.READ, rollouts), rollouts)

    def score(self, rollouts: Sequence[Rollout], student_batches: Sequence[MicroBatch]) -> HiddenStateTargets:
        """Log-probabilities of the sampled tokens, and the hidden states for the loss.

        Args:
            rollouts: all of this student rank's rollouts; with prefetching, exactly those that were prefetched.
            student_batches: the same rollouts as micro-batches; the payload has their row order.

        Raises:
            NumericsError: a log-probability is NaN or infinite.
        """
        student = self._student
        assert student is not None
        if not self._pending:
            self._read(self._request(ScoringRequest.READ, rollouts), rollouts)
        index, logp_of, states_of = self._collect(self._request(ScoringRequest.COLLECT, rollouts))
        if not index.num_sequences:  # one of several teachers, of whose sequences there are none in this step
            return HiddenStateTargets(torch.zeros(0, device=self._device), [], self._head_of, sent_bytes=0)
        batches = list(student_batches) if student.pipeline.is_last else []
        first = index.first_completion_token(student.data.rank)
        pieces = [_piece(first + batch.token_index.cpu(), student) for batch in batches]
        exchange = RowAllToAll(pieces, index.output_rank_of, self._rank_map.axis, self._device)
        logp = [exchange.fetch(number, logp_of, 1, torch.float32) for number in range(exchange.num_rounds)]
        whole = [
            gather_pieces(part, len(batch.token_index), student.tensor)[:, 0]
            for part, batch in zip(logp, batches, strict=False)
        ]
        flat = broadcast_teacher_logp(whole, student_batches, student)
        before = exchange.bytes_sent
        states = [self._fetch_states(exchange, number, states_of) for number in range(exchange.num_rounds)]
        sent = sum_over(exchange.bytes_sent - before, self._rank_map.axis, self._device)
        if not batches:
            return HiddenStateTargets(flat, [], self._head_of, sent_bytes=sent)
        payload = ShardedPayload(
            states[: len(batches)], [len(batch.token_index) for batch in batches], student.tensor, self._device
        )
        at_once = payload.piece_bytes if self._settings.payload_device == "device" else [max(payload.piece_bytes)]
        waiting = sum(at_once) + max(payload.whole_bytes)
        return HiddenStateTargets(flat, payload, self._head_of, payload_bytes=waiting, sent_bytes=sent)

    def _head_of(self) -> LmHead:
        return self.head

    def close(self) -> None:
        """Releases dedicated ranks of the teacher; called on every rank of the student."""
        if self._bridge is not None:
            self._request(ScoringRequest.END, [])

    def _request(self, request: ScoringRequest, rollouts: Sequence[Rollout]) -> list[torch.Tensor]:
        """The student's side of `_broadcast_request`: wakes dedicated ranks of the teacher, where there are any."""
        if self._bridge is not None:
            self._bridge.call()
        return self._broadcast_request(request, rollouts)[1]

    def _fetch_states(self, exchange: RowAllToAll, number: int, states_of: RowsOf) -> torch.Tensor:
        return self._put(exchange.fetch(number, states_of, self._width, self._dtype))


def _piece(numbers: torch.Tensor, student: ParallelLayout) -> torch.Tensor:
    """The part that this tensor rank requests; its peers request the rest."""
    size = -(-len(numbers) // student.tensor.size)
    return numbers[student.tensor.rank * size : (student.tensor.rank + 1) * size]
