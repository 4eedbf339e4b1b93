"""Teacher targets: log-probabilities of the sampled tokens, and the loss against the teacher.

The algorithm does not depend on the kind of targets: hidden states, several teachers' hidden states, the most likely
tokens from a server, or the sampled tokens alone are all `TeacherTargets`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from renio_megatron.config import HeadConfig, LossConfig
from renio_megatron.errors import ConfigError
from renio_megatron.losses.chunked_logits import Logits, logits_dtype_of
from renio_megatron.losses.chunked_loss import linear_divergence, linear_token_inputs
from renio_megatron.losses.token_logp import linear_token_scores
from renio_megatron.losses.vocab_passes import VocabParallelPasses
from renio_megatron.objective.weightings import OF_STUDENT
from renio_megatron.parallel.layout import ParallelLayout
from renio_megatron.parallel.reductions import sum_over_group
from renio_megatron.parallel.vocab import LmHead
from renio_megatron.types import MicroBatch

MAX_PIVOTAL_TOKENS = 64
"""Tokens at which the gradient under the entry clip is measured, few, so that their full logits take little memory."""


@dataclass(frozen=True)
class LossInputs:
    """The student's side of a micro-batch's loss.

    Attributes:
        hidden: final hidden states at its completion rows [N, H]; the caller sums their gradient over the tensor group.
        head: the student's LM head.
        token_scale: factor of each token's divergence: weight / tokens of its sequence [N].
        sampler_logp: log-probability of each token when it was drawn, nats [N]; None where it is not known.
        loss, head_config: the divergence, and how logits are computed.
        probe: tokens at which `MicroBatchLoss.probe` is wanted, bool [N]; None: nowhere.
    """

    hidden: torch.Tensor
    head: LmHead
    token_scale: torch.Tensor
    sampler_logp: torch.Tensor | None
    loss: LossConfig
    head_config: HeadConfig
    probe: torch.Tensor | None = None


@dataclass(frozen=True)
class MicroBatchLoss:
    """The loss of a micro-batch and its statistics; all on the device, nothing is read by the host.

    Attributes:
        total: sum over tokens of token_scale x divergence, scalar, differentiable by the hidden states and the head.
        token_divergence: nats [N], without gradient.
        loss_sum, divergence_sum: `total` and the sum of `token_divergence` for the metrics, fp64.
        clipped_tokens: tokens at which a bound cut a vocabulary entry; None where there are no bounds.
        probe: squared gradient with respect to the logits at some of the probed tokens, under the loss as it is and
            without its entry clip, two numbers of the whole tensor group; None where the targets cannot compute it.
    """

    total: torch.Tensor
    token_divergence: torch.Tensor
    loss_sum: torch.Tensor
    divergence_sum: torch.Tensor
    clipped_tokens: torch.Tensor | None = None
    probe: torch.Tensor | None = None

    @classmethod
    def of(
        cls,
        total: torch.Tensor,
        token_divergence: torch.Tensor,
        clipped_entries: torch.Tensor | None = None,
        probe: torch.Tensor | None = None,
    ) -> MicroBatchLoss:
        """The loss from per-token divergences; `clipped_entries` are vocabulary entries that were cut [N]."""
        return cls(
            total,
            token_divergence,
            loss_sum=total.detach().double(),
            divergence_sum=token_divergence.sum().double(),
            clipped_tokens=None if clipped_entries is None else (clipped_entries > 0).sum(),
            probe=probe,
        )


class TeacherTargets(ABC):
    """A teacher's targets for a rank's rollouts.

    Attributes:
        logp: log-probability of each sampled token under the teacher at the loss temperature, nats fp32 [N], equal on
            all ranks that share the sequences.
        has_logp: where it is known, bool [N]; None: everywhere. Elsewhere `logp` is the student's own: a log ratio of
            0.
        has_distribution: whether `token_inputs` knows the teacher's whole distribution.
        payload_bytes: bytes that are stored for the loss on the device at a time.
        sent_bytes: bytes of hidden states sent between ranks, over all ranks; None where none were sent.
        names, name_of: for several teachers their names, and the index of each sequence's teacher in them, int64 [B];
            None where there is one.
    """

    logp: torch.Tensor
    has_logp: torch.Tensor | None = None
    has_distribution: bool = False
    payload_bytes: int = 0
    sent_bytes: int | None = None
    names: tuple[str, ...] = ()
    name_of: torch.Tensor | None = None

    def token_inputs(
        self, wanted: frozenset[str], index: int, micro_batch: MicroBatch, inputs: LossInputs
    ) -> dict[str, torch.Tensor]:
        """Inputs from logits before the loss: `student_logp`, `teacher_logp`, those of `LOGIT_INPUTS`; nats [N] each.

        Called on the stage that has the student's LM head, in order; `inputs.token_scale` is not used.

        Raises:
            ConfigError: these targets cannot compute them.
        """
        if rest := sorted(wanted - OF_STUDENT):
            raise ConfigError(
                f"the weighting needs {' and '.join(rest)}, which this teacher's answers do not tell. Choose another "
                "weighting, or a teacher of which hidden states are known."
            )
        return _of_student(wanted, micro_batch, inputs)

    @abstractmethod
    def micro_batch_loss(self, index: int, micro_batch: MicroBatch, inputs: LossInputs) -> MicroBatchLoss:
        """The loss of the student's micro-batch `index`; called once, in order, on the stage with the student's LM
        head."""

    def metrics(self, layout: ParallelLayout) -> dict[str, float]:
        """Additional metrics after the step's last micro-batch, equal on every rank. Collective."""
        return {}


class HiddenStateTargets(TeacherTargets):
    """The teacher's final hidden states, from which its LM head makes the full distribution, a chunk at a time."""

    has_distribution = True

    def __init__(
        self,
        logp: torch.Tensor,
        payload: Sequence[torch.Tensor],
        head: Callable[[], LmHead],
        *,
        payload_bytes: int = 0,
        sent_bytes: int | None = None,
    ) -> None:
        """Keeps the hidden states until the loss.

        Args:
            logp, payload_bytes, sent_bytes: see `TeacherTargets`.
            payload: for each of the student's micro-batches the hidden states at its completion rows, [N of the
                micro-batch, H of the teacher]; it may be fetched or computed on access. Empty on ranks that compute no
                loss.
            head: returns the teacher's LM head, sharded like the student's; called where the loss is computed.
        """
        self.logp, self.payload, self.head = logp, payload, head
        self.payload_bytes, self.sent_bytes = payload_bytes, sent_bytes

    def token_inputs(
        self, wanted: frozenset[str], index: int, micro_batch: MicroBatch, inputs: LossInputs
    ) -> dict[str, torch.Tensor]:
        """All inputs, from both models' logits."""
        if wanted <= OF_STUDENT:
            return super().token_inputs(wanted, index, micro_batch, inputs)
        return linear_token_inputs(
            wanted,
            inputs.hidden,
            inputs.head.weight,
            self.payload[index],
            self.head().weight,
            micro_batch.target_ids,
            inputs.loss,
            inputs.head.shard,
            chunk_size=inputs.head_config.chunk_size,
            logits_dtype=logits_dtype_of(inputs.head_config, inputs.hidden.dtype),
        )

    def micro_batch_loss(self, index: int, micro_batch: MicroBatch, inputs: LossInputs) -> MicroBatchLoss:
        """The divergence over the full vocabulary."""
        teacher_hidden, teacher_head = self.payload[index], self.head().weight
        probe = None
        if inputs.probe is not None:
            probe = _clipped_gradient(micro_batch.target_ids, inputs, inputs.probe, teacher_hidden, teacher_head)
        found = linear_divergence(
            inputs.hidden,
            inputs.head.weight,
            teacher_hidden,
            teacher_head,
            micro_batch.target_ids,
            inputs.token_scale,
            inputs.loss,
            inputs.head.shard,
            chunk_size=inputs.head_config.chunk_size,
            logits_dtype=logits_dtype_of(inputs.head_config, inputs.hidden.dtype),
            main_grad=inputs.head.main_grad,
        )
        return MicroBatchLoss.of(found.total, found.token_divergence, found.clipped_entries, probe)


def _of_student(wanted: frozenset[str], micro_batch: MicroBatch, inputs: LossInputs) -> dict[str, torch.Tensor]:
    scores = linear_token_scores(
        inputs.hidden,
        inputs.head,
        micro_batch.target_ids,
        inputs.head_config,
        inputs.loss.temperature,
        with_entropy="student_entropy" in wanted,
    )
    found = {"student_logp": scores.logp}
    return found if scores.entropy is None else {**found, "student_entropy": scores.entropy}


@torch.no_grad()
def _clipped_gradient(
    token_ids: torch.Tensor,
    inputs: LossInputs,
    probe: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_head: torch.Tensor,
) -> torch.Tensor:
    """Squared gradient with respect to the logits at evenly chosen tokens of `probe`, with the entry clip and without,
    fp64 [2]."""
    rows, is_one = evenly_chosen(probe, MAX_PIVOTAL_TOKENS)
    dtype = logits_dtype_of(inputs.head_config, inputs.hidden.dtype)
    student, teacher = (
        Logits(states.detach()[rows], weight, len(rows), dtype).project(slice(None))
        for states, weight in ((inputs.hidden, inputs.head.weight), (teacher_hidden, teacher_head))
    )
    scale = is_one / is_one.sum().clamp(min=1)
    energies = []
    for loss in (inputs.loss, replace(inputs.loss, entry_clip=None)):
        passes, gradient = VocabParallelPasses(loss, inputs.head.shard), torch.empty_like(student)
        normalizers = passes.normalizers(student, teacher, token_ids[rows])
        passes.totals_and_gradient(student, teacher, normalizers, scale, gradient)
        energies.append(gradient.double().square().sum())
    return sum_over_group(torch.stack(energies), inputs.head.shard.group)


def evenly_chosen(mask: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """At most `most` positions where a mask is True, evenly spaced among them, without synchronizing with the device.

    Returns:
        (positions, which of them are chosen): int64 and bool, [min(most, N)]; the others fill the rest.

    >>> places, is_one = evenly_chosen(torch.tensor([True, False, True, True, True, True]), 3)
    >>> places[is_one].tolist()    # every second of five
    [0, 3, 5]
    """
    number = mask.long().cumsum(0) - 1
    stride = (mask.sum() + most - 1).div(most, rounding_mode="floor").clamp(min=1)
    chosen = mask & (number % stride == 0)
    places = torch.argsort(~chosen, stable=True)[:most]
    return places, chosen[places]
