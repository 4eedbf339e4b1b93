"""The memory of every pipeline rank of a run: what is held throughout, and what each phase of a step adds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from renio_megatron.chunk_size import chunk_size_for, loss_buffer_bytes, token_bytes
from renio_megatron.config import RunConfig
from renio_megatron.megatron.architecture import padded_vocab_size
from renio_megatron.plan.activations import (
    Pieces,
    backward_bytes,
    chunk_bytes,
    chunks_in_flight,
    final_norm_bytes,
    forward_bytes,
    tokens_bytes,
    untouched_bytes,
)
from renio_megatron.plan.models import PlannedModel, adapter_tensors, fp8_entries, rank_tensors
from renio_megatron.settings import PrecisionConfig

RESERVE = 0.1
"""Share of a GPU's memory that is left for what is not counted: CUDA's context, NCCL's buffers, gaps."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes on the ranks of one pipeline rank; its tensor, context and data ranks are alike.

    Attributes:
        pipeline_rank: which.
        held: what is there all the time, by name.
        phases: what each phase of a step adds, by name; one phase follows the other.
    """

    pipeline_rank: int
    held: dict[str, int]
    phases: dict[str, dict[str, int]]

    @property
    def peak_phase(self) -> str:
        """The phase that adds most."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def peak(self) -> int:
        """Bytes at the largest moment."""
        return sum(self.held.values()) + sum(self.phases[self.peak_phase].values())


@dataclass(frozen=True)
class Workload:
    """The largest pass that a recipe allows on one rank.

    Attributes:
        pieces: of the student's and the teacher's micro-batches: both views have the same bound.
        rows: completion tokens of a micro-batch on this rank.
        num_micro_batches: of a step.
        step_tokens: completion tokens of the step's sequences that this data rank has.
        step_rows: those of them that this context rank trains.
        sampled: sequences that are decoded together.
        sampled_length: of each, prompt and completion.
        is_realigned: whether the teacher's hidden states are put into another order, which takes a copy.
    """

    pieces: Pieces
    rows: int
    num_micro_batches: int
    step_tokens: int
    step_rows: int
    sampled: int
    sampled_length: int
    is_realigned: bool


def plan_memory(
    config: RunConfig, student: PlannedModel, teacher: PlannedModel, world_size: int, *, fused_norm: bool = True
) -> list[RankMemory]:
    """What each pipeline rank of the run holds; the largest decides.

    Args:
        config: the recipe, checked against `world_size` and the models.
        student, teacher: for teachers that are the student the same one twice; the student with config.lora.
        world_size: ranks of the job.
        fused_norm: as torch computes norms on CUDA; False on a CPU.
    """
    ranks = range(config.parallel.pipeline_model_parallel_size)
    work = workload(config, world_size, fused_norm=fused_norm)
    return [_Rank(config, student, teacher, world_size, work, rank).memory() for rank in ranks]


def workload(config: RunConfig, world_size: int, *, fused_norm: bool = True) -> Workload:
    """The largest pass: every prompt of data.max_prompt_length, every completion of rollout.max_completion_length."""
    parallel, train, rollout = config.parallel, config.train, config.rollout
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    data = world_size // parallel.model_ranks
    sequences, completion = train.global_batch_size // data, rollout.max_completion_length
    # The last token is not read. Rows are padded as `data.collate.Arrangement` does it.
    longest = config.data.max_prompt_length + completion - 1
    cut = tensor if parallel.sequence_parallel else 1
    multiple = cut if context == 1 else context * math.lcm(2, cut)
    is_packed = train.max_tokens_per_micro_batch is not None
    together = 1 if is_packed else train.micro_batch_size
    row = -(-(train.max_tokens_per_micro_batch or longest) // multiple) * multiple // context
    pieces = Pieces(
        tokens=together * row,
        row_length=row,
        rows_joined=is_packed or context > 1,
        tensor=tensor,
        context=context,
        sequence_parallel=parallel.sequence_parallel,
        element=2 if train.bf16 else 4,
        fused_norm=fused_norm,
    )
    share_of_rows = _most_rows(config.data.max_prompt_length - 1, completion, context, row if not is_packed else None)
    step_rows = sequences * share_of_rows
    rows = min(pieces.tokens, step_rows) if is_packed else together * share_of_rows
    share = -(-sequences // context)
    return Workload(
        pieces=pieces,
        rows=rows,
        num_micro_batches=sequences // together,
        step_tokens=sequences * completion,
        step_rows=step_rows,
        sampled=min(rollout.micro_batch_size or share, share),
        sampled_length=config.data.max_prompt_length + completion,
        is_realigned=is_packed or context > 1,
    )


class _Rank:
    """The arithmetic of one pipeline rank."""

    def __init__(
        self,
        config: RunConfig,
        student: PlannedModel,
        teacher: PlannedModel,
        world_size: int,
        work: Workload,
        rank: int,
    ) -> None:
        self._config, self._student, self._teacher, self._work, self._rank = config, student, teacher, work, rank
        self._models = (student, teacher)
        parallel = config.parallel
        self._stages = parallel.pipeline_model_parallel_size
        self._is_last = rank == self._stages - 1
        self._chunks = parallel.virtual_pipeline_model_parallel_size or 1
        self._data = world_size // (parallel.tensor_model_parallel_size * self._stages)  # context ranks included
        self._vocab = min(student.architecture.vocab_size, teacher.architecture.vocab_size)
        self._width = padded_vocab_size(self._vocab, parallel) // parallel.tensor_model_parallel_size
        self._element = work.pieces.element
        self._is_own_teacher = student.is_frozen and config.teacher.kind == "initial"
        # fp32 logits of either model; bf16 ones where the recipe asks for them.
        self._logit = 4 if config.head.logits_dtype == "fp32" else self._element

    def memory(self) -> RankMemory:
        """Everything."""
        tensors = self._tensors(self._student, self._chunks)
        adapters = adapter_tensors(self._student, self._config.parallel, num_chunks=self._chunks)
        trained = adapters if self._student.is_frozen else tensors
        frozen = sum(self._tensors(self._teacher, 1))
        copies, saved = self._fp8_copies(), self._fp8_savings()
        held = {
            "parameters": sum(tensors + adapters) * self._element,
            **({"parameters in FP8": copies} if copies else {}),
            "gradients": self._buffer(trained) * 4,
            "optimiser": self._optimised(trained) * (12 if self._config.train.bf16 else 8),
            **self._teachers(frozen * self._element - saved, trained),
        }
        if self._work.pieces.sequence_parallel:  # Megatron gathers into one buffer and keeps it
            held["gathered sequence"] = max(tokens_bytes(model, self._work.pieces) for model in self._models)
        phases = {"sampling": self._sampling(), "teacher": self._scoring(self._teacher) | self._moved(frozen, trained)}
        if self._is_last and self._work.is_realigned and self._config.teacher.payload_device == "device":
            ordered = self._work.step_tokens * self._teacher.architecture.hidden_size * self._element
            phases["ordering"] = {"payload": self._payload(), "copy": ordered}
        if self._config.rollout.student_scores == "recompute":
            phases["scores"] = self._scoring(self._student)
        kept, again = self._activations()
        if self._is_last:
            phases["loss"] = self._loss(kept)
        phases["backward"] = self._backward(trained, kept, again)
        # torch's AdamW makes the roots of all second moments at once.
        phases["step"] = {"payload": self._payload(), "temporaries": self._optimised(trained) * 4}
        return RankMemory(self._rank, held, phases)

    def _fp8_copies(self) -> int:
        """What a student's weights take in FP8, as they are and transposed, beside those that the optimiser updates.

        With fp8_param_gather there are no others; two bytes of FP8 are then in the place of two of bf16.
        """
        config = self._config
        if config.precision.fp8_param_gather:
            return 0
        entries = fp8_entries(self._student, config.parallel, config.precision, self._rank)
        return 2 * _with_scales(entries, config.precision)

    def _fp8_savings(self) -> int:
        """By how much a teacher's weights are smaller, which are kept in FP8 alone and never transposed."""
        config = self._config
        entries = fp8_entries(self._teacher, config.parallel, config.teacher_precision, self._rank)
        return entries * self._element - _with_scales(entries, config.teacher_precision)

    def _teachers(self, own: int, tensors: Sequence[int]) -> dict[str, int]:
        """What is there of the teacher all the time; `own` bytes where it has weights of its own."""
        if self._is_own_teacher:
            return {"teacher's parameters": 0}
        kind, head = self._config.teacher.kind, self._width * self._teacher.architecture.hidden_size * self._is_last
        if kind == "current":
            return {}
        if kind == "ema":  # in fp32, and the head that the loss reads where it is trained and narrower
            is_copied = self._element < 4 and not self._student.is_frozen
            return {"teacher's average": sum(tensors) * 4 + (head * self._element if is_copied else 0)}
        if self._config.teacher.offload is not None:
            return {"teacher's LM head": head * self._element}
        return {"teacher's parameters": own}

    def _moved(self, frozen: int, tensors: Sequence[int]) -> dict[str, int]:
        """What a teacher's pass puts into place."""
        if self._config.teacher.kind == "ema" and self._element < 4:
            return {"average in bf16": sum(tensors) * self._element}
        if self._config.teacher.offload is None:
            return {}
        head = self._width * self._teacher.architecture.hidden_size * self._is_last
        return {"teacher's parameters": (frozen - head) * self._element}

    def _tensors(self, model: PlannedModel, num_chunks: int) -> list[int]:
        return rank_tensors(
            model, self._config.parallel, vocab_size=self._vocab, pipeline_rank=self._rank, num_chunks=num_chunks
        )

    def _buffer(self, tensors: Sequence[int]) -> int:
        """Entries of DDP's gradient buffer. For the distributed optimiser every tensor begins at a multiple of 64, and
        the end is one of 128 and of the ranks (Megatron's `_ParamAndGradBuffer`; one bucket)."""
        if not self._config.parallel.use_distributed_optimizer:
            return sum(tensors)
        return _ceil(sum(_ceil(entries, 64) for entries in tensors), math.lcm(self._data, 128))

    def _optimised(self, tensors: Sequence[int]) -> int:
        """Entries whose moments this rank has; context ranks share them like data ranks."""
        if not self._config.parallel.use_distributed_optimizer:
            return sum(tensors)
        return -(-sum(tensors) // self._data)

    def _sampling(self) -> dict[str, int]:
        """Decoding: keys and values of whole sequences, the pass over the prompts, the draw from whole distributions.

        Evaluation decodes in the same way, with all of the rank's problems together unless rollout.micro_batch_size
        bounds them.
        """
        config, work, it = self._config, self._work, self._student.architecture
        count, length = work.sampled, work.sampled_length
        if config.evaluate.every:
            problems = -(-config.evaluate.samples // self._data)  # the data ranks' share, and the context ranks' of it
            decoded = min(config.rollout.micro_batch_size or problems, problems)
            answer = config.evaluate.max_completion_length or config.rollout.max_completion_length
            count, length = max(
                ((count, length), (decoded, config.data.max_prompt_length + answer)), key=lambda pair: math.prod(pair)
            )
        groups = max(1, it.num_query_groups // work.pieces.tensor) * it.kv_channels
        prompts = count * config.data.max_prompt_length
        whole = replace(
            work.pieces, tokens=prompts, row_length=config.data.max_prompt_length, context=1, sequence_parallel=False
        )
        found = {
            "key-value cache": 2 * count * length * groups * self._element * (it.num_layers // self._stages),
            "a layer's pass": forward_bytes(self._student, whole),
        }
        if self._is_last:
            # Logits twice in fp32; in fp64 divided, probabilities and sums; sorted, with places, for top-k and top-p.
            is_sorted = config.rollout.top_k is not None or config.rollout.top_p is not None
            found["drawing"] = count * self._vocab * (32 + (24 if is_sorted else 0))
        return found

    def _scoring(self, model: PlannedModel) -> dict[str, int]:
        """A forward pass without gradient, and log-probabilities of the rows that it ends with; the payload grows."""
        work = self._work
        found = {"a layer's pass": forward_bytes(model, work.pieces) + self._sent(model)}
        if self._is_last:
            each = token_bytes(self._width, self._element, self._logit, num_models=1)
            chunk = chunk_size_for(work.rows, each, self._config.head.chunk_size)
            hidden = model.architecture.hidden_size * self._element
            gathered = tokens_bytes(model, work.pieces) if work.pieces.sequence_parallel else 0
            found["logits"] = min(chunk, work.rows) * each
            found["rows for the head"] = work.rows * hidden + gathered
            found["payload"] = self._payload()
        return found

    def _activations(self) -> tuple[int, int]:
        """What the layers keep in Megatron's schedule at the most, and what computing some again takes on top."""
        config, work, student = self._config, self._work, self._student
        flying = chunks_in_flight(config.parallel, self._rank, work.num_micro_batches)
        layers = student.architecture.num_layers // (self._stages * self._chunks)
        each, again = chunk_bytes(student, work.pieces, config.train, layers)
        kept = flying * (each + self._sent(student, self._chunks))
        if self._rank == 0:
            kept += min(flying, work.num_micro_batches) * work.pieces.tokens * 8  # token ids
            if config.train.recompute_granularity != "full":
                kept -= min(flying, work.num_micro_batches) * untouched_bytes(student, work.pieces)
        return kept, again

    def _loss(self, kept: int) -> dict[str, int]:
        """The end of a micro-batch's forward pass on the last stage: `kept` of its layers, and the chunked loss."""
        work, student = self._work, self._student
        hidden = student.architecture.hidden_size
        rows = work.rows * hidden * self._element
        gathered = tokens_bytes(student, work.pieces) if work.pieces.sequence_parallel else 0
        return {
            "activations": kept + final_norm_bytes(student, work.pieces),
            "rows for the head": rows + gathered,
            "payload": self._payload(in_use=True),
            "buffers": loss_buffer_bytes(
                work.rows, self._width, self._element, self._logit, self._config.head.chunk_size
            ),
            "results": rows + (0 if student.is_frozen else self._width * hidden * 4),
        }

    def _backward(self, tensors: Sequence[int], kept: int, again: int) -> dict[str, int]:
        """The beginning of a micro-batch's backward pass, whose widest gradient of a weight is on its way."""
        is_frozen = self._student.is_frozen
        # A tied head's meets the embedding's on one rank.
        tied = self._student.architecture.tied and self._stages == 1 and not is_frozen
        weight = max(tensors) * self._element * (2 if tied else 1)
        if self._is_last and not is_frozen:  # the loss has its own in fp32, and gives autograd zeros in its place
            weight = max(weight, self._width * self._student.architecture.hidden_size * (4 + self._element))
        found = {"activations": kept}
        if again:
            found["layers again"] = again
        return {
            **found,
            "gradients": backward_bytes(self._student, self._work.pieces) + weight,
            "payload": self._payload(),
        }

    def _sent(self, model: PlannedModel, num_chunks: int = 1) -> int:
        """A micro-batch's hidden states that go to the next stage, and are kept until their gradient comes back."""
        work = self._work.pieces
        is_sender = self._stages > 1 and (num_chunks > 1 or not self._is_last)
        return tokens_bytes(model, work) // work.share if is_sender else 0

    def _payload(self, *, in_use: bool = False) -> int:
        """The teacher's hidden states on this device: the step's, or only those of the micro-batch `in_use` and what
        makes them again."""
        if not self._is_last:
            return 0
        work, kind = self._work, self._config.teacher.payload_device
        row = self._teacher.architecture.hidden_size * self._element
        if kind == "device":  # all of them, until the end of the step
            return work.step_rows * row
        if not in_use:
            return 0
        again = forward_bytes(self._teacher, work.pieces) if kind == "recompute" else 0
        return work.rows * row + again


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


def _with_scales(entries: int, precision: PrecisionConfig) -> int:
    """Bytes of FP8 numbers; MXFP8 has a byte of scale for each 32, the others' scales do not matter."""
    return entries + (entries // 32 if precision.fp8_recipe == "mxfp8" else 0)


def _ceil(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
