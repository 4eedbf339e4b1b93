"""Teacher log-probabilities of the sampled tokens, on every rank that needs them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from renio_megatron.errors import NumericsError
from renio_megatron.megatron.model.schedules import broadcast_token_values
from renio_megatron.parallel.layout import ParallelLayout
from renio_megatron.types import MicroBatch


def broadcast_teacher_logp(
    columns: Sequence[torch.Tensor], micro_batches: Sequence[MicroBatch], layout: ParallelLayout
) -> torch.Tensor:
    """Log-probabilities of the rank's completion tokens, nats fp32 [N], from those of the last pipeline stage.

    Args:
        columns, micro_batches, layout: as in `broadcast_token_values`.

    Raises:
        NumericsError: NaN or infinity among them, on every rank of the model.
    """
    logp = broadcast_token_values(columns, micro_batches, layout)
    if not bool(torch.isfinite(logp).all()):
        raise NumericsError(
            f"rank {layout.rank}: the teacher's log-probabilities hold NaN or infinity. "
            "Check the teacher's weights and precision."
        )
    return logp
