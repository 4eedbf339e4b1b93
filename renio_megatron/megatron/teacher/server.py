"""Teacher side on dedicated ranks: serves the requests of the student's ranks."""

from __future__ import annotations

import torch

from renio_megatron.megatron.teacher.scoring import ScoringEndpoint, ScoringRequest
from renio_megatron.parallel.row_exchange import RowAllToAll, sum_over


class TeacherServer(ScoringEndpoint):
    """Scores the student's completions, on ranks that only hold a teacher."""

    def serve(self) -> bool:
        """Serves one step, from the first `prefetch` to `score`; returns False when the student has ended."""
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
