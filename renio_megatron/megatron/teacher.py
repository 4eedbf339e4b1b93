"""A frozen model that scores completions: no DDP buffers, no optimiser state, no gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from renio_megatron.data.collate import collate
from renio_megatron.errors import NumericsError
from renio_megatron.megatron.model import ModelPart
from renio_megatron.megatron.pipeline import run_forward, share_tokens
from renio_megatron.parallel.batch import sum_pieces
from renio_megatron.records import MicroBatch, Rollout, TeacherScores
from renio_megatron.settings import TrainConfig
from renio_megatron.token_logp import token_logp


class MegatronTeacher:
    """Reads the teacher's view of each prompt and the student's completion.

    Of its pass only the final hidden states at completion rows are kept; `logits` applies its LM-head shard to one
    micro-batch's rows at a time.
    """

    def __init__(self, part: ModelPart, train: TrainConfig, *, temperature: float, pad_id: int) -> None:
        """Freezes `part`; log-probabilities are at `temperature`."""
        for chunk in part.chunks:
            chunk.requires_grad_(False)
        part.train(False)
        self._part = part
        self._temperature = temperature
        self._arrangement = part.arrangement(pad_id, train.micro_batch_size, train.max_tokens_per_micro_batch)

    def score(self, rollouts: Sequence[Rollout], student_batches: Sequence[MicroBatch]) -> TeacherScores:
        """Log-probabilities of the sampled tokens, and the hidden states that the loss will want.

        Args:
            rollouts: this rank's.
            student_batches: the same rollouts as the student's micro-batches, whose rows the payload follows.
        Raises:
            NumericsError: a log-probability is NaN or infinite.
        """
        part, layout = self._part, self._part.layout
        micro_batches = [
            micro_batch.to(layout.device)
            for micro_batch in collate(rollouts, view="teacher", arrangement=self._arrangement)
        ]

        def keep(index: int, micro_batch: MicroBatch, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            logits = part.head_logits(rows)
            return token_logp(logits, micro_batch.target_ids, part.shard, temperature=self._temperature), rows

        kept = run_forward(part, micro_batches, keep)
        logp = share_tokens([logp for logp, _ in kept], micro_batches, layout)
        if not bool(torch.isfinite(logp).all()):
            raise NumericsError(
                f"rank {layout.rank}: the teacher's log-probabilities hold NaN or infinity. "
                "Check the teacher's weights and precision."
            )
        payload = self._payload([rows for _, rows in kept], micro_batches, student_batches)
        return TeacherScores(logp, payload)

    @torch.no_grad()
    def logits(self, payload: torch.Tensor) -> torch.Tensor:
        """Logits of one micro-batch's rows at this rank's columns: [N, H] -> [N, L]."""
        return self._part.head_logits(payload)

    def _payload(
        self, rows: list[torch.Tensor], micro_batches: Sequence[MicroBatch], student_batches: Sequence[MicroBatch]
    ) -> list[torch.Tensor]:
        """Hidden states in the order of the student's micro-batches; on the last stage only.

        The teacher's prompt is of another length, so packing and context parallelism cut its sequences elsewhere: the
        rows are put back in the rollouts' order, and each rank takes those whose tokens it trains.
        """
        if not rows:
            return []
        layout = self._part.layout
        if layout.context.size == 1 and all(
            torch.equal(mine.token_index, theirs.token_index)
            for mine, theirs in zip(micro_batches, student_batches, strict=False)
        ):
            return rows
        count = sum(int(micro_batch.lengths.sum()) for micro_batch in micro_batches)
        flat = torch.zeros(count, rows[0].shape[1], dtype=rows[0].dtype, device=rows[0].device)
        for values, micro_batch in zip(rows, micro_batches, strict=True):
            flat[micro_batch.token_index] = values
        rows.clear()
        flat = sum_pieces(flat, layout.context.group)
        wanted = flat[torch.cat([micro_batch.token_index for micro_batch in student_batches])]
        return list(wanted.split([len(micro_batch.token_index) for micro_batch in student_batches]))
