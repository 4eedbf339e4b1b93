"""Benchmarks that a recipe names, read before a rank starts. No torch."""

from __future__ import annotations

from renio_megatron.config.schema import JobConfig
from renio_megatron.config.sections.evaluation_job import EvaluationJobConfig
from renio_megatron.evaluation.benchmarks import grader_of, load_benchmark
from renio_megatron.models.shipped import model_directory
from renio_megatron.runner.evaluation_job import EvaluateOptions, EvaluationJob, instruction_of
from renio_megatron.runner.evaluation_target import ModelTarget

_TOGETHER = 32


def benchmarks_of(config: JobConfig) -> EvaluationJob | None:
    """The job of a recipe's benchmarks, without a directory; None where it evaluates on none.

    Raises:
        ConfigError, DataError: a benchmark that cannot be used.
    """
    evaluate, data = config.evaluate, config.data
    if not evaluate.every or not evaluate.benchmarks:
        return None
    benchmarks = tuple(
        load_benchmark(
            name, folder=evaluate.benchmarks_dir, grader=evaluate.grader, limit=evaluate.limit, sandbox=data.sandbox
        )
        for name in evaluate.benchmarks
    )
    settings = EvaluationJobConfig(
        temperature=evaluate.temperature,
        top_p=evaluate.top_p,
        top_k=evaluate.top_k,
        seed=config.train.seed,
        max_completion_length=evaluate.max_completion_length or config.longest_completion,
        micro_batch_size=config.decoded_together or _TOGETHER,
        template=data.student_template,
        system=data.student_system,
        instruction=instruction_of(evaluate.instruction, data.student_template),
        chat=data.chat,
        enable_thinking=data.enable_thinking,
        grader_errors=data.grader_errors,
        sandbox=data.sandbox,
    )
    graders = {one.name: grader_of(one, data.sandbox) for one in benchmarks}
    options = EvaluateOptions(config.output_dir, tuple(evaluate.benchmarks), evaluate.n, evaluate.limit)
    target = ModelTarget(model_directory(config.model, "model"), None, "student")
    return EvaluationJob(options, settings, target, benchmarks, graders, "data.grader_errors")
