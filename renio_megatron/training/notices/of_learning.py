"""Notices about the update: a student that does not move."""

from __future__ import annotations

from collections.abc import Sequence

from renio_megatron.training.notices.rows import Notice, Row, Watched, always

FLAT_STEPS = 10
FLAT_SPREAD = 0.05
"""Between the largest and the smallest loss of these steps, relative to the larger: their prompts are others."""


def _stands_still(recent: Sequence[Row], watched: Watched) -> str | None:
    rows = [row for row in always(recent, FLAT_STEPS, "grad_norm", 0.0) if "loss" in row[1]]
    if len(rows) < FLAT_STEPS:
        return None
    losses = [row["loss"] for _, row in rows]
    if max(losses) - min(losses) > FLAT_SPREAD * max(map(abs, losses)):
        return None
    return (
        f"the gradient was exactly 0 in steps {rows[0][0]} to {rows[-1][0]}, and the loss stays near {losses[-1]:.3g}: "
        "the student does not learn any more. With a large loss its weights are most likely beyond repair: lower "
        "train.lr (warm up by train.lr_warmup_iters, keep train.clip_grad), and go on from a checkpoint before the "
        "loss jumped (checkpoint.load). With a loss of 0 student and teacher agree: check teacher.model."
    )


OF_LEARNING = (
    Notice(
        "the gradient is 0 and the loss flat",
        f"in each of {FLAT_STEPS} steps, losses within {FLAT_SPREAD:.0%}",
        _stands_still,
    ),
)
