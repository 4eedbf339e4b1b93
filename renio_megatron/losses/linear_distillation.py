"""The public loss from hidden states and LM heads: logits exist for a chunk of tokens at a time, never whole.

A chunk's logits are made in buffers that the next chunk uses again; the three passes run over them; the gradient that
takes the student logits' place is multiplied into those of the hidden states and of the head at once. So memory follows
the chunk, not the batch, and nothing is computed twice where the sample weights are given.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from renio_megatron.config import LossConfig, WeightingConfig
from renio_megatron.errors import LayoutError
from renio_megatron.losses import kernels
from renio_megatron.losses.argument_checks import check_heads, check_tokens
from renio_megatron.losses.chunk_size import chunk_size_for, loss_buffer_bytes
from renio_megatron.losses.chunked_logits import Logits, bytes_per_token, chosen_dtype, slices
from renio_megatron.losses.distillation import RAN_TWICE, DistillationOutput, mean_denominator
from renio_megatron.losses.sample_weights import SampleWeights, sample_weights
from renio_megatron.losses.vocab_passes import Passes
from renio_megatron.objective.reduce import token_scale, tokens_per_sequence
from renio_megatron.parallel.reductions import sum_pieces
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
    chunk_size: int | None = None,
    logits_dtype: torch.dtype | None = None,
    sum_hidden_gradient: bool = True,
    main_grad: torch.Tensor | None = None,
    check_values: bool = True,
) -> DistillationOutput:
    """`distillation_loss` of the logits `student_hidden @ student_head.T` and `teacher_hidden @ teacher_head.T`.

    With `weights` every chunk is read once. Without, the logits are made twice: the weights need every token's log
    ratio before the first gradient.

    Args:
        student_hidden: final hidden states at completion tokens, after the last norm, [N, H], the same on all ranks of
            `shard.group`. Under sequence parallelism gather them first: `parallel.vocab.gather_sequence`.
        student_head: this rank's rows of the LM head, or of a tied embedding, [L, H], dtype of the hidden states.
            Frozen where it does not require a gradient.
        teacher_hidden: the teacher's at the same tokens, [N, H of the teacher]; no gradient flows.
        teacher_head: the teacher's rows of the same columns, [L, H of the teacher]: `parallel.vocab.recut` cuts a head
            anew whose edges differ.
        token_ids, owner, num_sequences, loss, weighting, shard, batch_group, sequence_group, weights, sequence_lengths,
            state: as in `distillation_loss`.
        chunk_size: tokens whose logits exist at a time; None: `chunk_size.chunk_size_for` chooses.
        logits_dtype: of the buffers of logits, fp32 or the dtype of the hidden states; None: fp32, and fp64 for fp64.
            bf16 logits take half the memory, and a loss by entries that is clipped feels their rounding.
        sum_hidden_gradient: sum the hidden states' gradient over `shard.group` in backward, as a column-parallel head
            must; False where the caller's own region does.
        main_grad: fp32 [L, H], Megatron's gradient buffer of the student's head: backward adds the head's gradient to
            it at full precision and gives autograd zeros.
        check_values: also look at the values of `token_ids` and `owner`; on a GPU that waits for it.

    Returns:
        `DistillationOutput`. Its gradients are finished in forward; backward multiplies by a scalar, and runs once.
    Collectives on the tensor group: of each chunk one for KL without bounds, two otherwise, and one more where the
        weights are not given; in backward only the sum of the hidden states' gradient.
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
    if len(teacher_hidden) != len(student_hidden):
        raise LayoutError(
            f"student_hidden has {len(student_hidden)} tokens, teacher_hidden {len(teacher_hidden)}; both must be "
            "hidden states at the same completion tokens."
        )
    _check_main_grad(main_grad, student_head)
    if sum_hidden_gradient:
        student_hidden = sum_gradient_over_shards(student_hidden, shard.group)
    trains_hidden = torch.is_grad_enabled() and student_hidden.requires_grad
    trains_head = torch.is_grad_enabled() and student_head.requires_grad
    trains = trains_hidden or trains_head
    with torch.no_grad():
        dtype = chosen_dtype(student_hidden, logits_dtype)
        num_tokens, is_narrow = len(student_hidden), student_hidden.dtype != dtype
        size = chunk_size_for(num_tokens, bytes_per_token(shard.width, student_hidden.dtype, dtype), chunk_size)
        student = Logits(student_hidden, student_head, size, dtype)
        teacher = Logits(teacher_hidden, teacher_head, size, dtype)
        passes = Passes(loss, shard)
        if sequence_lengths is None:
            sequence_lengths = sum_pieces(tokens_per_sequence(owner, num_sequences), sequence_group)

        def weigh(student_logp: torch.Tensor, teacher_logp: torch.Tensor) -> SampleWeights:
            return sample_weights(
                student_logp,
                teacher_logp,
                owner,
                num_sequences,
                weighting,
                batch_group=batch_group,
                sequence_group=sequence_group,
                weights=weights,
                sequence_lengths=sequence_lengths,
                state=state,
            )

        working = torch.promote_types(dtype, torch.float32)
        student_logp, teacher_logp, value_N, clipped_N = student_hidden.new_empty(4, num_tokens, dtype=working)
        if weights is None:
            for rows in slices(num_tokens, size):
                found = passes.normalisers(student.project(rows), teacher.project(rows), token_ids[rows])
                student_logp[rows], teacher_logp[rows] = found.student_logp, found.teacher_logp
            sample = weigh(student_logp, teacher_logp)
        # The step's number of sequences may need a collective; it divides the finished sums instead.
        finished = (sample.weights if weights is None else weights).detach()
        scale_N = token_scale(finished.to(working), sequence_lengths, owner, denominator=1.0)
        hidden_gradient = torch.empty_like(student_hidden) if trains_hidden else None
        head_gradient = torch.zeros_like(student_head, dtype=working) if trains_head else None
        narrow = torch.empty_like(student.buffer, dtype=student_hidden.dtype) if is_narrow and trains else None
        for rows in slices(num_tokens, size):
            student_logits, teacher_logits = student.project(rows), teacher.project(rows)
            normalisers = passes.normalisers(student_logits, teacher_logits, token_ids[rows])
            gradient = None
            if trains:
                gradient = student_logits if narrow is None else narrow[: len(student_logits)]
            totals = passes.totals_and_gradient(student_logits, teacher_logits, normalisers, scale_N[rows], gradient)
            student_logp[rows], teacher_logp[rows] = normalisers.student_logp, normalisers.teacher_logp
            value_N[rows], clipped_N[rows] = totals.value, totals.clipped
            if gradient is None:
                continue
            if hidden_gradient is not None:
                torch.mm(gradient, student_head, out=hidden_gradient[rows])
            if head_gradient is not None:
                kernels.add_outer_(head_gradient, gradient, student_hidden[rows])
        if weights is not None:
            sample = weigh(student_logp, teacher_logp)
        factor = 1.0 / mean_denominator(sample.batch_size, batch_group)
        value = (scale_N * value_N).sum() * factor
    if trains:
        value = FinishedGradients.apply(
            student_hidden, student_head, value, hidden_gradient, head_gradient, factor, main_grad
        )
    return DistillationOutput(
        loss=value,
        weights=sample.weights,
        raw_weights=sample.raw_weights,
        log_ratio=sample.log_ratio,
        is_pivotal=sample.is_pivotal,
        token_divergence=value_N,
        clipped_entries=clipped_N,
        state=sample.state,
    )


def buffer_bytes(
    num_tokens: int,
    width: int,
    hidden_dtype: torch.dtype,
    logits_dtype: torch.dtype | None = None,
    chunk_size: int | None = None,
) -> int:
    """What `linear_distillation_loss` takes beside its results, in bytes: logits of both models for a chunk of tokens,
    and the gradient where it is narrower than they are.

    >>> round(buffer_bytes(8192, 151_936, torch.bfloat16) / 2**30, 2)    # 2048 tokens, fp32 logits, bf16 gradient
    2.9
    """
    dtype = logits_dtype or torch.promote_types(hidden_dtype, torch.float32)
    return loss_buffer_bytes(num_tokens, width, hidden_dtype.itemsize, dtype.itemsize, chunk_size)


class FinishedGradients(torch.autograd.Function):
    """Ties a scalar to gradients that are already computed: backward multiplies them by the upstream scalar."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        head: torch.Tensor,
        value: torch.Tensor,
        hidden_gradient: torch.Tensor | None,
        head_gradient: torch.Tensor | None,
        factor: torch.Tensor,
        main_grad: torch.Tensor | None,
    ) -> torch.Tensor:
        """`value`, as a function of `hidden` and `head` whose gradients are `factor` times those given."""
        ctx.gradients = (hidden_gradient, head_gradient, factor, main_grad, head.dtype)
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradients; they are handed over, so there is no second time."""
        if ctx.gradients is None:
            raise RuntimeError(RAN_TWICE)
        (hidden_gradient, head_gradient, factor, main_grad, head_dtype), ctx.gradients = ctx.gradients, None
        scale = upstream * factor.to(upstream)
        if hidden_gradient is not None:
            hidden_gradient = kernels.scale_rows_(hidden_gradient, scale)
        if head_gradient is not None and main_grad is not None:
            main_grad.addcmul_(head_gradient, scale.to(main_grad))
            # Autograd must see a gradient, or Megatron's hook does not run and its bucket is never sent.
            head_gradient = torch.zeros_like(head_gradient, dtype=head_dtype)
        elif head_gradient is not None:
            head_gradient = head_gradient.mul_(scale.to(head_gradient)).to(head_dtype)
        return hidden_gradient, head_gradient, None, None, None, None, None


def _check_main_grad(main_grad: torch.Tensor | None, head: torch.Tensor) -> None:
    if main_grad is not None and main_grad.dtype not in (torch.float32, torch.float64):
        raise LayoutError(f"main_grad must be fp32, so that long sums keep their digits; got {main_grad.dtype}.")
    if main_grad is not None and (main_grad.shape != head.shape or main_grad.device != head.device):
        raise LayoutError(
            f"main_grad must be like student_head, {tuple(head.shape)} on {head.device}; got "
            f"{tuple(main_grad.shape)} on {main_grad.device}."
        )
