"""Memory of the student on a rank: weights, optimizer, and the phases of a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from renio_megatron.config.schema import DistillationConfig
from renio_megatron.losses.chunk_size import loss_buffer_bytes
from renio_megatron.objective.weightings import LOGIT_INPUTS, OF_STUDENT
from renio_megatron.tools.plan.activations import (
    backward_bytes,
    chunk_bytes,
    chunks_in_flight,
    final_norm_bytes,
    forward_bytes,
    untouched_bytes,
)
from renio_megatron.tools.plan.parts import PlannedPart, Tensors
from renio_megatron.tools.plan.scoring import gathered_bytes, logit_bytes, scoring_bytes, sent_bytes, with_scales
from renio_megatron.tools.plan.workload import Workload

Payload = Callable[[bool], int]
"""(whether a micro-batch's loss reads it now) -> bytes of the teacher's hidden states on this rank's device."""


class PlannedStudent:
    """Memory of one pipeline rank of the student."""

    def __init__(self, config: DistillationConfig, part: PlannedPart, work: Workload) -> None:
        self.part = part
        self._config, self._work, self._forward_work = config, work, work.student

    @property
    def trained(self) -> Tensors:
        """Parameters with a gradient: all of the model, or the adapters."""
        return self.part.adapters() if self.part.model.is_frozen else self.part.tensors()

    def held(self) -> dict[str, int]:
        """Bytes that are held all the time, by name."""
        trained, copies = self.trained, self._fp8_copies()
        states = 12 if self._config.train.bf16 else 8
        return {
            "parameters": (self.part.tensors().count + self.part.adapters().count) * self.part.bytes_per_value,
            **({"parameters in FP8": copies} if copies else {}),
            "gradients": sum(self._buffer(*group) for group in self._groups(trained)) * 4,
            "optimizer": sum(self._optimized(*group) for group in self._groups(trained)) * states,
        }

    def sampling(self) -> dict[str, int]:
        """Bytes of decoding: keys and values of whole sequences, the prefill, the draw from full distributions.

        Evaluation decodes in the same way, with all of the rank's problems at once unless rollout.micro_batch_size
        bounds them.
        """
        config, work, it = self._config, self._work, self.part.model.architecture
        count, length = work.sampled, work.sampled_length
        if config.evaluate.every:
            # The data ranks' share, and the context ranks' of it.
            problems = -(-config.evaluate.samples // self.part.copies)
            decoded = min(config.rollout.micro_batch_size or problems, problems)
            answer = config.evaluate.max_completion_length or config.rollout.max_completion_length
            count, length = max(
                ((count, length), (decoded, config.data.max_prompt_length + answer)), key=lambda pair: math.prod(pair)
            )
        shape, prompt = self._forward_work.shape, config.data.max_prompt_length
        groups = max(1, it.num_query_groups // shape.tensor) * it.kv_channels
        whole = replace(shape, tokens=count * prompt, row_length=prompt, context=1, sequence_parallel=False)
        found = {
            "key-value cache": 2 * count * length * groups * self.part.bytes_per_value * self.part.num_layers,
            "a layer's pass": forward_bytes(self.part.model, whole),
        }
        if self.part.is_last:
            # Logits twice in fp32; in fp64 divided, probabilities and sums; sorted, with places, for top-k and top-p.
            is_sorted = config.rollout.top_k is not None or config.rollout.top_p is not None
            found["drawing"] = count * self.part.vocab_size * (32 + (24 if is_sorted else 0))
        return found

    def update(self, payload: Payload) -> dict[str, dict[str, int]]:
        """Bytes of the phases from the student's own scores to the optimizer's step."""
        phases = {}
        wanted = self._config.weighting.needs & LOGIT_INPUTS
        if self._config.rollout.student_scores == "recompute" or wanted:
            reads_both = not wanted <= OF_STUDENT
            phases["scores"] = scoring_bytes(
                self.part, self._forward_work, self._config.head, num_models=2 if reads_both else 1
            )
            if self.part.is_last:
                phases["scores"]["payload"] = payload(reads_both)
        kept, again = self._activations()
        if self.part.is_last:
            phases["loss"] = self._loss(kept, payload(True))
        phases["backward"] = self._backward(kept, again, payload(False))
        # torch's AdamW makes the roots of all second moments at once; experts have a separate optimizer.
        roots = max(self._optimized(*group) for group in self._groups(self.trained)) * 4
        phases["step"] = {"payload": payload(False), "temporaries": roots}
        return phases

    def _fp8_copies(self) -> int:
        """Bytes of the FP8 copies of the weights, as they are and transposed, in addition to those that the optimizer
        updates.

        With fp8_param_gather there are no others; two bytes of FP8 then replace two of bf16.
        """
        precision = self._config.precision
        if precision.fp8_param_gather:
            return 0
        return 2 * with_scales(self.part.fp8_entries(precision), precision.fp8_recipe)

    def _groups(self, trained: Tensors) -> list[tuple[Sequence[int], int]]:
        """Groups of parameters that share a gradient buffer and an optimizer, and the number of ranks with copies of
        them."""
        return [(trained.dense, self.part.copies), (trained.experts, self.part.expert_copies)]

    def _buffer(self, tensors: Sequence[int], copies: int) -> int:
        """Entries of DDP's gradient buffer. For the distributed optimizer every tensor starts at a multiple of 64, and
        the end is padded to a multiple of 128 and of the ranks (Megatron's `_ParamAndGradBuffer`; one bucket)."""
        if not self._config.parallel.use_distributed_optimizer:
            return sum(tensors)
        return _ceil(sum(_ceil(entries, 64) for entries in tensors), math.lcm(copies, 128))

    def _optimized(self, tensors: Sequence[int], copies: int) -> int:
        """Entries whose moments this rank holds; they are sharded over data and context ranks."""
        if not self._config.parallel.use_distributed_optimizer:
            return sum(tensors)
        return -(-sum(tensors) // copies)

    def _activations(self) -> tuple[int, int]:
        """Peak bytes that the layers keep in Megatron's schedule, and the extra bytes of recomputation."""
        config, forward, part = self._config, self._forward_work, self.part
        flying = chunks_in_flight(config.parallel, part.pipeline_rank, forward.num_micro_batches)
        each, again = chunk_bytes(part.model, forward.shape, config.train, part.layers_of_chunk)
        kept = flying * (each + sent_bytes(part, forward))
        if part.is_first:
            kept += min(flying, forward.num_micro_batches) * forward.shape.tokens * 8  # token ids
            if config.train.recompute_granularity != "full":
                kept -= min(flying, forward.num_micro_batches) * untouched_bytes(part.model, forward.shape)
        return kept, again

    def _loss(self, kept: int, payload: int) -> dict[str, int]:
        """Bytes at the end of a micro-batch's forward pass on the last stage: `kept` by its layers, and the chunked
        loss."""
        part, forward, head = self.part, self._forward_work, self._config.head
        hidden = part.model.architecture.hidden_size
        rows = forward.rows * hidden * part.bytes_per_value
        return {
            "activations": kept + final_norm_bytes(part.model, forward.shape),
            "rows for the head": rows + gathered_bytes(part, forward),
            "payload": payload,
            "buffers": loss_buffer_bytes(
                forward.rows, part.width, part.bytes_per_value, logit_bytes(part, head), head.chunk_size
            ),
            "results": rows + (0 if part.model.is_frozen else part.width * hidden * 4),
        }

    def _backward(self, kept: int, again: int, payload: int) -> dict[str, int]:
        """Bytes at the start of a micro-batch's backward pass, with the largest weight gradient in flight."""
        part, is_frozen = self.part, self.part.model.is_frozen
        # A tied head's meets the embedding's on one rank.
        tied = part.model.architecture.tied and part.num_pipeline_ranks == 1 and not is_frozen
        weight = self.trained.largest * part.bytes_per_value * (2 if tied else 1)
        if part.is_last and not is_frozen:  # the loss keeps it in fp32, and gives autograd zeros instead
            weight = max(weight, part.width * part.model.architecture.hidden_size * (4 + part.bytes_per_value))
        return {
            "activations": kept,
            **({"layers again": again} if again else {}),
            "gradients": backward_bytes(part.model, self._forward_work.shape) + weight,
            "payload": payload,
        }


def _ceil(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
