"""What a run has read and checked before any model is built."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from renio_megatron.config.schema import RunConfig, SftConfig
from renio_megatron.config.teachers import ONLY, setting_of, single_teachers
from renio_megatron.data.prompt_views import View, chat_template_of, teacher_view
from renio_megatron.data.prompts import PromptStream
from renio_megatron.files import user_path
from renio_megatron.megatron.checkpoint.directory import find_pretrained
from renio_megatron.megatron.weights.peft_config import PeftAdapter
from renio_megatron.models.architecture import Architecture
from renio_megatron.models.ends import Ends, differing_ends, ends_of
from renio_megatron.models.hf_weights import WeightFiles
from renio_megatron.models.shipped import model_directory
from renio_megatron.models.tokenizer import check_embedding, check_same_tokenizer, load_tokenizer
from renio_megatron.types import Prompt, Rollout

_MAX_NAMED = 3


@dataclass(frozen=True)
class TeacherInputs:
    """What is known of a teacher.

    Attributes:
        directory: its Hugging Face directory.
        weights: where its weights are: there, or a checkpoint that Megatron wrote.
        architecture: its own.
        ends: what ends its own completions.
    """

    directory: Path
    weights: Path
    architecture: Architecture
    ends: Ends


@dataclass(frozen=True)
class Inputs:
    """A run's models, data and graders. No collective is needed for them.

    Attributes:
        model: the student's Hugging Face directory.
        weights: where its weights are: there, or a checkpoint that Megatron wrote.
        architecture: its own.
        adapter: that it starts with; None where it has none, or new ones.
        teachers: by the names of `teachers.single_teachers`; none in fine-tuning.
        vocab_size: V of the loss: the columns that all models have.
        stream: the prompts.
        evaluation: the problems of the evaluation; none where there is none.
        grader, eval_grader: of training and evaluation problems; None where nothing can be graded.
        ends: what ends a completion.
        tokenizer: the student's.
        pad_id: fills rows on the right.
        notices: sentences for the user, about what is not wrong and may be another than was meant.
        date: that the chat template writes, in ISO's format; None where it writes none.
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
    ends: Ends
    tokenizer: Any
    pad_id: int
    notices: tuple[str, ...] = ()
    date: str | None = None


def most_completion_tokens(config: RunConfig | SftConfig, inputs: Inputs) -> int:
    """Completion tokens that no micro-batch exceeds, of either model: a packed row's, or those of sequences as long as
    they may be."""
    if config.train.max_tokens_per_micro_batch is not None:
        return config.train.max_tokens_per_micro_batch
    given = inputs.architecture.max_sequence_length
    longest = config.rollout.max_completion_length if isinstance(config, RunConfig) else given
    return config.train.micro_batch_size * longest


def stops_of(config: RunConfig | SftConfig) -> tuple[list[int], list[str]]:
    """Token ids and texts that end completions beside those of the model."""
    if isinstance(config, SftConfig):
        return [], []
    return list(config.rollout.stop_token_ids or ()), list(config.rollout.stop_strings or ())


def weights_of(model: Path, checkpoint: str | None, setting: str) -> Path:
    """Where a model's weights are: in its directory, unless the setting names a checkpoint."""
    return model if checkpoint is None else find_pretrained(checkpoint, setting)


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
        its_tokenizer = tokenizer
        if directory != student:
            its_tokenizer = load_tokenizer(directory)
            check_same_tokenizer(tokenizer, its_tokenizer)
        check_embedding(tokenizer, directory, architecture)
        own = weights
        if teacher.kind == "separate":
            own = weights_of(directory, teacher.pretrained_checkpoint, setting_of(name, "pretrained_checkpoint"))
        if own == directory:
            WeightFiles(directory).check(architecture)
        if teacher.adapter is not None:
            from renio_megatron.megatron.weights.merge_adapter import Merger

            Merger(user_path(teacher.adapter), architecture, own)  # refuses what cannot be merged
        found[name] = TeacherInputs(directory, own, architecture, ends_of(directory, its_tokenizer))
    return found


def teacher_views(config: RunConfig, tokenizer: Any) -> dict[str, View] | None:
    """How each of several teachers sees a problem, by name; None where there is one.

    Raises:
        ConfigError: an unknown field in a template, or settings of the chat template that do not fit the tokenizer.
    """
    views = {}
    for name, route in config.teacher.routes.items():
        data = single_teachers(config)[name].data
        chat_template_of(tokenizer, data)
        setting = "data.teacher_template" if route.template is None else f"teacher.routes.{name}.template"
        views[name] = teacher_view(data, setting)
    return views or None


def notices_of_prompts(
    stream: PromptStream, prompts: Sequence[Prompt], ends: Ends, teacher_ends: Mapping[str, Ends], tokenizer: Any
) -> list[str]:
    """Sentences about prompts and ends that may be other than they are meant.

    Args:
        stream: where the prompts come from.
        prompts: the first ones.
        ends: of the student's completions.
        teacher_ends: of each teacher's own, by its name.
        tokenizer: the student's.
    """
    found = list(stream.source.notices)
    who_ends: dict[Ends, list[str]] = {}
    for name, one in teacher_ends.items():
        who_ends.setdefault(one, []).append("the teacher" if name == ONLY else f"the teacher {name}")
    for one, who in who_ends.items():
        if sentence := differing_ends(ends, one, tokenizer, " and ".join(who)):
            found.append(sentence)
    if stream.chat_template is not None:
        found += stream.chat_template.notices()
    if len({prompt.student_ids for prompt in prompts}) == 1 < len(prompts):
        found.append(
            f"the student's prompts of the first {len(prompts)} records are all the same: look at "
            "data.student_template, data.problem_key and the records (`renio preview` shows them)."
        )
    return found
