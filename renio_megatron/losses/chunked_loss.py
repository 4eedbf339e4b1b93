"""Divergence from hidden states and LM heads, in passes over one chunk of tokens at a time.

A chunk's logits are computed in buffers that the next chunk reuses; the three passes run over them; the gradient that
overwrites the student logits is multiplied at once into the gradients of the hidden states and of the head. So memory
follows the chunk, not the batch.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch

from renio_megatron.config import LossConfig
from renio_megatron.errors import LayoutError
from renio_megatron.losses import kernels
from renio_megatron.losses.argument_checks import check_heads
from renio_megatron.losses.chunk_size import chunk_size_for
from renio_megatron.losses.chunked_logits import Logits, bytes_per_token, chosen_dtype, slices
from renio_megatron.losses.distillation import RAN_TWICE
from renio_megatron.losses.vocab_passes import VocabParallelPasses
from renio_megatron.objective.weightings import LOGIT_INPUTS
from renio_megatron.parallel.vocab import VocabShard


@dataclass(frozen=True)
class LinearDivergence:
    """Divergence of each token, without gradient, and their sum, whose gradients are already computed.

    Attributes:
        total: sum over the tokens of scale x divergence, nats, scalar; its gradient is already computed.
        token_divergence: nats [N].
        clipped_entries: vocabulary entries that a bound of the loss cut [N].
        student_logp, teacher_logp: log-probability of each sampled token at the loss temperature, nats [N].
    """

    total: torch.Tensor
    token_divergence: torch.Tensor
    clipped_entries: torch.Tensor
    student_logp: torch.Tensor
    teacher_logp: torch.Tensor


def linear_divergence(
    student_hidden: torch.Tensor,
    student_head: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_head: torch.Tensor,
    token_ids: torch.Tensor,
    token_scale: torch.Tensor,
    loss: LossConfig,
    shard: VocabShard,
    *,
    chunk_size: int | None = None,
    logits_dtype: torch.dtype | None = None,
    main_grad: torch.Tensor | None = None,
) -> LinearDivergence:
    """The divergence of every token, and their sum under given factors; computes no weights, reads nothing back to the
    CPU.

    Args:
        student_hidden, student_head, teacher_hidden, teacher_head, token_ids, loss, shard, chunk_size, logits_dtype,
            main_grad: as in `linear_distillation_loss`; the hidden states' gradient is not summed over the shards.
        token_scale: factor of each token's divergence in the sum [N].
    """
    check_heads(student_hidden, student_head, teacher_hidden, teacher_head, shard)
    chunked = ChunkedLoss(
        student_hidden, student_head, teacher_hidden, teacher_head, token_ids, loss, shard, chunk_size, logits_dtype
    )
    check_main_grad(main_grad, student_head)
    with torch.no_grad():
        chunked.differentiate(token_scale)
        value = (token_scale.to(chunked.working_dtype) * chunked.value_N).sum()
    return LinearDivergence(
        total=chunked.tied(value, value.new_ones(()), main_grad),
        token_divergence=chunked.value_N,
        clipped_entries=chunked.clipped_N,
        student_logp=chunked.student_logp,
        teacher_logp=chunked.teacher_logp,
    )


@torch.no_grad()
def linear_token_inputs(
    wanted: Collection[str],
    student_hidden: torch.Tensor,
    student_head: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_head: torch.Tensor,
    token_ids: torch.Tensor,
    loss: LossConfig,
    shard: VocabShard,
    *,
    chunk_size: int | None = None,
    logits_dtype: torch.dtype | None = None,
) -> dict[str, torch.Tensor]:
    """`student_logp`, `teacher_logp` and those of `LOGIT_INPUTS` that are wanted, nats [N]; the others as in
    `linear_divergence`."""
    check_heads(student_hidden, student_head, teacher_hidden, teacher_head, shard)
    models = student_hidden, student_head, teacher_hidden, teacher_head
    chunked = ChunkedLoss(*models, token_ids, loss, shard, chunk_size, logits_dtype)
    found = chunked.find_inputs(wanted)
    return {"student_logp": chunked.student_logp, "teacher_logp": chunked.teacher_logp, **found}


class ChunkedLoss:
    """The passes over one batch of tokens, and their results.

    Attributes:
        working_dtype: of the vectors [N]: at least fp32.
        student_logp, teacher_logp, value_N, clipped_N: as in `LinearDivergence`; of those that were computed so far.
    """

    def __init__(
        self,
        student_hidden: torch.Tensor,
        student_head: torch.Tensor,
        teacher_hidden: torch.Tensor,
        teacher_head: torch.Tensor,
        token_ids: torch.Tensor,
        loss: LossConfig,
        shard: VocabShard,
        chunk_size: int | None,
        logits_dtype: torch.dtype | None,
    ) -> None:
        """Allocates the buffers of a chunk; `check_heads` has checked the tensors."""
        if len(teacher_hidden) != len(student_hidden):
            raise LayoutError(
                f"student_hidden has {len(student_hidden)} tokens, teacher_hidden {len(teacher_hidden)}; both must be "
                "hidden states at the same completion tokens."
            )
        self._hidden, self._head, self._token_ids = student_hidden, student_head, token_ids
        self._trains_hidden = torch.is_grad_enabled() and student_hidden.requires_grad
        self._trains_head = torch.is_grad_enabled() and student_head.requires_grad
        dtype = chosen_dtype(student_hidden, logits_dtype)
        num_tokens = len(student_hidden)
        self._size = chunk_size_for(num_tokens, bytes_per_token(shard.width, student_hidden.dtype, dtype), chunk_size)
        self._student = Logits(student_hidden, student_head, self._size, dtype)
        self._teacher = Logits(teacher_hidden, teacher_head, self._size, dtype)
        self._passes = VocabParallelPasses(loss, shard)
        self.working_dtype = torch.promote_types(dtype, torch.float32)
        vectors = student_hidden.new_empty(4, num_tokens, dtype=self.working_dtype)
        self.student_logp, self.teacher_logp, self.value_N, self.clipped_N = vectors
        self._hidden_gradient: torch.Tensor | None = None
        self._head_gradient: torch.Tensor | None = None

    @property
    def trains(self) -> bool:
        """Whether anything needs a gradient."""
        return self._trains_hidden or self._trains_head

    @torch.no_grad()
    def find_inputs(self, wanted: Collection[str]) -> dict[str, torch.Tensor]:
        """`student_logp` and `teacher_logp`, for weights that need every token's before the first gradient; and those
        of `LOGIT_INPUTS` that are wanted, which are returned, nats [N]."""
        found = {name: torch.empty_like(self.student_logp) for name in LOGIT_INPUTS if name in wanted}
        for rows in slices(len(self._hidden), self._size):
            student, teacher = self._student.project(rows), self._teacher.project(rows)
            normalizers = self._passes.normalizers(student, teacher, self._token_ids[rows])
            self.student_logp[rows], self.teacher_logp[rows] = normalizers.student_logp, normalizers.teacher_logp
            for name, values in self._passes.inputs(found, student, teacher, normalizers).items():
                found[name][rows] = values
        return found

    @torch.no_grad()
    def differentiate(self, token_scale: torch.Tensor) -> None:
        """Computes all attributes for every token, and the gradients of the sum of token_scale [N] x divergence."""
        hidden, head, scale_N = self._hidden.detach(), self._head.detach(), token_scale.to(self.working_dtype)
        if self._trains_hidden:
            self._hidden_gradient = torch.empty_like(hidden)
        if self._trains_head:
            self._head_gradient = torch.zeros_like(head, dtype=self.working_dtype)
        narrow = None
        if self.trains and hidden.dtype != self._student.buffer.dtype:
            narrow = torch.empty_like(self._student.buffer, dtype=hidden.dtype)
        for rows in slices(len(hidden), self._size):
            student, teacher = self._student.project(rows), self._teacher.project(rows)
            normalizers = self._passes.normalizers(student, teacher, self._token_ids[rows])
            gradient = None
            if self.trains:
                gradient = student if narrow is None else narrow[: len(student)]
            totals = self._passes.totals_and_gradient(student, teacher, normalizers, scale_N[rows], gradient)
            self.student_logp[rows], self.teacher_logp[rows] = normalizers.student_logp, normalizers.teacher_logp
            self.value_N[rows], self.clipped_N[rows] = totals.value, totals.clipped
            if gradient is not None and self._hidden_gradient is not None:
                torch.mm(gradient, head, out=self._hidden_gradient[rows])
            if gradient is not None and self._head_gradient is not None:
                kernels.add_outer_(self._head_gradient, gradient, hidden[rows])

    def tied(self, value: torch.Tensor, factor: torch.Tensor, main_grad: torch.Tensor | None) -> torch.Tensor:
        """`value` as a function of the hidden states and the head, whose gradients are `factor` times those
        computed."""
        if not self.trains:
            return value
        return FinishedGradients.apply(
            self._hidden, self._head, value, self._hidden_gradient, self._head_gradient, factor, main_grad
        )


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
        """The gradients; they are passed on without a copy, so backward runs only once."""
        if ctx.gradients is None:
            raise RuntimeError(RAN_TWICE)
        (hidden_gradient, head_gradient, factor, main_grad, head_dtype), ctx.gradients = ctx.gradients, None
        scale = upstream * factor.to(upstream)
        if hidden_gradient is not None:
            hidden_gradient = kernels.scale_rows_(hidden_gradient, scale)
        if head_gradient is not None and main_grad is not None:
            main_grad.addcmul_(head_gradient, scale.to(main_grad))
            # Autograd must see a gradient, or Megatron's hook does not run and its bucket is never reduced.
            head_gradient = torch.zeros_like(head_gradient, dtype=head_dtype)
        elif head_gradient is not None:
            head_gradient = head_gradient.mul_(scale.to(head_gradient)).to(head_dtype)
        return hidden_gradient, head_gradient, None, None, None, None, None


def check_main_grad(main_grad: torch.Tensor | None, head: torch.Tensor) -> None:
    """Raises `LayoutError` where Megatron's gradient buffer does not match the head."""
    if main_grad is not None and main_grad.dtype not in (torch.float32, torch.float64):
        raise LayoutError(f"main_grad must be fp32, so that long sums keep their digits; got {main_grad.dtype}.")
    if main_grad is not None and (main_grad.shape != head.shape or main_grad.device != head.device):
        raise LayoutError(
            f"main_grad must be like student_head, {tuple(head.shape)} on {head.device}; got "
            f"{tuple(main_grad.shape)} on {main_grad.device}."
        )
