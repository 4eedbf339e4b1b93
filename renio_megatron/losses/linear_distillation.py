"""The public loss from hidden states and LM heads, with logits for one chunk of tokens at a time.

Steps: weights, passes over chunks (`chunked_loss.py`), denominator. Nothing is computed twice where the sample weights
are given.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from renio_megatron.config import LossConfig, WeightingConfig
from renio_megatron.losses.argument_checks import check_heads, check_tokens
from renio_megatron.losses.chunk_size import loss_buffer_bytes
from renio_megatron.losses.chunked_loss import ChunkedLoss, check_main_grad
from renio_megatron.losses.distillation import DistillationOutput, mean_denominator, renio_of
from renio_megatron.losses.sample_weights import SampleWeights, sample_weights
from renio_megatron.objective.reduce import token_scale, tokens_per_sequence
from renio_megatron.parallel.reductions import sum_over_group
from renio_megatron.parallel.vocab import VocabShard, sum_gradient_over_shards

_DEFAULT_LOSS = LossConfig()
_DEFAULT_WEIGHTING = WeightingConfig()


def linear_distillation_loss(
    student_hidden: torch.Tensor,
    student_head: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_head: torch.Tensor,
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
    chunk_size: int | None = None,
    logits_dtype: torch.dtype | None = None,
    sum_hidden_gradient: bool = True,
    main_grad: torch.Tensor | None = None,
    check_values: bool = True,
) -> DistillationOutput:
    """`distillation_loss` of the logits `student_hidden @ student_head.T` and `teacher_hidden @ teacher_head.T`.

    With `weights` every chunk is read once. Without, the logits are computed twice: the weights need every token's
    log ratio before the first gradient.

    Args:
        student_hidden: final hidden states at completion tokens, after the last norm, [N, H], the same on all ranks of
            `shard.group`. Under sequence parallelism gather them first: `parallel.vocab.gather_sequence`.
        student_head: this rank's rows of the LM head, or of a tied embedding, [L, H], dtype of the hidden states.
            Frozen where it does not require a gradient.
        teacher_hidden: the teacher's hidden states at the same tokens, [N, H of the teacher]; no gradient flows.
        teacher_head: the teacher's rows of the same columns, [L, H of the teacher]; `parallel.vocab.reshard_rows`
            reshards a head with other boundaries.
        token_ids, owner, num_sequences, loss, weighting, shard, batch_group, sequence_group, weights, sequence_lengths,
            state, inputs: as in `distillation_loss`.
        chunk_size: tokens whose logits exist at a time; None: `chunk_size.chunk_size_for` chooses.
        logits_dtype: of the buffers of logits, fp32 or the dtype of the hidden states; None: fp32, and fp64 for fp64.
            bf16 logits take half the memory, but their rounding affects a loss with clipped entries.
        sum_hidden_gradient: sum the hidden states' gradient over `shard.group` in backward, as a column-parallel head
            must; False where the caller's own autograd region does it.
        main_grad: fp32 [L, H], Megatron's gradient buffer of the student's head: backward adds the head's gradient to
            it at full precision and gives autograd zeros.
        check_values: also check the values of `token_ids` and `owner`, which synchronizes with a GPU.

    Returns:
        `DistillationOutput`. Its gradients are finished in forward; backward multiplies by a scalar, and runs once.
    Collectives on the tensor group: of each chunk one for KL without bounds, two otherwise, and one more where the
        weights are not given, then also one for each entropy or divergence that the weighting needs; in backward only
        the sum of the hidden states' gradient.
    Memory beyond the results (gradients [N, H] and [L, H], the head's in fp32, and vectors [N]): `buffer_bytes`.

    Raises:
        LayoutError: shapes, dtypes, devices, shard or indices that do not fit together.
    Source: ReNIO, phases I to III and the loss.

    >>> hidden, head = torch.tensor([[1.0, 0.0]], requires_grad=True), torch.eye(2)    # logits (1, 0)
    >>> teacher = torch.tensor([[0.0, 0.0]])                                           # p_T = (1/2, 1/2)
    >>> token = torch.tensor([0])
    >>> out = linear_distillation_loss(hidden, head, teacher, head, token, token, 1)
    >>> round(out.loss.item(), 4)                                                      # -ln 2 - mean of log p_S
    0.1201
    >>> out.loss.backward(); [round(x, 4) for x in hidden.grad[0].tolist()]            # (p_S - p_T) @ head
    [0.2311, -0.2311]
    """
    if shard is None:
        shard = VocabShard(0, student_head.shape[0], student_head.shape[0])
    check_heads(student_hidden, student_head, teacher_hidden, teacher_head, shard)
    check_tokens(
        len(student_hidden), token_ids, owner, num_sequences, shard, weights, sequence_lengths, read_values=check_values
    )
    check_main_grad(main_grad, student_head)
    if sum_hidden_gradient:
        student_hidden = sum_gradient_over_shards(student_hidden, shard.group)
    chunked = ChunkedLoss(
        student_hidden, student_head, teacher_hidden, teacher_head, token_ids, loss, shard, chunk_size, logits_dtype
    )
    with torch.no_grad():
        if sequence_lengths is None:
            sequence_lengths = sum_over_group(tokens_per_sequence(owner, num_sequences), sequence_group)
        weigh = functools.partial(
            sample_weights,
            owner=owner,
            num_sequences=num_sequences,
            config=weighting,
            batch_group=batch_group,
            sequence_group=sequence_group,
            weights=weights,
            sequence_lengths=sequence_lengths,
            state=state,
            report=renio_of(weighting),
        )
        sample = None
        if weights is None:
            found = chunked.find_inputs(weighting.needs)
            sample = weigh(chunked.student_logp, chunked.teacher_logp, inputs={**(inputs or {}), **found})
        # The step's number of sequences may need a collective; it divides the finished sums instead.
        scale_N = _scale(chunked, owner, weights, sequence_lengths, sample)
        chunked.differentiate(scale_N)
        if sample is None:
            sample = weigh(chunked.student_logp, chunked.teacher_logp)
        factor = 1.0 / mean_denominator(sample.batch_size, batch_group)
        value = (scale_N * chunked.value_N).sum() * factor
    return DistillationOutput.of(chunked.tied(value, factor, main_grad), sample, chunked.value_N, chunked.clipped_N)


def _scale(
    chunked: ChunkedLoss,
    owner: torch.Tensor,
    weights: torch.Tensor | None,
    lengths: torch.Tensor,
    sample: SampleWeights | None,
) -> torch.Tensor:
    """Factor of each token's divergence, before the division by the number of sequences, from given or computed
    weights."""
    dtype = chunked.working_dtype
    if sample is None:
        assert weights is not None
        return token_scale(weights.detach().to(dtype), lengths, owner, denominator=1.0)
    return token_scale(sample.weights.to(dtype), sample.denominators, owner, sample.token_weights, denominator=1.0)


def buffer_bytes(
    num_tokens: int,
    width: int,
    hidden_dtype: torch.dtype,
    logits_dtype: torch.dtype | None = None,
    chunk_size: int | None = None,
) -> int:
    """Bytes that `linear_distillation_loss` takes in addition to its results: logits of both models for a chunk of
    tokens, and the gradient where it is narrower than they are.

    >>> round(buffer_bytes(8192, 151_936, torch.bfloat16) / 2**30, 2)    # 2048 tokens, fp32 logits, bf16 gradient
    2.9
    """
    dtype = logits_dtype or torch.promote_types(hidden_dtype, torch.float32)
    return loss_buffer_bytes(num_tokens, width, hidden_dtype.itemsize, dtype.itemsize, chunk_size)
