"""Config -> roles -> Trainer: the only file that knows both the loop and Megatron."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from renio_megatron.config import HeadConfig
from renio_megatron.config.resume import to_yaml
from renio_megatron.config.schema import DistillationConfig, JobConfig, SftConfig
from renio_megatron.evaluation.evaluator import Evaluator
from renio_megatron.files import user_path
from renio_megatron.losses.sample_weights import SampleWeights
from renio_megatron.parallel.layout import Layout
from renio_megatron.runner.build_teachers import build_teacher
from renio_megatron.runner.inputs import Inputs, most_completion_tokens
from renio_megatron.training.algorithms import Algorithm
from renio_megatron.training.algorithms.distillation import Distillation
from renio_megatron.training.algorithms.sft import Sft
from renio_megatron.training.interfaces import Sampler
from renio_megatron.training.lr_schedule import learning_rate
from renio_megatron.training.metrics.sinks import Observer
from renio_megatron.training.rollout_log import RolloutObserver
from renio_megatron.training.trainer import Trainer
from renio_megatron.types import Decoding, Rollout


def build_trainer(
    config: JobConfig,
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
    if isinstance(config, DistillationConfig):
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
    config: JobConfig, inputs: Inputs, layout: Layout, say: Callable[[str], None] | None = None
) -> tuple[Any, Any]:
    """(learner, sampler) of one model with its initial weights: `MegatronLearner`, `MegatronSampler`."""
    from renio_megatron.megatron.model.build import build_model
    from renio_megatron.megatron.student.learner import MegatronLearner
    from renio_megatron.megatron.student.sampler import MegatronSampler
    from renio_megatron.megatron.weights.peft import load_adapter
    from renio_megatron.megatron.weights.pretrained import load_pretrained
    from renio_megatron.megatron.weights.residual import residual_of

    parallel, train = config.parallel, config.train
    is_loaded = config.starts_from_weights
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
    temperature = config.loss.temperature if isinstance(config, DistillationConfig) else 1.0
    head = config.head if isinstance(config, DistillationConfig) else HeadConfig()
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


def decoding_of(config: DistillationConfig) -> Decoding:
    """How a recipe's completions are drawn."""
    rollout = config.rollout
    return Decoding(
        rollout.temperature, rollout.top_p, rollout.top_k, rollout.max_completion_length, rollout.micro_batch_size
    )


def _distillation(
    config: DistillationConfig,
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
    config: JobConfig, inputs: Inputs, layout: Layout, sampler: Sampler
) -> Callable[[], dict[str, float]] | None:
    if not config.evaluate.every or inputs.eval_grader is None:
        return None
    limit, together = config.evaluate.max_completion_length, None
    if isinstance(config, DistillationConfig):
        limit = limit or config.rollout.max_completion_length
        together = config.rollout.micro_batch_size
    assert limit is not None  # the recipe's rules see to it
    decoding = Decoding(config.evaluate.temperature, None, None, limit, together)
    return Evaluator(sampler, inputs.evaluation, inputs.eval_grader, decoding, layout)
