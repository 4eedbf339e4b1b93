"""A frozen model that scores completions: no DDP buffers, no optimiser state, no gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from renio_megatron.data.collate import collate, flat_completions
from renio_megatron.errors import NumericsError
from renio_megatron.megatron.model import ModelPart
from renio_megatron.megatron.pipeline import broadcast_from_last_stage, run_forward
from renio_megatron.records import MicroBatch, Rollout, TeacherScores
from renio_megatron.token_logp import token_logp


class MegatronTeacher:
    """Reads the teacher's view of each prompt and the student's completion.

    Of its pass only the final hidden states at completion rows are kept; `logits` applies its LM-head shard to one
    micro-batch's rows at a time.
    """

    def __init__(self, part: ModelPart, *, temperature: float, micro_batch_size: int, pad_id: int) -> None:
        """Freezes `part`; log-probabilities are at `temperature`."""
        part.module.requires_grad_(False)
        part.module.eval()
        self._part = part
        self._temperature = temperature
        self._micro_batch_size = micro_batch_size
        self._pad_id = pad_id

    def score(self, rollouts: Sequence[Rollout]) -> TeacherScores:
        """Log-probabilities of the sampled tokens, and the hidden states that the loss will want."""
        part, device = self._part, self._part.layout.device
        micro_batches = [
            micro_batch.to(device)
            for micro_batch in collate(
                rollouts,
                view="teacher",
                micro_batch_size=self._micro_batch_size,
                pad_id=self._pad_id,
                multiple_of=part.length_multiple,
            )
        ]

        def keep(index: int, micro_batch: MicroBatch, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            logits = part.head_logits(rows)
            return token_logp(logits, micro_batch.target_ids, part.shard, temperature=self._temperature), rows

        kept = run_forward(part, micro_batches, keep)
        token_ids, _, _ = flat_completions(rollouts)
        if part.layout.pipeline.is_last:
            logp = torch.cat([logp for logp, _ in kept])
            if not bool(torch.isfinite(logp).all()):
                raise NumericsError(
                    f"rank {part.layout.rank}: the teacher's log-probabilities hold NaN or infinity. "
                    "Check the teacher's weights and precision."
                )
        else:
            logp = torch.empty(len(token_ids), dtype=torch.float32, device=device)
        return TeacherScores(broadcast_from_last_stage(logp, part.layout), [rows for _, rows in kept])

    @torch.no_grad()
    def logits(self, payload: torch.Tensor) -> torch.Tensor:
        """Logits of one micro-batch's rows at this rank's columns: [N, H] -> [N, L]."""
        return self._part.head_logits(payload)
