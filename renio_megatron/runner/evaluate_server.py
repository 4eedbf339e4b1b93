"""`renio evaluate` of a server: completions by OpenAI's protocol, graded and kept as they arrive. No torch."""

from __future__ import annotations

import hashlib

from renio_megatron.evaluation.benchmarks import Benchmark
from renio_megatron.evaluation.graders import Completion, GuardedGrader
from renio_megatron.evaluation.progress import EvaluationProgress
from renio_megatron.evaluation.results import Results, Row, row_of
from renio_megatron.evaluation.server import CompletionServer, Drawn, ServerRequest, ServerSampling
from renio_megatron.evaluation.summary import BenchmarkSummary
from renio_megatron.runner.evaluation_job import MAX_COMPLETION_LENGTH, EvaluationJob, server_key
from renio_megatron.runner.evaluation_target import ServerTarget

_SEEDS = 2**31


def evaluate_server(job: EvaluationJob, progress: EvaluationProgress) -> dict[str, BenchmarkSummary]:
    """Draws and grades what is missing of a job's completions; its figures by benchmark.

    Args:
        job: the job.
        progress: shows what is drawn, what is there already, and requests that wait.

    Raises:
        RenioError: the server does not answer; what was drawn is kept, and the same command goes on.
    """
    assert isinstance(job.target, ServerTarget)
    config = job.config
    server = CompletionServer(
        job.target.url,
        job.target.model,
        key=server_key(),
        concurrency=config.concurrency,
        timeout_s=config.timeout_s,
        report=progress.say,
        key_variable="RENIO_API_KEY",
    )
    length = config.max_completion_length or MAX_COMPLETION_LENGTH
    results = Results(job.directory, job.settings({"server": job.target.model}, length))
    pending = {benchmark.name: _pending(job, benchmark, results) for benchmark in job.benchmarks}
    if any(pending.values()):
        server.check()
    sampling = ServerSampling(
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        max_tokens=length,
        stop=tuple(config.stop_strings or ()),
        extra={}
        if config.enable_thinking is None
        else {"chat_template_kwargs": {"enable_thinking": config.enable_thinking}},
    )
    for benchmark in job.benchmarks:
        progress.say(job.describe(benchmark, len(pending[benchmark.name])))
        progress.expect(len(pending[benchmark.name]))

        grader = GuardedGrader(
            job.graders[benchmark.name], errors=config.grader_errors, setting="grader_errors", report=progress.say
        )

        def keep(
            request: ServerRequest, drawn: Drawn, benchmark: Benchmark = benchmark, grader: GuardedGrader = grader
        ) -> None:
            row = _row(benchmark, request, drawn, grader)
            results.add([row])
            progress.add(benchmark.name, [row])

        server.draw(pending[benchmark.name], sampling, keep)
    return job.finish(results)


def _pending(job: EvaluationJob, benchmark: Benchmark, results: Results) -> list[ServerRequest]:
    """The requests of a benchmark's missing completions."""
    is_missing, view = job.missing(results, benchmark), job.view(is_chat=True)
    found = []
    for draw in range(job.options.n):
        for index, record in enumerate(benchmark.records):
            if is_missing(index, draw):
                seed = _seed(job.config.seed, benchmark.name, index, draw)
                turns = view.turns(job.asked(benchmark, record))
                messages = tuple({"role": role, "content": content} for role, content in turns)
                found.append(ServerRequest((index, draw), messages, seed))
    return found


def _seed(seed: int, name: str, index: int, draw: int) -> int:
    """A seed of a completion, in [0, 2^31)."""
    digest = hashlib.blake2b(f"{seed} {name} {index} {draw}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % _SEEDS


def _row(benchmark: Benchmark, request: ServerRequest, drawn: Drawn, grader: GuardedGrader) -> Row:
    """A row of completions.jsonl."""
    index, draw = request.key
    record = benchmark.records[index]
    verdict = grader(Completion(drawn.text, drawn.finish_reason == "stop"), record, record.where)
    return row_of(
        benchmark.name, index, draw, record, verdict, drawn.text, finish_reason=drawn.finish_reason, tokens=drawn.tokens
    )
