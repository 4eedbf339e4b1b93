"""`renio evaluate`: its command line, its ranks, and what it shows."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from renio_megatron.errors import ConfigError, on_every_rank

if TYPE_CHECKING:  # what is imported for the command's help is imported for every command
    from renio_megatron.runner.evaluation_job import EvaluateOptions, EvaluationJob

DESCRIPTION = """\
Draw completions of benchmarks with a model, grade them, and write completions.jsonl, problems.jsonl, summary.json and
a picture. The same command continues where it was cut off; a larger --n or --limit draws only what is missing.

TARGET is a Hugging Face directory, a run's directory (its newest checkpoint), a model that ships, or the URL of a
server that speaks OpenAI's protocol (its key from RENIO_API_KEY or OPENAI_API_KEY).
"""
EPILOG = """\
keys: temperature, top_p, top_k, max_completion_length, seed, stop_strings, enable_thinking, template, system, view,
instruction, grader, sandbox, grader_errors; of local models chat, bf16, device, micro_batch_size, stop_token_ids,
parallel.*, precision.*; of servers concurrency, timeout_s

examples:
  renio evaluate models/mine --benchmark math500 --benchmark aime25 --n 4 --benchmarks data
  renio evaluate runs/mine --benchmark problems.jsonl temperature=0.6 top_p=0.95 --nproc 2
  renio evaluate http://localhost:8000/v1 --model Qwen3-1.7B --benchmark gsm8k --limit 100
"""


def add_arguments(command: argparse.ArgumentParser, positive: Callable[[str], int]) -> None:
    """Adds the arguments; `positive` converts a whole number of at least 1."""
    command.add_argument("target", metavar="TARGET", help="directory, run, or URL of a server")
    command.add_argument("overrides", metavar="key=value", nargs="*", help="settings")
    command.add_argument(
        "--benchmark", metavar="NAME|PATH", action="append", required=True, help="what to evaluate; may be repeated"
    )
    command.add_argument("--n", type=positive, metavar="K", default=1, help="completions of each problem (default: 1)")
    command.add_argument("--limit", type=positive, metavar="N", help="first problems of each benchmark (default: all)")
    command.add_argument("--output", metavar="DIR", help="directory of the results (default: evaluations/NAME)")
    command.add_argument(
        "--benchmarks", metavar="DIR", help="where files of known benchmarks are (or RENIO_BENCHMARKS)"
    )
    command.add_argument("--model", metavar="NAME", help="the model's name on a server")
    command.add_argument("--step", type=positive, metavar="K", help="checkpoint of a run (default: the newest)")
    command.add_argument("--nproc", type=positive, metavar="N", help="ranks to start here (default: one model copy)")


def options_of(arguments: argparse.Namespace) -> EvaluateOptions:
    """The options of a parsed command line."""
    from renio_megatron.runner.evaluation_job import EvaluateOptions

    return EvaluateOptions(
        target=arguments.target,
        benchmarks=tuple(arguments.benchmark),
        n=arguments.n,
        limit=arguments.limit,
        output=arguments.output,
        folder=arguments.benchmarks,
        model=arguments.model,
        step=arguments.step,
        overrides=(*arguments.overrides, *arguments.extra),
    )


def evaluate_at_server(job: EvaluationJob) -> None:
    """Evaluates a server from this process, and shows the figures."""
    from renio_megatron.evaluation.progress import EvaluationProgress
    from renio_megatron.runner.evaluate_server import evaluate_server
    from renio_megatron.tools.report.evaluation import show

    with EvaluationProgress() as progress:
        figures = evaluate_server(job, progress)
    show(figures, job.directory)


def evaluate_on_rank(word: str) -> None:
    """Evaluates a model on this rank; the first one shows the figures."""
    from renio_megatron.runner.evaluation_job import EvaluateOptions, read_job

    with on_every_rank():
        job = read_job(EvaluateOptions.of_word(word))
    if not job.is_local:
        raise ConfigError("a server is evaluated by one process; start the command without torchrun or srun.")
    from renio_megatron.runner.device_env import use_device

    use_device(job.config.device)
    from renio_megatron.evaluation.progress import EvaluationProgress
    from renio_megatron.runner.evaluate import evaluate_model
    from renio_megatron.tools.report.evaluation import show

    if os.environ.get("RANK", "0") != "0":
        evaluate_model(job)
        return
    with EvaluationProgress() as progress:
        figures = evaluate_model(job, progress)
    show(figures, job.directory)
