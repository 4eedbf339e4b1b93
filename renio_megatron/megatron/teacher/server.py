"""The teacher's side of a teacher on ranks of its own: it answers what the student's ranks ask."""

from __future__ import annotations

import torch

from renio_megatron.megatron.teacher.scoring import ScoringEndpoint, ScoringRequest
from renio_megatron.parallel.row_exchange import RowAllToAll, sum_over


class TeacherServer(ScoringEndpoint):
    """Reads what the student writes, on ranks that only a teacher has."""

    def serve(self) -> bool:
        """Answers a step, from the first `prefetch` to `score`; False, and no more, where nothing follows."""
        assert self._bridge is not None
        while True:
            self._bridge.wait_for_call()
            request, sequences = self._broadcast_request(ScoringRequest.END, [])
            if request != ScoringRequest.READ:
                break
            self._read(sequences, [])
        if request == ScoringRequest.END:
            return False
        index, logp_of, states_of = self._collect(sequences)
        if not index.num_sequences:
            return True
        exchange = RowAllToAll([], index.output_rank_of, self._rank_map.axis, self._device)
        for number in range(exchange.num_rounds):
            exchange.fetch(number, logp_of, 1, torch.float32)
        before = exchange.bytes_sent
        for number in range(exchange.num_rounds):
            exchange.fetch(number, states_of, self._width, self._dtype)
        sum_over(exchange.bytes_sent - before, self._rank_map.axis, self._device)
        return True
