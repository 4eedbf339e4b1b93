"""Config -> roles -> Trainer: the only file that knows both the loop and Megatron."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from renio_megatron.build_teacher import build_teacher
from renio_megatron.config import HeadConfig, LoraConfig, TrainConfig
from renio_megatron.config.resume import to_yaml
from renio_megatron.config.schema import RunConfig, SftConfig
from renio_megatron.config.teachers import single_teachers
from renio_megatron.data.batching.collate import Arrangement, collate
from renio_megatron.data.prompts import PromptStream, Room, check_views_differ
from renio_megatron.data.sources import build_source
from renio_megatron.data.sources.source import Source
from renio_megatron.errors import ConfigError
from renio_megatron.evaluation.evaluator import Evaluator
from renio_megatron.evaluation.graders import build_grader
from renio_megatron.files import user_path
from renio_megatron.inputs import (
    Inputs,
    TeacherInputs,
    most_completion_tokens,
    notices_of_prompts,
    read_teachers,
    stops_of,
    teacher_views,
    weights_of,
)
from renio_megatron.losses.sample_weights import SampleWeights
from renio_megatron.megatron.weights.peft_config import PeftAdapter
from renio_megatron.models.architecture import Architecture, notices
from renio_megatron.models.ends import ends_of
from renio_megatron.models.hf_weights import WeightFiles
from renio_megatron.models.shipped import model_directory
from renio_megatron.models.tokenizer import check_embedding, load_tokenizer, padding_id
from renio_megatron.parallel.layout import Layout
from renio_megatron.training.algorithms import Algorithm
from renio_megatron.training.algorithms.distillation import Distillation
from renio_megatron.training.algorithms.sft import Sft
from renio_megatron.training.interfaces import Sampler
from renio_megatron.training.lr_schedule import learning_rate
from renio_megatron.training.metrics.sinks import Observer
from renio_megatron.training.rollout_log import RolloutObserver
from renio_megatron.training.trainer import Trainer
from renio_megatron.types import Decoding, Rollout


def read_inputs(config: RunConfig | SftConfig, now: datetime | None = None) -> Inputs:
    """Opens and checks models' descriptions, tokenizers and data.

    Args:
        config: all settings.
        now: the time that a chat template may write; None: the clock's.

    Raises:
        ConfigError, DataError: whatever does not fit together, named.
    """
    model = model_directory(config.model, "model")
    architecture = Architecture.from_directory(model)
    now = now or datetime.now().replace(microsecond=0)
    tokenizer = load_tokenizer(model)
    check_embedding(tokenizer, model, architecture)
    weights = weights_of(model, config.pretrained_checkpoint, "pretrained_checkpoint")
    if weights == model and (isinstance(config, RunConfig) or config.init == "pretrained"):
        WeightFiles(model).check(architecture)
    teachers = read_teachers(config, model, weights, tokenizer) if isinstance(config, RunConfig) else {}
    # Rows beyond a tokenizer's tokens differ between models of a family; no model may be asked about them.
    vocab_size = min(one.vocab_size for one in (architecture, *(teacher.architecture for teacher in teachers.values())))
    adapter = _adapter(config.lora, model, weights)
    source = build_source(config.data, "train")
    stream = PromptStream(
        source,
        tokenizer,
        config.data,
        teacher_views=teacher_views(config, tokenizer) if isinstance(config, RunConfig) else None,
        with_completions=isinstance(config, SftConfig),
        room=_room(config, architecture, teachers),
        now=now,
    )
    first = stream.batch(0, _num_checked(source, config.train))
    for name, one in single_teachers(config).items() if isinstance(config, RunConfig) else ():
        if one.teacher.kind != "separate":
            check_views_differ([prompt for prompt in first if prompt.teacher == name], one.teacher.kind)
    if isinstance(config, SftConfig) and config.train.max_tokens_per_micro_batch is not None:
        arrangement = Arrangement(
            0, max_tokens=config.train.max_tokens_per_micro_batch, context_size=config.parallel.context_parallel_size
        )
        given = [Rollout(prompt, prompt.completion_ids or ()) for prompt in first]
        collate(given, view="student", arrangement=arrangement)  # refuses what no row can hold
    eval_grader, evaluation = None, []
    if config.evaluate.every:
        evaluation = stream.evaluation(config.evaluate.samples)
        eval_grader = build_grader(config.data, stream.evaluation_source, tokenizer)
        if eval_grader is None:
            raise ConfigError(
                "evaluate.every is set, but nothing can be graded: the evaluation records have no answers or "
                "data.grader=none. Set data.answer_key and data.grader, or evaluate.every=0."
            )
    ends = ends_of(model, tokenizer, *stops_of(config))
    directories = [model, *(teacher.directory for teacher in teachers.values())]
    found = [notice for one in dict.fromkeys(directories) for notice in notices(one)]
    teacher_ends = {name: teacher.ends for name, teacher in teachers.items()}
    found += notices_of_prompts(stream, first, ends, teacher_ends, tokenizer)
    return Inputs(
        model=model,
        weights=weights,
        architecture=architecture,
        adapter=adapter,
        teachers=teachers,
        vocab_size=vocab_size,
        stream=stream,
        evaluation=evaluation,
        grader=build_grader(config.data, source, tokenizer),
        eval_grader=eval_grader,
        ends=ends,
        tokenizer=tokenizer,
        pad_id=padding_id(tokenizer),
        notices=tuple(found),
        date=now.isoformat() if stream.chat_template is not None and stream.chat_template.has_date else None,
    )


def build_trainer(
    config: RunConfig | SftConfig,
    inputs: Inputs,
    layout: Layout,
    checkpoints: Path,
    observers: Sequence[Observer] = (),
    rollout_observers: Sequence[RolloutObserver] = (),
    say: Callable[[str], None] | None = None,
) -> Trainer:
    """Builds the models on this rank and casts the roles.

    Args:
        config: all settings.
        inputs: `read_inputs(config)`.
        layout: this rank's place, from `megatron.start`.
        checkpoints: where they go.
        observers: told of every step's metrics.
        rollout_observers: told of every step's rollouts of this rank and of their weights.
        say: takes the progress lines of weights that take long to load, and a line about kernels that were tuned.
    """
    from renio_megatron.megatron.checkpoint.keeper import MegatronKeeper
    from renio_megatron.megatron.weights.pretrained import fingerprint

    learner, sampler = build_student(config, inputs, layout, say)
    lr_at = functools.partial(learning_rate, config.train)
    start = None if inputs.adapter is None else inputs.adapter.start
    base = fingerprint(inputs.weights, inputs.architecture, start) if config.lora.r is not None else None
    algorithm: Algorithm
    if isinstance(config, RunConfig):
        teacher = build_teacher(config, inputs, layout, learner.part, say)
        algorithm = _distillation(config, inputs, layout, sampler, teacher, learner, lr_at, rollout_observers)
        averages = teacher.averages
    else:
        algorithm, averages = Sft(learner, layout=layout, lr_at=lr_at), ()
    algorithm.tune(most_completion_tokens(config, inputs), say)
    return Trainer(
        algorithm=algorithm,
        prompts=inputs.stream.batch,
        keeper=MegatronKeeper(
            checkpoints, learner, config.checkpoint, config=to_yaml(config), averages=averages, base=base
        ),
        train_iters=config.train.train_iters,
        global_batch_size=config.train.global_batch_size,
        data_rank=layout.data.rank,
        data_size=layout.data.size,
        save_interval=config.checkpoint.save_interval,
        evaluate=_evaluator(config, inputs, layout, sampler),
        evaluate_every=config.evaluate.every,
        observers=observers,
    )


def build_student(
    config: RunConfig | SftConfig, inputs: Inputs, layout: Layout, say: Callable[[str], None] | None = None
) -> tuple[Any, Any]:
    """(learner, sampler) of one model with its initial weights: `MegatronLearner`, `MegatronSampler`."""
    from renio_megatron.megatron.model.build import build_model
    from renio_megatron.megatron.student.learner import MegatronLearner
    from renio_megatron.megatron.student.sampler import MegatronSampler
    from renio_megatron.megatron.weights.peft import load_adapter
    from renio_megatron.megatron.weights.pretrained import load_pretrained
    from renio_megatron.megatron.weights.residual import residual_of

    parallel, train = config.parallel, config.train
    is_loaded = isinstance(config, RunConfig) or config.init == "pretrained"
    part = build_model(
        inputs.architecture,
        layout,
        parallel,
        train,
        config.precision,
        config.lora,
        vocab_size=inputs.vocab_size,
        num_rows=inputs.architecture.vocab_size,
        initialise=not is_loaded,
    )
    if is_loaded:
        change = residual_of(inputs.adapter, inputs.weights, inputs.architecture, layout.device)
        load_pretrained(part, inputs.weights, title="student", say=say, change=change)
    if config.lora.adapter is not None:
        load_adapter(part, user_path(config.lora.adapter))
    temperature = config.loss.temperature if isinstance(config, RunConfig) else 1.0
    head = config.head if isinstance(config, RunConfig) else HeadConfig()
    learner = MegatronLearner(
        part,
        train,
        parallel,
        head,
        temperature=temperature,
        pad_id=inputs.pad_id,
        per_token=isinstance(config, SftConfig),
    )
    sampler = MegatronSampler(
        part,
        seed=train.seed,
        temperature=temperature,
        stop_ids=inputs.ends.token_ids,
        pad_id=inputs.pad_id,
        ends_in_text=inputs.ends.in_text(inputs.tokenizer),
    )
    return learner, sampler


def decoding_of(config: RunConfig) -> Decoding:
    """How a recipe's completions are drawn."""
    rollout = config.rollout
    return Decoding(
        rollout.temperature, rollout.top_p, rollout.top_k, rollout.max_completion_length, rollout.micro_batch_size
    )


def _distillation(
    config: RunConfig,
    inputs: Inputs,
    layout: Layout,
    sampler: Sampler,
    teacher: Any,
    learner: Any,
    lr_at: Callable[[int], float],
    rollout_observers: Sequence[RolloutObserver],
) -> Distillation:
    def tell(step: int, rollouts: Sequence[Rollout], sample: SampleWeights) -> None:
        for observer in rollout_observers:
            observer(step, rollouts, sample.weights.tolist())

    return Distillation(
        sampler,
        teacher,
        learner,
        layout=layout,
        decoding=decoding_of(config),
        loss=config.loss,
        head=config.head,
        weighting=config.weighting,
        recompute_student_scores=config.rollout.student_scores == "recompute",
        lr_at=lr_at,
        grader=inputs.grader,
        on_rollouts=tell,
        is_balanced=config.train.max_tokens_per_micro_batch is not None,
    )


def _evaluator(
    config: RunConfig | SftConfig, inputs: Inputs, layout: Layout, sampler: Sampler
) -> Callable[[], dict[str, float]] | None:
    if not config.evaluate.every or inputs.eval_grader is None:
        return None
    limit, together = config.evaluate.max_completion_length, None
    if isinstance(config, RunConfig):
        limit = limit or config.rollout.max_completion_length
        together = config.rollout.micro_batch_size
    assert limit is not None  # the recipe's rules see to it
    decoding = Decoding(config.evaluate.temperature, None, None, limit, together)
    return Evaluator(sampler, inputs.evaluation, inputs.eval_grader, decoding, layout)


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


def _room(config: RunConfig | SftConfig, student: Architecture, teachers: Mapping[str, TeacherInputs]) -> Room:
    completion = config.rollout.max_completion_length if isinstance(config, RunConfig) else None
    positions = {name: teacher.architecture.max_sequence_length for name, teacher in teachers.items()}
    return Room(student.max_sequence_length, positions, completion, config.evaluate.max_completion_length or completion)


def _num_checked(source: Source, train: TrainConfig) -> int:
    """Prompts that are built once at setup, so that a bad one is found before step 1.

    Of a file's records all that the run will use; of generated problems, which are all alike, a few.
    """
    used = train.train_iters * train.global_batch_size
    if source.size is None or source.name not in ("jsonl", "datasets"):
        return min(8, used)
    return min(source.size, used)
