"""`renio evaluate` on the ranks of a model: completions of benchmarks, graded and kept as they are drawn."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from renio_megatron.config import DataConfig, LoraConfig, TrainConfig
from renio_megatron.config.sections.evaluation_job import EvaluationJobConfig
from renio_megatron.data.prompt_views import PromptView, chat_template_of, encode_view
from renio_megatron.errors import DataError, on_every_rank
from renio_megatron.evaluation.benchmarks import Benchmark
from renio_megatron.evaluation.grading import RolloutGrader
from renio_megatron.evaluation.progress import DrawProgress, EvaluationProgress
from renio_megatron.evaluation.results import Results, row_of, saved_date
from renio_megatron.evaluation.summary import BenchmarkSummary
from renio_megatron.megatron.checkpoint.saved_model import load_model_weights, saved_base
from renio_megatron.megatron.model.build import ModelPart, build_model
from renio_megatron.megatron.runtime.initialize import start
from renio_megatron.megatron.student.sampler import MegatronSampler
from renio_megatron.megatron.weights.peft_config import PeftAdapter
from renio_megatron.megatron.weights.pretrained import fingerprint, load_pretrained, start_of
from renio_megatron.megatron.weights.residual import residual_of
from renio_megatron.models.architecture import Architecture
from renio_megatron.models.chat_template import ChatTemplate
from renio_megatron.models.ends import ends_of
from renio_megatron.models.tokenizer import check_embedding, load_tokenizer, padding_id
from renio_megatron.parallel.collectives import gather_objects, on_main_rank
from renio_megatron.parallel.layout import ParallelLayout
from renio_megatron.parallel.stopping import StopRequest
from renio_megatron.runner.environment import describe_world
from renio_megatron.runner.evaluation_job import MAX_COMPLETION_LENGTH, EvaluationJob, check_chat
from renio_megatron.runner.evaluation_target import ModelTarget
from renio_megatron.training.interfaces import Sampler
from renio_megatron.types import Prompt, Rollout, SamplingParams, Verdict

_RNG_STREAM = 2  # 0 and 1 are of training: its evaluations, and its steps
_DRAW = 2**32
"""Distance of the numbers of a problem's draws."""


@dataclass(frozen=True)
class _Chunk:
    """Problems `start` to `stop` - 1 of a benchmark, in their draw number `draw`: what is decoded together.

    A chunk is drawn as a whole where any of its problems is `missing`: what was there before does not change its
    rounding.
    """

    draw: int
    start: int
    stop: int
    missing: frozenset[int]


@dataclass(frozen=True)
class Drawer:
    """A model that draws, and how it sees a problem.

    Attributes:
        sampler, sampling_params: the model's sampler, and how it draws.
        tokenizer, view, chat_template: how a problem becomes tokens.
        max_sequence_length: positions of the model.
        stop: a request upon which the sampler and the grading give up; None: none.
    """

    sampler: Sampler
    sampling_params: SamplingParams
    tokenizer: Any
    view: PromptView
    chat_template: ChatTemplate | None
    max_sequence_length: int
    stop: StopRequest | None = None


def evaluate_model(job: EvaluationJob, progress: EvaluationProgress | None = None) -> dict[str, BenchmarkSummary]:
    """Draws and grades what is missing of a job's completions; its figures by benchmark, the same on every rank.

    Args:
        job: the job, the same on every rank.
        progress: shows what is drawn, on the first rank; None: nothing is shown.
    """
    assert isinstance(job.target, ModelTarget)
    layout = start(job.config.parallel, seed=job.config.seed)
    line, _ = describe_world(layout)
    progress = progress if layout.is_main else None
    report = _nothing if progress is None else progress.say
    report(line)
    with on_every_rank():
        architecture = Architecture.from_directory(job.target.directory)
        tokenizer = load_tokenizer(job.target.directory)
        check_embedding(tokenizer, job.target.directory, architecture)
        check_chat(job.config, tokenizer, job.target.directory)
    # The first rank alone holds the results, and says what is missing.
    opened: list[Results] = []
    date = on_main_rank(layout, lambda: _open(job, architecture, tokenizer, opened))
    drawer = _drawer(job, layout, architecture, tokenizer, date, report)
    return draw_job(job, drawer, layout, opened, progress)


def draw_job(
    job: EvaluationJob,
    drawer: Drawer,
    layout: ParallelLayout,
    opened: Sequence[Results],
    progress: DrawProgress | None = None,
) -> dict[str, BenchmarkSummary]:
    """Draws what is missing of a job's completions; its figures by benchmark, the same on every rank.

    Args:
        job: the job.
        drawer: the model.
        layout: this rank's place.
        opened: the results on the first rank, nothing on others.
        progress: shows what is drawn; None: nothing is shown.
    """
    for benchmark in job.benchmarks:
        _evaluate(job, benchmark, drawer, layout, opened, progress)
    return on_main_rank(layout, lambda: job.finish(opened[0]))


def _nothing(line: str) -> None:
    """Reports nothing."""


def _open(job: EvaluationJob, architecture: Architecture, tokenizer: Any, opened: list[Results]) -> datetime | None:
    """Opens the results, on the first rank, into `opened`; returns the date that prompts hold, None where none do."""
    template = _chat_template(job, tokenizer, None)
    has_date = template is not None and template.has_date
    date = (saved_date(job.directory) or datetime.now().replace(microsecond=0)) if has_date else None
    length = _max_completion_length(job, architecture)
    settings = job.settings(_identity(job, architecture), length, chat=template is not None)
    opened.append(Results(job.directory, settings | ({"date": date.isoformat()} if date is not None else {})))
    return date


def _chat_template(job: EvaluationJob, tokenizer: Any, date: datetime | None) -> ChatTemplate | None:
    """The chat template that prompts are written with; None where they are plain text."""
    chat = job.config.chat if job.config.chat is not None else bool(tokenizer.chat_template)
    data = DataConfig(chat=chat, enable_thinking=job.config.enable_thinking)
    return chat_template_of(tokenizer, data, date)


def _max_completion_length(job: EvaluationJob, architecture: Architecture) -> int:
    return job.config.max_completion_length or min(MAX_COMPLETION_LENGTH, architecture.max_sequence_length // 2)


def _identity(job: EvaluationJob, architecture: Architecture) -> str:
    """A hash of the weights, wherever they lie."""
    assert isinstance(job.target, ModelTarget)
    run = job.target.run
    if run is None:
        return fingerprint(job.target.directory, architecture)
    base = "" if run.lora.r is None else f"{saved_base(run.checkpoint)}:"
    return f"{base}{fingerprint(run.checkpoint, architecture)}"


def _drawer(
    job: EvaluationJob,
    layout: ParallelLayout,
    architecture: Architecture,
    tokenizer: Any,
    date: datetime | None,
    report: Callable[[str], None],
) -> Drawer:
    """Builds the model and its sampler."""
    assert isinstance(job.target, ModelTarget)
    config = job.config
    part = _part(job.target, config, layout, architecture, report)
    ends = ends_of(job.target.directory, tokenizer, config.stop_token_ids, config.stop_strings)
    report(f"completions end at {ends.describe(tokenizer)}")
    sampler = MegatronSampler(
        part,
        seed=config.seed,
        temperature=1.0,
        stop_ids=ends.token_ids,
        pad_id=padding_id(tokenizer),
        ends_in_text=ends.in_text(tokenizer),
    )
    length = _max_completion_length(job, architecture)
    sampling_params = SamplingParams(config.temperature, config.top_p, config.top_k, length)
    template = _chat_template(job, tokenizer, date)
    view = job.view(is_chat=template is not None)
    return Drawer(sampler, sampling_params, tokenizer, view, template, architecture.max_sequence_length)


def _part(
    target: ModelTarget,
    config: EvaluationJobConfig,
    layout: ParallelLayout,
    architecture: Architecture,
    report: Callable[[str], None],
) -> ModelPart:
    """This rank's part of the model, with the weights of the directory or of the run's checkpoint."""
    run = target.run
    lora = LoraConfig() if run is None else run.lora
    bf16 = config.bf16
    if bf16 is None:
        bf16 = layout.device.type == "cuda" if run is None else run.bf16
    part = build_model(
        architecture,
        layout,
        config.parallel,
        TrainConfig(bf16=bf16),
        config.precision,
        lora,
        vocab_size=architecture.vocab_size,
        trained=False,
        initialize=False,
    )
    if run is None or lora.r is not None:
        weights = target.directory if run is None else run.weights
        removed = None if run is None else start_of(saved_base(run.checkpoint))
        change = residual_of(PeftAdapter(lora, removed), weights, architecture, layout.device)
        load_pretrained(part, weights, title="model", report=report, change=change)
    if run is not None:
        base = None if lora.r is None else fingerprint(run.weights, architecture, start_of(saved_base(run.checkpoint)))
        load_model_weights(run.checkpoint, part, base)
    return part


def _evaluate(
    job: EvaluationJob,
    benchmark: Benchmark,
    drawer: Drawer,
    layout: ParallelLayout,
    opened: Sequence[Results],
    progress: DrawProgress | None,
) -> None:
    """Draws and grades what is missing of one benchmark."""
    with on_every_rank():
        prompts = prompts_of(job, benchmark, drawer)
    pending = on_main_rank(layout, lambda: _pending(job, benchmark, opened[0]))
    if progress is not None:
        missing = sum(len(chunk.missing) for chunk in pending)
        progress.say(job.describe(benchmark, missing))
        progress.expect(missing)
    grade = RolloutGrader(
        job.graders[benchmark.name],
        drawer.tokenizer,
        errors=job.config.grader_errors,
        layout=layout,
        setting=job.grader_errors_setting,
        stop=drawer.stop,
    )
    for first in range(0, len(pending), layout.data.size):
        chunks = pending[first : first + layout.data.size]
        mine = chunks[layout.data.rank] if layout.data.rank < len(chunks) else None
        asked = [] if mine is None else [_drawn(prompts[index], mine.draw) for index in range(mine.start, mine.stop)]
        stream = (_RNG_STREAM, _number_of(benchmark.name))
        rollouts = drawer.sampler.sample(asked, drawer.sampling_params, rng_stream=stream)
        rows = [
            _row(benchmark, rollout, verdict, drawer.tokenizer)
            for rollout, verdict in zip(rollouts, grade(rollouts), strict=True)
        ]
        wanted = mine.missing if mine is not None else frozenset()
        found = gather_objects([row for row in rows if row["index"] in wanted], layout.data.group)
        new = [row for part in found for row in part]
        on_main_rank(layout, functools.partial(_keep, opened, new, benchmark.name, progress))


def _keep(opened: Sequence[Results], rows: Sequence[dict[str, Any]], name: str, progress: DrawProgress | None) -> None:
    """Puts rows on disk, and then shows them."""
    opened[0].add(rows)
    if progress is not None:
        progress.add(name, rows)


def _pending(job: EvaluationJob, benchmark: Benchmark, results: Results) -> list[_Chunk]:
    """The chunks of which something is missing, in their order."""
    is_missing = job.missing(results, benchmark)
    count, size = len(benchmark.records), job.config.micro_batch_size
    found = []
    for draw in range(job.options.n):
        for begin in range(0, count, size):
            end = min(begin + size, count)
            missing = frozenset(index for index in range(begin, end) if is_missing(index, draw))
            if missing:
                found.append(_Chunk(draw, begin, end, missing))
    return found


def prompts_of(job: EvaluationJob, benchmark: Benchmark, drawer: Drawer) -> list[Prompt]:
    """The prompts of a benchmark's problems; raises `DataError` for one that is empty, or too long for the model."""
    return [_prompt(job, benchmark, index, drawer) for index in range(len(benchmark.records))]


def _prompt(job: EvaluationJob, benchmark: Benchmark, index: int, drawer: Drawer) -> Prompt:
    record = benchmark.records[index]
    asked = job.asked(benchmark, record)
    ids = encode_view(drawer.view, asked, drawer.tokenizer, drawer.chat_template)
    if not ids:
        raise DataError(f"{record.where}: the prompt has no tokens, so nothing predicts the first token.")
    needed = len(ids) + drawer.sampling_params.max_completion_length - 1
    if needed > drawer.max_sequence_length:
        raise DataError(
            f"{record.where}: a prompt of {len(ids)} tokens and a completion of up to "
            f"{drawer.sampling_params.max_completion_length} need {needed} positions; the model was made for "
            f"{drawer.max_sequence_length} (max_position_embeddings). Give a smaller max_completion_length."
        )
    return Prompt(index, ids, ids, record)


def _drawn(prompt: Prompt, draw: int) -> Prompt:
    """The prompt with a number of its own, from which a draw's random numbers follow."""
    return replace(prompt, index=prompt.index + draw * _DRAW)


def _row(benchmark: Benchmark, rollout: Rollout, verdict: Verdict, tokenizer: Any) -> dict[str, Any]:
    """A row of completions.jsonl."""
    draw, index = divmod(rollout.prompt.index, _DRAW)
    return row_of(
        benchmark.name,
        index,
        draw,
        rollout.prompt.record,
        verdict,
        str(tokenizer.decode(list(rollout.answer_ids), skip_special_tokens=False)),
        finish_reason="stop" if rollout.finished else "length",
        tokens=len(rollout.completion_ids),
    )


def _number_of(name: str) -> int:
    """A number of a benchmark's name, in [0, 2^32)."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "big")
