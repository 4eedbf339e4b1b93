"""The largest passes that a recipe allows: every prompt and every completion as long as it may be."""

from __future__ import annotations

import math
from dataclasses import dataclass

from renio_megatron.config import ParallelConfig
from renio_megatron.config.schema import DistillationConfig
from renio_megatron.config.teachers import TeacherSpec


@dataclass(frozen=True)
class PassShape:
    """The shape of a pass on one rank.

    Attributes:
        tokens: tokens of a micro-batch on this rank, all rows together.
        row_length: tokens in one row.
        rows_joined: whether attention runs sequence by sequence and joins the outputs: packing, context parallelism.
        tensor, context: sizes of those axes.
        sequence_parallel: whether tensor-parallel ranks share the positions between their layers.
        bytes_per_value: bytes of an element of the model.
        fused_norm: whether the norm saves its input alone, as torch's CUDA kernel (2.9 and later) does. Elsewhere it is
            composed of operations in fp32, which save more.
        expert_model, expert_tensor: ranks that share the experts of a layer, and each expert.
    """

    tokens: int
    row_length: int
    rows_joined: bool
    tensor: int
    context: int
    sequence_parallel: bool
    bytes_per_value: int
    fused_norm: bool = True
    expert_model: int = 1
    expert_tensor: int = 1

    @property
    def share(self) -> int:
        """Ranks that share a tensor between the tensor-parallel layers."""
        return self.tensor if self.sequence_parallel else 1


@dataclass(frozen=True)
class ForwardWork:
    """Forward passes of one model over the step's sequences, on one rank.

    Attributes:
        shape: shape of a micro-batch's pass.
        rows: completion tokens of a micro-batch on this rank.
        num_micro_batches: micro-batches of a step.
        step_tokens: completion tokens of the step's sequences that this data rank has.
        step_rows: those of them that this context rank has.
    """

    shape: PassShape
    rows: int
    num_micro_batches: int
    step_tokens: int
    step_rows: int


@dataclass(frozen=True)
class Workload:
    """Workload of a step for a rank.

    Attributes:
        student, teacher: their passes.
        sampled: sequences that are decoded together.
        sampled_length: length of each, prompt and completion.
        is_realigned: whether hidden states of a teacher in the student's layout are reordered, which takes a copy.
        given_rows: hidden states that a rank of the teacher's last stage sends in a round of their exchange, which is a
            micro-batch of each of the student's replicas; the load is assumed to be even.
    """

    student: ForwardWork
    teacher: ForwardWork
    sampled: int
    sampled_length: int
    is_realigned: bool
    given_rows: int


def workload(config: DistillationConfig, teacher: TeacherSpec, world_size: int, *, fused_norm: bool = True) -> Workload:
    """The largest passes of the student and of one teacher.

    Every prompt has data.max_prompt_length tokens, every completion rollout.max_completion_length, of which an
    update reads rollout.prefix_length.
    """
    parallel, rollout = config.parallel, config.rollout
    trainers, readers = ranks_of(teacher, world_size)
    theirs = teacher.parallel
    student = _forward_work(config, parallel, trainers, bytes_per_value=2 if config.train.bf16 else 4, fused=fused_norm)
    scoring = _forward_work(config, theirs, readers, bytes_per_value=bytes_per_value_of(teacher), fused=fused_norm)
    context = parallel.context_parallel_size
    share = -(-_sequences(config, parallel, trainers) // context)
    asking = trainers // (parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size)
    return Workload(
        student=student,
        teacher=scoring,
        sampled=min(rollout.micro_batch_size or share, share),
        sampled_length=config.data.max_prompt_length + rollout.max_completion_length,
        is_realigned=config.train.max_tokens_per_micro_batch is not None or context > 1,
        given_rows=-(-asking * student.rows // (readers // theirs.pipeline_model_parallel_size)),
    )


def ranks_of(teacher: TeacherSpec, world_size: int) -> tuple[int, int]:
    """Ranks that hold the student, and ranks that hold the teacher."""
    return world_size - teacher.num_ranks, teacher.num_ranks or world_size


def bytes_per_value_of(teacher: TeacherSpec) -> int:
    """Bytes of an element of the teacher."""
    return 2 if teacher.bf16 else 4


def _sequences(config: DistillationConfig, parallel: ParallelConfig, num_ranks: int) -> int:
    """Sequences of a step that the fullest of a model's replicas has."""
    return -(-config.train.global_batch_size // (num_ranks // parallel.model_ranks))


def _forward_work(
    config: DistillationConfig, parallel: ParallelConfig, num_ranks: int, *, bytes_per_value: int, fused: bool
) -> ForwardWork:
    """The passes of a model over its share of the sequences, whose length has the same bound for both models."""
    train, completion = config.train, config.longest_trained
    assert completion is not None  # completions are drawn
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    sequences = _sequences(config, parallel, num_ranks)
    # The last token is not read. Rows are padded as `data.collate.BatchLayout` does it.
    longest = config.data.max_prompt_length + completion - 1
    cut = tensor if parallel.sequence_parallel else 1
    multiple = cut if context == 1 else context * math.lcm(2, cut)
    is_packed = train.max_tokens_per_micro_batch is not None
    together = 1 if is_packed else min(train.micro_batch_size, sequences)
    row = -(-(train.max_tokens_per_micro_batch or longest) // multiple) * multiple // context
    share_of_rows = _most_rows(config.data.max_prompt_length - 1, completion, context, row if not is_packed else None)
    step_rows = sequences * share_of_rows
    return ForwardWork(
        shape=PassShape(
            tokens=together * row,
            row_length=row,
            rows_joined=is_packed or context > 1,
            tensor=tensor,
            context=context,
            sequence_parallel=parallel.sequence_parallel,
            bytes_per_value=bytes_per_value,
            fused_norm=fused,
            expert_model=parallel.expert_model_parallel_size,
            expert_tensor=parallel.expert_tensor_ranks,
        ),
        rows=min(together * row, step_rows) if is_packed else together * share_of_rows,
        num_micro_batches=-(-sequences // together),
        step_tokens=sequences * completion,
        step_rows=step_rows,
    )


def _most_rows(first: int, count: int, context: int, row: int | None) -> int:
    """The most of `count` positions from `first` on that one context rank has: chunks r and 2 x ranks - 1 - r.

    Args:
        first, count: the positions.
        context: ranks.
        row: positions of each rank; None: as few as hold the sequence.

    >>> _most_rows(39, 24, 2, None)    # chunks of 16 positions: 9 of them in the third, 15 in the fourth
    15
    """
    chunk = -(-(first + count) // (2 * context)) if row is None else row // 2
    if context == 1:
        return count
    inside = [max(0, min(first + count, (i + 1) * chunk) - max(first, i * chunk)) for i in range(2 * context)]
    return max(inside[rank] + inside[-1 - rank] for rank in range(context))
