"""What a run has read and checked before any model is built."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from renio_megatron.assets import model_directory
from renio_megatron.checkpoint_files import find_pretrained
from renio_megatron.config import RunConfig, SftConfig
from renio_megatron.data.chat import View, check_chat, teacher_view
from renio_megatron.data.prompts import PromptStream, check_same_tokenizer, load_tokenizer
from renio_megatron.errors import ConfigError
from renio_megatron.megatron.architecture import Architecture
from renio_megatron.megatron.hf_files import WeightFiles
from renio_megatron.megatron.peft_config import PeftAdapter
from renio_megatron.records import Prompt, Rollout
from renio_megatron.teacher_routes import setting_of, single_teachers

_MAX_NAMED = 3


@dataclass(frozen=True)
class TeacherInputs:
    """What is known of a teacher.

    Attributes:
        directory: its Hugging Face directory.
        weights: where its weights are: there, or a checkpoint that Megatron wrote.
        architecture: its own.
    """

    directory: Path
    weights: Path
    architecture: Architecture


@dataclass(frozen=True)
class Inputs:
    """A run's models, data and graders. No collective is needed for them.

    Attributes:
        model: the student's Hugging Face directory.
        weights: where its weights are: there, or a checkpoint that Megatron wrote.
        architecture: its own.
        adapter: that it starts with; None where it has none, or new ones.
        teachers: by the names of `teacher_routes.single_teachers`; none in fine-tuning.
        vocab_size: V of the loss: the columns that all models have.
        stream: the prompts.
        evaluation: the problems of the evaluation; none where there is none.
        grader, eval_grader: of training and evaluation problems; None where nothing can be graded.
        stop_ids: tokens that end a completion.
        pad_id: fills rows on the right.
        notices: sentences for the user, about what is not wrong and may be another than was meant.
    """

    model: Path
    weights: Path
    architecture: Architecture
    adapter: PeftAdapter | None
    teachers: Mapping[str, TeacherInputs]
    vocab_size: int
    stream: PromptStream
    evaluation: Sequence[Prompt]
    grader: Callable[[Rollout], bool | None] | None
    eval_grader: Callable[[Rollout], bool | None] | None
    stop_ids: tuple[int, ...]
    pad_id: int
    notices: tuple[str, ...] = ()


def most_completion_tokens(config: RunConfig | SftConfig, inputs: Inputs) -> int:
    """Completion tokens that no micro-batch exceeds, of either model: a packed row's, or those of sequences as long as
    they may be."""
    if config.train.max_tokens_per_micro_batch is not None:
        return config.train.max_tokens_per_micro_batch
    given = inputs.architecture.max_sequence_length
    longest = config.rollout.max_completion_length if isinstance(config, RunConfig) else given
    return config.train.micro_batch_size * longest


def weights_of(model: Path, checkpoint: str | None, setting: str) -> Path:
    """Where a model's weights are: in its directory, unless the setting names a checkpoint."""
    return model if checkpoint is None else find_pretrained(checkpoint, setting)


def check_embedding(tokenizer: Any, directory: Path, architecture: Architecture) -> None:
    """Raises `ConfigError` where the tokenizer has ids that a model has no row for.

    Args:
        tokenizer: the student's.
        directory: of the model.
        architecture: the model's.
    """
    vocabulary = tokenizer.get_vocab()
    beyond = sorted((index, token) for token, index in vocabulary.items() if index >= architecture.vocab_size)
    if beyond:
        named = ", ".join(f"{token!r} has the id {index}" for index, token in beyond[:_MAX_NAMED])
        more = f" (and {len(beyond) - _MAX_NAMED} more)" if len(beyond) > _MAX_NAMED else ""
        raise ConfigError(
            f"the student's tokenizer has tokens without a row in the embedding of {directory}, which has "
            f"{architecture.vocab_size}: {named}{more}. Resize that model's embedding (resize_token_embeddings), or "
            "take a tokenizer without them."
        )


def read_teachers(config: RunConfig, student: Path, weights: Path, tokenizer: Any) -> dict[str, TeacherInputs]:
    """What is known of each teacher, by name.

    Args:
        config: the settings.
        student: the student's directory.
        weights: where the student's weights are, which are those of a teacher that is the student.
        tokenizer: the student's.

    Raises:
        ConfigError, CheckpointError: a model that is not there or does not fit the student's tokens; the setting is
            named.
    """
    found = {}
    for name, one in single_teachers(config).items():
        teacher = one.teacher
        directory = student if teacher.model is None else model_directory(teacher.model, setting_of(name, "model"))
        architecture = Architecture.from_directory(directory)
        if directory != student:
            check_same_tokenizer(tokenizer, load_tokenizer(directory))
        check_embedding(tokenizer, directory, architecture)
        own = weights
        if teacher.kind == "separate":
            own = weights_of(directory, teacher.pretrained_checkpoint, setting_of(name, "pretrained_checkpoint"))
        if own == directory:
            WeightFiles(directory).check(architecture)
        if teacher.adapter is not None:
            from renio_megatron.megatron.merging import Merger

            Merger(Path(teacher.adapter), architecture, own)  # refuses what cannot be merged
        found[name] = TeacherInputs(directory, own, architecture)
    return found


def teacher_views(config: RunConfig, tokenizer: Any) -> dict[str, View] | None:
    """How each of several teachers sees a problem, by name; None where there is one.

    Raises:
        ConfigError: an unknown field in a template, or settings of the chat template that do not fit the tokenizer.
    """
    views = {}
    for name, route in config.teacher.routes.items():
        data = single_teachers(config)[name].data
        check_chat(tokenizer, data)
        setting = "data.teacher_template" if route.template is None else f"teacher.routes.{name}.template"
        views[name] = teacher_view(data, setting)
    return views or None
