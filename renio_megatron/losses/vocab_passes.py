"""The three passes and two exchanges of a divergence over vocabulary shards, which both forms of the loss use.

Pass 1 finds the normalizers of both distributions, pass 2 the totals of the clamped entries, pass 3 writes the
gradient. After each of the first two the ranks of the tensor group exchange a few numbers per token; an unclipped KL
needs neither pass 2 nor its exchange.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch

from renio_megatron.config import LossConfig
from renio_megatron.losses import kernels
from renio_megatron.losses.entropy import entropy
from renio_megatron.objective.divergences import Divergence, divergence_of
from renio_megatron.parallel.vocab import (
    LogNormalizers,
    VocabShard,
    gather_statistics,
    merge_statistics,
    sum_in_rank_order,
)


@dataclass(frozen=True)
class Totals:
    """Each token's totals over the whole vocabulary, [N] each.

    Attributes:
        value: the divergence after the entry bounds, nats.
        slope: G, the sum of the entries' slopes.
        clipped: entries that `entry_clip` cut.
    """

    value: torch.Tensor
    slope: torch.Tensor
    clipped: torch.Tensor


class VocabParallelPasses:
    """The passes of one divergence over one shard; nothing here is differentiated."""

    def __init__(self, loss: LossConfig, shard: VocabShard) -> None:
        """`loss` names the divergence, `shard` the columns of every tensor of logits."""
        self._divergence: Divergence = divergence_of(loss.beta, loss.divergence)
        self._shard, self._temperature = shard, loss.temperature
        self._in_one_round = self._divergence.mean_under is not None and loss.entry_clip is None
        mean_under = self._divergence.mean_under if self._in_one_round else None
        self._cross_term_sign = {"teacher": 1, "student": -1, None: 0}[mean_under]
        self._columns: dict[str, Any] = {"num_valid": shard.num_valid, "temperature": loss.temperature}
        self._settings: dict[str, Any] = {
            **self._columns,
            "beta": loss.beta,
            "entry_clip": loss.entry_clip,
            "entry_floor": loss.entry_floor,
        }

    def normalizers(
        self, student_logits: torch.Tensor, teacher_logits: torch.Tensor, token_ids: torch.Tensor
    ) -> LogNormalizers:
        """Pass 1 over logits [N, L], and the first exchange.

        Raises:
            LayoutError: the group's shards do not make up the vocabulary, or are of different tokens.
        """
        columns = self._shard.local_columns(token_ids)
        local = kernels.statistics(
            student_logits, teacher_logits, columns, cross_term_sign=self._cross_term_sign, **self._columns
        )
        return merge_statistics(gather_statistics(local, self._shard, token_ids), self._cross_term_sign)

    def inputs(
        self,
        wanted: Collection[str],
        student_logits: torch.Tensor,
        teacher_logits: torch.Tensor,
        normalizers: LogNormalizers,
    ) -> dict[str, torch.Tensor]:
        """Inputs of a weighting from logits [N, L]: those of `LOGIT_INPUTS` that are `wanted`, nats [N] each.

        Each takes one more exchange.
        """
        normal, found = normalizers, {}
        for name, logits, sums in (
            ("student_entropy", student_logits, (normal.student_max, normal.student_log_sum)),
            ("teacher_entropy", teacher_logits, (normal.teacher_max, normal.teacher_log_sum)),
        ):
            if name in wanted:
                found[name] = entropy(logits, *sums, self._shard, temperature=self._temperature)
        if "divergence" in wanted:
            nothing = normalizers.student_logp
            found["divergence"] = self.totals_and_gradient(
                student_logits, teacher_logits, normalizers, nothing, None
            ).value
        return found

    def totals_and_gradient(
        self,
        student_logits: torch.Tensor,
        teacher_logits: torch.Tensor,
        normalizers: LogNormalizers,
        scale_N: torch.Tensor,
        out: torch.Tensor | None,
    ) -> Totals:
        """Passes 2 and 3, and the second exchange, where pass 1 is not enough.

        Args:
            student_logits, teacher_logits: as in pass 1.
            normalizers: result of pass 1.
            scale_N: factor of each token's divergence in the loss.
            out: [N, L] for the gradient of sum(scale x divergence) in the student's logits, may be `student_logits`
                itself; None: no gradient is computed.
        """
        divergence, group = self._divergence, self._shard.group
        models = student_logits, teacher_logits, normalizers
        is_whole = group is None or group.size() == 1
        if self._in_one_round:
            assert divergence.total_slope is not None
            value = normalizers.cross
            totals = Totals(value, divergence.total_slope(value), torch.zeros_like(value))
        elif is_whole and out is not None:
            sums = kernels.sums_and_gradient(*models, divergence, scale_N, out, **self._settings)
            return Totals(*sums.unbind(1))
        else:
            sums = kernels.clamped_sums(*models, divergence, **self._settings)
            totals = Totals(*sum_in_rank_order(sums, group).unbind(1))
        if out is not None:
            kernels.weighted_gradient(*models, divergence, totals.slope, scale_N, out, **self._settings)
        return totals
