"""Assembly of models, algorithm and Trainer; the only file that knows both the training loop and Megatron."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from renio_megatron.config.lazy import imported
from renio_megatron.config.resume import to_yaml
from renio_megatron.config.schema import DistillationConfig, JobConfig
from renio_megatron.data.prompt_views import student_view
from renio_megatron.evaluation.evaluator import EvaluationObserver, Evaluator
from renio_megatron.evaluation.graders import Grader
from renio_megatron.evaluation.grading import RolloutGrader
from renio_megatron.files import user_path
from renio_megatron.losses.sample_weights import SampleWeights
from renio_megatron.parallel.layout import ParallelLayout
from renio_megatron.parallel.stopping import StopRequest
from renio_megatron.runner.build_teachers import build_teacher
from renio_megatron.runner.canaries import build_canaries
from renio_megatron.runner.inputs import RunInputs, max_completion_tokens
from renio_megatron.runner.run_log import RunLog
from renio_megatron.training.algorithms import Algorithm
from renio_megatron.training.algorithms.distillation import Distillation
from renio_megatron.training.algorithms.sft import Sft
from renio_megatron.training.algorithms.weighing import Weighing
from renio_megatron.training.interfaces import Sampler
from renio_megatron.training.lr_schedule import learning_rate
from renio_megatron.training.trainer import Trainer
from renio_megatron.types import Rollout, SamplingParams


@dataclass(frozen=True)
class Parts:
    """The parts from which an algorithm is built on one rank.

    Attributes:
        config: all settings, of the algorithm's class.
        inputs: models' descriptions, data and graders, from `read_inputs`.
        layout: this rank's place in the world.
        learner, sampler: the student's `MegatronLearner` and `MegatronSampler`.
        lr_at: step -> learning rate.
        on_rollouts: called with (step, this rank's rollouts, their weights) after each step; None: not called.
        report: called with progress lines while weights are loaded; None: no reports.
    """

    config: Any
    inputs: RunInputs
    layout: ParallelLayout
    learner: Any
    sampler: Any
    lr_at: Callable[[int], float]
    on_rollouts: Callable[[int, Sequence[Rollout], SampleWeights], None] | None = None
    report: Callable[[str], None] | None = None


Averages: TypeAlias = Sequence[Any]
"""Moving averages of weights that an algorithm keeps, and that are saved along with the learner."""


def build_trainer(
    config: JobConfig,
    inputs: RunInputs,
    layout: ParallelLayout,
    checkpoints: Path,
    *,
    log: RunLog | None = None,
    stop: StopRequest | None = None,
    report: Callable[[str], None] | None = None,
) -> Trainer:
    """Builds the models on this rank, the algorithm, and the training loop.

    Args:
        config: all settings.
        inputs: `read_inputs(config)`.
        layout: this rank's place in the world, from `megatron.runtime.initialize.start`.
        checkpoints: directory of the checkpoints.
        log: receives every step's metrics, and its rollouts with their weights; None: no log.
        stop: a request upon which the run stops; None: it never does.
        report: called with progress lines while weights are loaded, and with lines about tuned kernels and benchmarks.
    """
    from renio_megatron.megatron.checkpoint.checkpointer import MegatronCheckpointer
    from renio_megatron.megatron.weights.pretrained import fingerprint

    learner, sampler = build_student(config, inputs, layout, report, stop)
    start = None if inputs.adapter is None else inputs.adapter.start
    base = fingerprint(inputs.weights, inputs.architecture, start) if config.lora.r is not None else None
    lr_at = functools.partial(learning_rate, config.train)
    on_rollouts = None if log is None else log.rollouts
    parts = Parts(config, inputs, layout, learner, sampler, lr_at, on_rollouts, report)
    algorithm, averages = imported(config.builder)(parts)
    algorithm.tune(max_completion_tokens(config, inputs), report)
    return Trainer(
        algorithm=algorithm,
        prompts=inputs.stream.batch,
        checkpointer=MegatronCheckpointer(
            checkpoints, learner, config.checkpoint, config=to_yaml(config), averages=averages, base=base, report=report
        ),
        train_iters=config.train.train_iters,
        global_batch_size=config.train.global_batch_size,
        data_rank=layout.data.rank,
        data_size=layout.data.size,
        save_interval=config.checkpoint.save_interval,
        evaluate=_evaluator(config, inputs, layout, sampler, report, stop, None if log is None else log.evaluating),
        evaluate_every=config.evaluate.every,
        observers=() if log is None else (log.metrics,),
        stop_requested=(lambda: False) if stop is None else lambda: stop.agree(layout),
    )


def build_distillation(parts: Parts) -> tuple[Algorithm, Averages]:
    """Builds on-policy distillation with its teachers."""
    config: DistillationConfig = parts.config
    teacher = build_teacher(config, parts.inputs, parts.layout, parts.learner.part, parts.report)
    canaries = build_canaries(config, parts.inputs, parts.layout, parts.report)
    algorithm = Distillation(
        parts.sampler,
        teacher,
        parts.learner,
        layout=parts.layout,
        sampling_params=sampling_params_of(config),
        prefix_length=config.rollout.prefix_length,
        weighing=Weighing(
            config.weighting,
            config.renio_report,
            config.loss,
            config.head,
            recompute=config.rollout.student_scores == "recompute",
            seed=config.train.seed,
        ),
        lr_at=parts.lr_at,
        grader=_rollout_grader(parts.inputs.grader, parts.config, parts.inputs, parts.layout),
        on_rollouts=parts.on_rollouts,
        is_balanced=config.train.max_tokens_per_micro_batch is not None,
        look_at_first=None if canaries is None else canaries.look,
    )
    return algorithm, teacher.averages


def build_sft(parts: Parts) -> tuple[Algorithm, Averages]:
    """Builds supervised fine-tuning."""
    learns_prompts = parts.config.learns_prompts
    return Sft(parts.learner, layout=parts.layout, lr_at=parts.lr_at, learns_prompts=learns_prompts), ()


def build_student(
    config: JobConfig,
    inputs: RunInputs,
    layout: ParallelLayout,
    report: Callable[[str], None] | None = None,
    stop: StopRequest | None = None,
) -> tuple[Any, Any]:
    """(`MegatronLearner`, `MegatronSampler`) of the student, with its initial weights."""
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
        initialize=not is_loaded,
    )
    if is_loaded:
        change = residual_of(inputs.adapter, inputs.weights, inputs.architecture, layout.device)
        load_pretrained(part, inputs.weights, title="student", report=report, change=change)
    if config.lora.adapter is not None:
        load_adapter(part, user_path(config.lora.adapter))
    temperature = config.loss_temperature
    learner = MegatronLearner(
        part,
        train,
        parallel,
        config.lm_head,
        temperature=temperature,
        pad_id=inputs.pad_id,
        per_token=config.longest_completion is None,
    )
    sampler = MegatronSampler(
        part,
        seed=train.seed,
        temperature=temperature,
        stop_ids=inputs.ends.token_ids,
        pad_id=inputs.pad_id,
        ends_in_text=inputs.ends.in_text(inputs.tokenizer),
        stop=stop,
    )
    return learner, sampler


def sampling_params_of(config: DistillationConfig) -> SamplingParams:
    """Sampling parameters of a recipe's rollouts."""
    rollout = config.rollout
    return SamplingParams(
        rollout.temperature, rollout.top_p, rollout.top_k, rollout.max_completion_length, rollout.micro_batch_size
    )


def _rollout_grader(
    grader: Grader | None,
    config: JobConfig,
    inputs: RunInputs,
    layout: ParallelLayout,
    stop: StopRequest | None = None,
) -> RolloutGrader | None:
    if grader is None:
        return None
    return RolloutGrader(grader, inputs.tokenizer, errors=config.data.grader_errors, layout=layout, stop=stop)


def _evaluator(
    config: JobConfig,
    inputs: RunInputs,
    layout: ParallelLayout,
    sampler: Sampler,
    report: Callable[[str], None] | None,
    stop: StopRequest | None,
    observer: EvaluationObserver | None,
) -> Callable[[int], dict[str, float]] | None:
    """Step -> metrics of the held-out problems and of the benchmarks; None where nothing is evaluated."""
    limit = config.evaluate.max_completion_length or config.longest_completion
    found: list[Callable[[int], dict[str, float]]] = []
    if not config.evaluate.every:
        return None
    assert limit is not None  # guaranteed by the recipe's rules
    of_draws = (config.evaluate.temperature, config.evaluate.top_p, config.evaluate.top_k, limit)
    grader = _rollout_grader(inputs.eval_grader, config, inputs, layout, stop)
    if grader is not None:
        sampling_params = SamplingParams(*of_draws, config.decoded_together)
        found.append(Evaluator(sampler, inputs.evaluation, grader, sampling_params, layout, observer))
    if inputs.benchmarks is not None:
        from renio_megatron.runner.evaluate import Drawer
        from renio_megatron.runner.run_evaluation import BenchmarkEvaluator

        drawer = Drawer(
            sampler,
            SamplingParams(*of_draws),
            inputs.tokenizer,
            student_view(config.data),
            inputs.stream.chat_template,
            inputs.architecture.max_sequence_length,
            stop,
        )
        found.append(BenchmarkEvaluator(inputs.benchmarks, drawer, layout, config.output_dir, report, observer))
    return lambda step: {name: value for evaluate in found for name, value in evaluate(step).items()}
