"""Inputs of a run, read and checked before any model is built."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from renio_megatron.config import LoraConfig
from renio_megatron.config.schema import DistillationConfig, JobConfig
from renio_megatron.config.teachers import ONLY
from renio_megatron.data.prompt_views import PromptView, chat_template_of, teacher_view
from renio_megatron.data.prompts import LengthLimits, PromptStream, check_views_differ, number_in
from renio_megatron.data.sources import build_source
from renio_megatron.data.sources.source import Source
from renio_megatron.errors import ConfigError
from renio_megatron.evaluation.graders import Grader, build_grader, grader_name
from renio_megatron.files import user_path
from renio_megatron.megatron.checkpoint.directory import find_pretrained
from renio_megatron.megatron.weights.peft_config import PeftAdapter
from renio_megatron.models.architecture import Architecture, notices
from renio_megatron.models.chat_template import differing_templates
from renio_megatron.models.ends import Ends, differing_ends, ends_of
from renio_megatron.models.hf_weights import WeightFiles
from renio_megatron.models.shipped import model_directory
from renio_megatron.models.tokenizer import (
    check_embedding,
    check_same_tokenizer,
    conversion_notice,
    load_tokenizer,
    padding_id,
)
from renio_megatron.objective.weightings import COLUMN, INPUTS
from renio_megatron.runner.evaluation_job import EvaluationJob
from renio_megatron.runner.recipe_benchmarks import benchmarks_of
from renio_megatron.types import Prompt

_MAX_NAMED = 3


@dataclass(frozen=True)
class TeacherInputs:
    """Files of a teacher.

    Attributes:
        directory: its Hugging Face directory.
        weights: location of its weights: that directory, or a Megatron checkpoint.
        architecture: the teacher's architecture.
        ends: tokens and texts that end its own completions.
        tokenizer: its tokenizer, or the student's where it has its directory.
    """

    directory: Path
    weights: Path
    architecture: Architecture
    ends: Ends
    tokenizer: Any


@dataclass(frozen=True)
class RunInputs:
    """A run's models, data and graders, read without collectives.

    Attributes:
        model: the student's Hugging Face directory.
        weights: location of its weights: that directory, or a Megatron checkpoint.
        architecture: the student's architecture.
        adapter: the adapter that it starts with; None where it has none, or new ones.
        teachers: teachers by the names of `JobConfig.teachers`; empty in fine-tuning.
        vocab_size: V of the loss: the columns that all models have.
        stream: the prompts.
        evaluation: prompts of the evaluation; empty where nothing is evaluated.
        grader, eval_grader: graders of training and evaluation problems; None where nothing can be graded.
        benchmarks: benchmarks that are evaluated; None: none are.
        ends: tokens and texts that end a completion.
        tokenizer: the student's tokenizer.
        pad_id: fills rows on the right.
        notices: sentences for the user about valid inputs that may not be intended.
        date: ISO date that the chat template inserts; None where it inserts none.
    """

    model: Path
    weights: Path
    architecture: Architecture
    adapter: PeftAdapter | None
    teachers: Mapping[str, TeacherInputs]
    vocab_size: int
    stream: PromptStream
    evaluation: Sequence[Prompt]
    grader: Grader | None
    eval_grader: Grader | None
    benchmarks: EvaluationJob | None
    ends: Ends
    tokenizer: Any
    pad_id: int
    notices: tuple[str, ...] = ()
    date: str | None = None


def max_completion_tokens(config: JobConfig, inputs: RunInputs) -> int:
    """Upper bound of the completion tokens of a micro-batch, for both models: a packed row's, or those of sequences of
    maximum length."""
    if config.train.max_tokens_per_micro_batch is not None:
        return config.train.max_tokens_per_micro_batch
    return config.train.micro_batch_size * (config.longest_trained or inputs.architecture.max_sequence_length)


def stops_of(config: JobConfig) -> tuple[list[int], list[str]]:
    """Token ids and texts that end completions in addition to those of the model."""
    if not isinstance(config, DistillationConfig):
        return [], []
    return list(config.rollout.stop_token_ids or ()), list(config.rollout.stop_strings or ())


def weights_of(model: Path, checkpoint: str | None, setting: str) -> Path:
    """Location of a model's weights: its directory, unless the setting names a checkpoint."""
    return model if checkpoint is None else find_pretrained(checkpoint, setting)


def read_teachers(config: JobConfig, student: Path, weights: Path, tokenizer: Any) -> dict[str, TeacherInputs]:
    """Reads and checks each teacher's files; the result is by name.

    Args:
        config: the settings.
        student: the student's directory.
        weights: location of the student's weights, also used for teachers that are the student.
        tokenizer: the student's tokenizer.

    Raises:
        ConfigError, CheckpointError: a model is missing or does not fit the student's tokens; names the setting.
    """
    found = {}
    for one in config.teachers:
        teacher = one.settings
        directory = student if teacher.model is None else model_directory(teacher.model, one.setting("model"))
        architecture = Architecture.from_directory(directory)
        its_tokenizer = tokenizer
        if directory != student:
            its_tokenizer = load_tokenizer(directory)
            check_same_tokenizer(tokenizer, its_tokenizer)
        check_embedding(tokenizer, directory, architecture)
        own = weights
        if teacher.model is not None:
            own = weights_of(directory, teacher.pretrained_checkpoint, one.setting("pretrained_checkpoint"))
        if own == directory:
            WeightFiles(directory).check(architecture)
        if teacher.adapter is not None:
            from renio_megatron.megatron.weights.merge_adapter import Merger

            Merger(user_path(teacher.adapter), architecture, own)  # refuses adapters that cannot be merged
        ends = ends_of(directory, its_tokenizer)
        found[one.name] = TeacherInputs(directory, own, architecture, ends, its_tokenizer)
    return found


def teacher_views(config: JobConfig, tokenizer: Any) -> dict[str, PromptView] | None:
    """How each of several teachers sees a problem, by name; None where there is one.

    Raises:
        ConfigError: an unknown field in a template, or settings of the chat template that do not fit the tokenizer.
    """
    views = {}
    for one in config.teachers:
        if one.name == ONLY:
            return None
        chat_template_of(tokenizer, one.data)
        is_its_own = one.data.teacher_template != config.data.teacher_template
        setting = one.setting("template") if is_its_own else "data.teacher_template"
        views[one.name] = teacher_view(one.data, setting)
    return views or None


def notices_of_prompts(
    stream: PromptStream,
    prompts: Sequence[Prompt],
    ends: Ends,
    tokenizer: Any,
    teachers: Mapping[str, tuple[Ends, Any]],
) -> list[str]:
    """Sentences about prompts and ends that may not be intended.

    Args:
        stream: the stream of prompts.
        prompts: its first prompts.
        ends: ends of the student's completions.
        tokenizer: the student's tokenizer.
        teachers: by its name, ends of each teacher's own completions, and its tokenizer.
    """
    found = [*stream.source.notices, *stream.notices()]
    who_ends: dict[Ends, list[str]] = {}
    for name, (one, its_tokenizer) in teachers.items():
        title = "the teacher" if name == ONLY else f"the teacher {name}"
        who_ends.setdefault(one, []).append(title)
        if stream.chat_template is not None and (told := differing_templates(tokenizer, its_tokenizer, title)):
            found.append(told)
    for one, who in who_ends.items():
        if sentence := differing_ends(ends, one, tokenizer, " and ".join(who)):
            found.append(sentence)
    if stream.chat_template is not None:
        found += stream.chat_template.notices()
    if sentence := conversion_notice(tokenizer):
        found.append(sentence)
    if len({prompt.student_ids for prompt in prompts}) == 1 < len(prompts):
        found.append(
            f"the student's prompts of the first {len(prompts)} records are all the same: look at "
            "data.student_template, data.problem_key and the records (`renio preview` shows them)."
        )
    return found


def read_inputs(config: JobConfig, now: datetime | None = None) -> RunInputs:
    """Opens and checks models' descriptions, tokenizers and data.

    Args:
        config: all settings.
        now: the time that a chat template may insert; None: the clock's.

    Raises:
        ConfigError, DataError: settings, models or data that do not fit together.
    """
    model = model_directory(config.model, "model")
    architecture = Architecture.from_directory(model)
    now = now or datetime.now().replace(microsecond=0)
    tokenizer = load_tokenizer(model)
    check_embedding(tokenizer, model, architecture)
    weights = weights_of(model, config.pretrained_checkpoint, "pretrained_checkpoint")
    if weights == model and config.starts_from_weights:
        WeightFiles(model).check(architecture)
    teachers = read_teachers(config, model, weights, tokenizer)
    # The number of rows beyond the tokenizer's tokens differs between models of a family; those rows are not used.
    vocab_size = min(one.vocab_size for one in (architecture, *(teacher.architecture for teacher in teachers.values())))
    adapter = _adapter(config.lora, model, weights)
    source = build_source(config.data, "train")
    stream = PromptStream(
        source,
        tokenizer,
        config.data,
        teacher_views=teacher_views(config, tokenizer),
        with_completions=config.longest_completion is None,
        max_length=config.longest_given,
        completions_per_prompt=config.completions_per_prompt,
        length_limits=length_limits(
            config, architecture, {name: teacher.architecture for name, teacher in teachers.items()}
        ),
        now=now,
    )
    first = stream.distinct(_num_checked(source, config, config.data.source_info.has_records))
    check_self_teachers(config, first)
    evaluation, eval_grader = _evaluation(config, stream)
    grader = build_grader(config.data, source)
    _check_samples(config.sample_needs, first, is_graded=grader is not None)
    ends = ends_of(model, tokenizer, *stops_of(config))
    directories = [model, *(teacher.directory for teacher in teachers.values())]
    found = [notice for one in dict.fromkeys(directories) for notice in notices(one)]
    of_teachers = {name: (teacher.ends, teacher.tokenizer) for name, teacher in teachers.items()}
    found += notices_of_prompts(stream, first, ends, tokenizer, of_teachers)
    graded = (source, *([stream.evaluation_source] if config.evaluates_held_out else []))
    found += [notice for each in graded if (notice := grader_name(config.data, each)[1]) is not None]
    return RunInputs(
        model=model,
        weights=weights,
        architecture=architecture,
        adapter=adapter,
        teachers=teachers,
        vocab_size=vocab_size,
        stream=stream,
        evaluation=evaluation,
        grader=grader,
        eval_grader=eval_grader,
        benchmarks=benchmarks_of(config),
        ends=ends,
        tokenizer=tokenizer,
        pad_id=padding_id(tokenizer),
        notices=tuple(found),
        date=now.isoformat() if stream.chat_template is not None and stream.chat_template.has_date else None,
    )


def check_self_teachers(config: JobConfig, prompts: Sequence[Prompt]) -> None:
    """Raises `ConfigError` where a teacher that is the student would see the student's prompts."""
    for one in config.teachers:
        if one.settings.model is None:
            check_views_differ([prompt for prompt in prompts if prompt.teacher == one.name], one.kind)


def _evaluation(config: JobConfig, stream: PromptStream) -> tuple[list[Prompt], Grader | None]:
    """The prompts of an evaluation, and their grader; empty and None where nothing is evaluated."""
    if not config.evaluates_held_out:
        return [], None
    prompts = stream.evaluation(config.evaluate.samples)
    grader = build_grader(config.data, stream.evaluation_source)
    if grader is None:
        raise ConfigError(
            "evaluate.every is set, but nothing can be graded: the evaluation records have no answers or "
            "data.grader=none. Set data.answer_key and data.grader, or evaluate.every=0."
        )
    return prompts, grader


def _check_samples(needs: Collection[str], prompts: Sequence[Prompt], *, is_graded: bool) -> None:
    """Raises `ConfigError` or `DataError` where an input that the weighting needs is not available."""
    if unknown := sorted(name for name in needs if name not in INPUTS and not name.startswith(COLUMN)):
        raise ConfigError(
            f"the weighting needs {', '.join(unknown)}, which nothing is called. There are {', '.join(INPUTS)}, and "
            f"{COLUMN!r} with the name of a column of the records."
        )
    if "verdict" in needs and not is_graded:
        raise ConfigError(
            "the weighting needs verdicts, and nothing can be graded: the records have no answers, or "
            "data.grader=none. Set data.answer_key and data.grader, or choose another weighting."
        )
    for column in (name.removeprefix(COLUMN) for name in needs if name.startswith(COLUMN)):
        for prompt in prompts:
            number_in(prompt, column)


def _adapter(lora: LoraConfig, model: Path, weights: Path) -> PeftAdapter | None:
    """The adapter that a student starts with."""
    if lora.adapter is None:
        return None
    from renio_megatron.megatron.weights.peft import check_adapter

    adapter = check_adapter(user_path(lora.adapter), lora)
    if adapter.start is not None and weights != model:
        raise ConfigError(
            f"lora.adapter: {lora.adapter} has init_lora_weights={adapter.start!r}, so it stands beside a part of the "
            "model's matrices, which is computed from Hugging Face's files; pretrained_checkpoint is set. Export that "
            "checkpoint, give the result as `model`, and leave pretrained_checkpoint out."
        )
    return adapter


def length_limits(config: JobConfig, student: Architecture, teachers: Mapping[str, Architecture]) -> LengthLimits:
    """The longest sequences that a run's models can read; `teachers` by their names."""
    completion = config.longest_completion
    positions = {name: teacher.max_sequence_length for name, teacher in teachers.items()}
    return LengthLimits(
        student.max_sequence_length, positions, completion, config.evaluate.max_completion_length or completion
    )


def _num_checked(source: Source, config: JobConfig, has_records: bool) -> int:
    """Number of prompts that are built at setup, so that a bad one is found before step 1.

    All that the run will use of a file's records; a few of generated problems, which are all similar.
    """
    used = config.train.train_iters * config.train.global_batch_size // config.completions_per_prompt
    if source.size is None or not has_records:
        return min(8, used)
    return min(source.size, used)
