"""The loss of a micro-batch under sample weights that are already finished."""

from __future__ import annotations

from collections.abc import Callable

import torch

from renio_megatron.config import HeadConfig, LossConfig
from renio_megatron.losses.sample_weights import SampleWeights
from renio_megatron.objective.reduce import token_scale
from renio_megatron.parallel.vocab import LmHead
from renio_megatron.training.metrics.accumulator import MetricAccumulator
from renio_megatron.training.targets import LossInputs, TeacherTargets
from renio_megatron.types import MicroBatch


class WeightedLoss:
    """Weight x weighted mean divergence of each sequence, summed, for any kind of teacher targets.

    Does not synchronize with the device.
    """

    def __init__(
        self,
        targets: TeacherTargets,
        sample: SampleWeights,
        loss: LossConfig,
        head: HeadConfig,
        *,
        sampler_logp: torch.Tensor | None = None,
        on_divergence: Callable[[int, torch.Tensor], None] | None = None,
    ) -> None:
        """Keeps the targets and weights of all the rank's sequences in the step.

        Args:
            targets, sample: the teacher's targets and the weights of all the rank's sequences, in order.
            loss, head: the divergence, and how logits are computed.
            sampler_logp: log-probability of each token when it was drawn, nats [N]; None where it is not known.
            on_divergence: called with each micro-batch's index and the divergence at each of its rows [N], nats.
        """
        self._targets, self._sample, self._loss, self._head = targets, sample, loss, head
        self._sampler_logp, self._on_divergence = sampler_logp, on_divergence

    def __call__(
        self, index: int, micro_batch: MicroBatch, hidden: torch.Tensor, head: LmHead
    ) -> tuple[torch.Tensor, float, MetricAccumulator]:
        """(sum over sequences, number of sequences, metrics); of the rank's pieces of sequences under context
        parallelism."""
        sequences, tokens = micro_batch.sequence_index, micro_batch.token_index
        working = torch.promote_types(hidden.dtype, torch.float32)
        weights, denominators = self._sample.weights[sequences].to(working), self._sample.denominators[sequences]
        own = None if self._sample.token_weights is None else self._sample.token_weights[tokens]
        scale = token_scale(weights, denominators, micro_batch.owner, own, denominator=1.0)
        renio, probe = self._sample.renio, None
        if renio is not None and index == 0 and self._loss.entry_clip is not None:
            probe = renio.is_pivotal[tokens]
        found = self._targets.micro_batch_loss(
            index,
            micro_batch,
            LossInputs(
                hidden=hidden,
                head=head,
                token_scale=scale,
                sampler_logp=None if self._sampler_logp is None else self._sampler_logp[tokens],
                loss=self._loss,
                head_config=self._head,
                probe=probe,
            ),
        )
        if self._on_divergence is not None:
            self._on_divergence(index, found.token_divergence)
        share = micro_batch.num_sequences / micro_batch.cp_size  # all pieces together are the sequences
        accumulator, count = MetricAccumulator(), len(found.token_divergence)
        accumulator.add("loss", found.loss_sum, share)
        accumulator.add("loss/kl", found.divergence_sum, count)
        if found.clipped_tokens is not None:
            accumulator.add("loss/entry_clip_frac", found.clipped_tokens, count)
        if found.probe is not None:
            accumulator.add("renio/pivot_gradient_frac", *found.probe)
        accumulator.add_max("memory/teacher_payload_mb", self._targets.payload_bytes / 2**20)
        if self._targets.sent_bytes is not None:
            accumulator.add_max("teacher/payload_sent_mb", self._targets.sent_bytes / 2**20)
        return found.total, share, accumulator
