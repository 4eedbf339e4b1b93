"""What a run has read and checked before any model is built."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from renio_megatron.data.prompts import PromptStream
from renio_megatron.megatron.architecture import Architecture
from renio_megatron.records import Prompt, Rollout


@dataclass(frozen=True)
class Inputs:
    """A run's models, data and graders. No collective is needed for them.

    Attributes:
        model, teacher: Hugging Face directories; the teacher's is None in fine-tuning.
        weights, teacher_weights: where the weights are: these, or checkpoints that Megatron wrote.
        architecture, teacher_architecture: theirs.
        vocab_size: V of the loss: the columns that both models have.
        stream: the prompts.
        evaluation: the problems of the evaluation; none where there is none.
        grader, eval_grader: of training and evaluation problems; None where nothing can be graded.
        stop_ids: tokens that end a completion.
        pad_id: fills rows on the right.
    """

    model: Path
    teacher: Path | None
    weights: Path
    teacher_weights: Path | None
    architecture: Architecture
    teacher_architecture: Architecture | None
    vocab_size: int
    stream: PromptStream
    evaluation: Sequence[Prompt]
    grader: Callable[[Rollout], bool | None] | None
    eval_grader: Callable[[Rollout], bool | None] | None
    stop_ids: tuple[int, ...]
    pad_id: int
