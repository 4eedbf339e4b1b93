"""The public distillation loss over vocabulary-parallel logits.

Three passes over the rows with two small exchanges over the tensor group (`vocab_passes.py`), and a gradient that is
final when forward returns, because the sample weights need only the results of pass 1. `linear_distillation.py`
computes the same loss from hidden states and LM heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from renio_megatron.config import LossConfig, WeightingConfig
from renio_megatron.config.sections.weighting import RenioWeighting, renio_in
from renio_megatron.losses import kernels
from renio_megatron.losses.argument_checks import check_logits, check_tokens
from renio_megatron.losses.sample_weights import SampleWeights, sample_weights
from renio_megatron.losses.vocab_passes import Totals, VocabParallelPasses
from renio_megatron.objective.reduce import token_scale
from renio_megatron.parallel.vocab import LogNormalizers, VocabShard

RAN_TWICE = (
    "backward through this loss ran twice; its gradient was handed over the first time. "
    "Call the loss again, or backward once."
)
_DEFAULT_LOSS = LossConfig()
_DEFAULT_WEIGHTING = WeightingConfig()
_PAPERS = RenioWeighting()


@dataclass(frozen=True)
class DistillationOutput:
    """Result of `distillation_loss`; only `loss` carries a gradient.

    Attributes:
        loss: scalar, nats.
        weights: sample weights that were applied [B].
        token_weights: factor of each token's divergence [N], 0 where a token does not count; None: 1.
        raw_weights: ReNIO's weights before normalization, whatever the weighting [B].
        log_ratio: log p_S - log p_T of each sampled token, unclipped, nats [N].
        is_pivotal: whether each token is pivotal, bool [N]. For a weighting without ReNIO, this and `raw_weights` use
            the paper's bounds.
        token_divergence: divergence of each token after the entry bounds, unweighted, nats [N].
        clipped_entries: vocabulary entries of each token that `entry_clip` cut, [N]; zeros where nothing is clipped.
        state: pass it to the next optimizer step's call (`normalize="ema"`).
    """

    loss: torch.Tensor
    weights: torch.Tensor
    token_weights: torch.Tensor | None
    raw_weights: torch.Tensor
    log_ratio: torch.Tensor
    is_pivotal: torch.Tensor
    token_divergence: torch.Tensor
    clipped_entries: torch.Tensor
    state: torch.Tensor | None

    @classmethod
    def of(
        cls, loss: torch.Tensor, sample: SampleWeights, token_divergence: torch.Tensor, clipped_entries: torch.Tensor
    ) -> DistillationOutput:
        """The result from sample weights that include a `RenioReport`."""
        assert sample.renio is not None
        return cls(
            loss=loss,
            weights=sample.weights,
            token_weights=sample.token_weights,
            raw_weights=sample.renio.raw_weights,
            log_ratio=sample.renio.log_ratio,
            is_pivotal=sample.renio.is_pivotal,
            token_divergence=token_divergence,
            clipped_entries=clipped_entries,
            state=sample.state,
        )


def renio_of(weighting: WeightingConfig) -> RenioWeighting:
    """Bounds for the reported pivotal tokens: those of the weighting where it includes ReNIO, else the paper's."""
    return renio_in(weighting) or _PAPERS


def distillation_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    token_ids: torch.Tensor,
    owner: torch.Tensor,
    num_sequences: int,
    loss: LossConfig = _DEFAULT_LOSS,
    weighting: WeightingConfig = _DEFAULT_WEIGHTING,
    shard: VocabShard | None = None,
    *,
    batch_group: dist.ProcessGroup | None = None,
    sequence_group: dist.ProcessGroup | None = None,
    weights: torch.Tensor | None = None,
    sequence_lengths: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    inputs: Mapping[str, Any] | None = None,
    overwrite_logits: bool = False,
) -> DistillationOutput:
    """Weighted divergence of a batch: (1/B) sum_i weight_i x mean over sequence i's tokens of D(teacher, student).

    Args:
        student_logits, teacher_logits: this rank's slice of the vocabulary, [N, L], completion tokens only, flat; N may
            be 0. Any floating dtype; the arithmetic is fp32, or fp64 where both are fp64.
        token_ids: global ids of the sampled tokens, int64 [N].
        owner: sequence of each token, int64 [N] in [0, num_sequences), any order; sequences without tokens are allowed.
        num_sequences: B of this rank.
        loss: the divergence.
        weighting: the sample weights.
        shard: which columns these are; None: the whole vocabulary.
        batch_group: data-parallel group of the batch mean; never holds context-parallel ranks. `out.loss` is then the
            sum over this rank's sequences times (ranks / sequences of the group), so that the usual data-parallel mean
            of losses and gradients is the batch's, also with unequal counts.
        sequence_group: context-parallel group that shares sequences; each rank returns its part of the loss, the sum
            over the group is the loss, and weights are whole on every rank.
        weights: finished weights [B], in place of the weighting's.
        sequence_lengths: tokens of each whole sequence [B]; None: counted (over `sequence_group`).
        state: the previous step's `out.state` (`normalize="ema"`).
        inputs: what the weighting needs that does not follow from logits, by name: for example `finished` or `verdict`,
            see `objective.weightings.strategy.WeightingInputs`.
        overwrite_logits: let the gradient be written where `student_logits` was; saves [N, L], and nothing may read
            the logits afterwards. Without it no input is changed.

    Returns:
        `DistillationOutput`. Backward multiplies the finished gradient by a scalar; it runs once.
    Collectives on the tensor group: one for KL without bounds, two otherwise, and one for each entropy or divergence
        that the weighting needs; none in backward.

    Raises:
        LayoutError: shapes, shard or indices that do not fit together.
    Source: ReNIO, phases I to III and the loss.

    >>> student = torch.tensor([[0.0, 0.0]], requires_grad=True)                # p_S = (1/2, 1/2)
    >>> teacher = torch.tensor([[0.0, 1.0986123]])                              # p_T = (1/4, 3/4): ln 3 apart
    >>> out = distillation_loss(student, teacher, torch.tensor([0]), torch.tensor([0]), 1)
    >>> round(out.log_ratio.item(), 4), round(out.loss.item(), 4)               # ln 2; ln 2 - entropy of p_T
    (0.6931, 0.1308)
    >>> out.loss.backward(); [round(x, 4) for x in student.grad[0].tolist()]    # p_S - p_T
    [0.25, -0.25]
    """
    if shard is None:
        shard = VocabShard(0, student_logits.shape[-1], student_logits.shape[-1])
    check_logits(student_logits, teacher_logits, shard)
    check_tokens(len(student_logits), token_ids, owner, num_sequences, shard, weights, sequence_lengths)
    with torch.no_grad():
        passes = VocabParallelPasses(loss, shard)
        normalizers = passes.normalizers(student_logits, teacher_logits, token_ids)
        wanted = frozenset() if weights is not None else weighting.needs
        sample = sample_weights(
            normalizers.student_logp,
            normalizers.teacher_logp,
            owner,
            num_sequences,
            weighting,
            batch_group=batch_group,
            sequence_group=sequence_group,
            weights=weights,
            sequence_lengths=sequence_lengths,
            state=state,
            inputs={**(inputs or {}), **passes.inputs(wanted, student_logits, teacher_logits, normalizers)},
            report=renio_of(weighting),
        )
        denominator = mean_denominator(sample.batch_size, batch_group)
        scale_N = token_scale(sample.weights, sample.denominators, owner, sample.token_weights, denominator=denominator)
    value, totals = _weighted_sum(
        passes, student_logits, teacher_logits, normalizers, scale_N, overwrite_logits=overwrite_logits
    )
    return DistillationOutput.of(value, sample, totals.value, totals.clipped)


def weighted_divergence(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    token_ids: torch.Tensor,
    token_scale: torch.Tensor,
    loss: LossConfig,
    shard: VocabShard,
) -> torch.Tensor:
    """Sum over tokens of token_scale x divergence, scalar, nats, with given factors: computes no weights.

    Args:
        student_logits, teacher_logits, token_ids, loss, shard: as in `distillation_loss`.
        token_scale: factor of each token's divergence [N].
    Gradient: of the student's logits, finished in forward; backward multiplies it by a scalar, and runs once.
    Collectives on the tensor group: one for KL without bounds, two otherwise; none in backward.

    Raises:
        LayoutError: shapes or a shard that do not fit together.

    >>> student, teacher = torch.zeros(1, 2, requires_grad=True), torch.tensor([[0.0, 1.0986123]])    # p_T = 1/4, 3/4
    >>> shard = VocabShard.for_vocab(2)
    >>> value = weighted_divergence(student, teacher, torch.tensor([0]), torch.tensor([2.0]), LossConfig(), shard)
    >>> round(value.item(), 4); value.backward(); [round(x, 4) for x in student.grad[0].tolist()]
    0.2616
    [0.5, -0.5]
    """
    check_logits(student_logits, teacher_logits, shard)
    with torch.no_grad():
        passes = VocabParallelPasses(loss, shard)
        normalizers = passes.normalizers(student_logits, teacher_logits, token_ids)
        scale_N = token_scale.to(normalizers.student_logp)
    return _weighted_sum(passes, student_logits, teacher_logits, normalizers, scale_N)[0]


def _weighted_sum(
    passes: VocabParallelPasses,
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    normalizers: LogNormalizers,
    scale_N: torch.Tensor,
    *,
    overwrite_logits: bool = False,
) -> tuple[torch.Tensor, Totals]:
    """(sum of scale x divergence, with a finished gradient where the logits require one; totals of each token)."""
    needs_gradient = torch.is_grad_enabled() and student_logits.requires_grad
    with torch.no_grad():
        gradient = None
        if needs_gradient:
            gradient = student_logits.detach() if overwrite_logits else torch.empty_like(student_logits)
        totals = passes.totals_and_gradient(student_logits, teacher_logits, normalizers, scale_N, gradient)
        value = (scale_N * totals.value).sum()
    return (FinishedGradient.apply(student_logits, value, gradient) if needs_gradient else value), totals


def mean_denominator(batch_size: torch.Tensor, batch_group: dist.ProcessGroup | None) -> torch.Tensor:
    """Denominator of the sum over this rank's sequences, so that the usual mean over data-parallel ranks is the
    batch's: sequences of the whole batch / ranks, fp64 scalar; never 0."""
    ranks = 1 if batch_group is None else batch_group.size()
    return (batch_size / ranks).clamp(min=1.0 / ranks)


class FinishedGradient(torch.autograd.Function):
    """Ties a scalar to a gradient that is already computed: backward multiplies it by the upstream scalar, in place."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, value: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """`value`, as a function of `logits` whose gradient is `gradient`."""
        ctx.gradient = gradient  # not save_for_backward: it may share the logits' storage, which was overwritten
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """The gradient of the logits; it is passed on without a copy, so backward runs only once."""
        if ctx.gradient is None:
            raise RuntimeError(RAN_TWICE)
        gradient, ctx.gradient = ctx.gradient, None
        return kernels.scale_rows_(gradient, upstream), None, None
