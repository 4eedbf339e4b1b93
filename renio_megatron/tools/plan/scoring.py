"""Memory of a forward-only pass, of the teacher or of a student whose scores are recomputed."""

from __future__ import annotations

from renio_megatron.config import HeadConfig
from renio_megatron.losses.chunk_size import chunk_size_for, token_bytes
from renio_megatron.tools.plan.activations import forward_bytes, tokens_bytes
from renio_megatron.tools.plan.parts import PlannedPart
from renio_megatron.tools.plan.workload import ForwardWork


def scoring_bytes(part: PlannedPart, forward: ForwardWork, head: HeadConfig, *, num_models: int = 1) -> dict[str, int]:
    """Bytes of a layer's pass, and on the last pipeline rank of the completion tokens' log-probabilities at its end; or
    of the values that follow from both models' logits."""
    shape = forward.shape
    found = {"a layer's pass": forward_bytes(part.model, shape) + sent_bytes(part, forward)}
    if part.is_last:
        each = token_bytes(part.width, part.bytes_per_value, logit_bytes(part, head), num_models)
        chunk = chunk_size_for(forward.rows, each, head.chunk_size)
        hidden = part.model.architecture.hidden_size * part.bytes_per_value
        found["logits"] = min(chunk, forward.rows) * part.width * logit_bytes(part, head) * num_models
        found["rows for the head"] = forward.rows * hidden + gathered_bytes(part, forward)
    return found


def sent_bytes(part: PlannedPart, forward: ForwardWork) -> int:
    """Bytes of a micro-batch's hidden states that are sent to the next stage, and kept until their gradient arrives."""
    is_sender = part.num_pipeline_ranks > 1 and (part.num_chunks > 1 or not part.is_last)
    return tokens_bytes(part.model, forward.shape) // forward.shape.share if is_sender else 0


def gathered_bytes(part: PlannedPart, forward: ForwardWork) -> int:
    """Bytes of the gathered hidden states of a micro-batch, where tensor-parallel ranks have shared them."""
    return tokens_bytes(part.model, forward.shape) if forward.shape.sequence_parallel else 0


def logit_bytes(part: PlannedPart, head: HeadConfig) -> int:
    """Bytes of a logit: fp32, or the model's dtype where the recipe requests it."""
    return 4 if head.logits_dtype == "fp32" else part.bytes_per_value


def with_scales(entries: int, recipe: str | None) -> int:
    """Bytes of FP8 numbers; MXFP8 has a scale of one byte for each 32, the other recipes' scales are negligible."""
    return entries + (entries // 32 if recipe == "mxfp8" else 0)
