"""A job of `renio evaluate`: its settings, the problems as the model sees them, and the directory of its results."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from renio_megatron.config.expand_views import expand_views
from renio_megatron.config.parser import read_recipe
from renio_megatron.config.sections.evaluation_job import OF_DRAWS, OF_LOCAL_MODELS, EvaluationJobConfig
from renio_megatron.data.prompt_views import PromptView
from renio_megatron.errors import ConfigError
from renio_megatron.evaluation.benchmarks import Benchmark, grader_of, load_benchmark
from renio_megatron.evaluation.graders import Grader
from renio_megatron.evaluation.results import Results, Row
from renio_megatron.evaluation.summary import BenchmarkSummary, pass_rates, summarize
from renio_megatron.files import user_path
from renio_megatron.runner.evaluation_target import ModelTarget, ServerTarget, resolve_target
from renio_megatron.types import Record

MAX_COMPLETION_LENGTH = 4096
_PLAIN_TEMPLATE = "{problem}"
SUMMARY = "summary.json"


@dataclass(frozen=True)
class EvaluateOptions:
    """The command line of `renio evaluate`.

    Attributes:
        target: directory, run or URL.
        benchmarks: names or paths.
        n: completions of each problem.
        limit: problems of each benchmark; None: all.
        output: directory of the results; None: `evaluations/NAME`.
        folder: where files of known benchmarks are; None: RENIO_BENCHMARKS.
        model: name on a server.
        step: checkpoint of a run.
        overrides: `key=value` settings.
    """

    target: str
    benchmarks: tuple[str, ...]
    n: int = 1
    limit: int | None = None
    output: str | None = None
    folder: str | None = None
    model: str | None = None
    step: int | None = None
    overrides: tuple[str, ...] = ()

    def as_word(self) -> str:
        """All of it as one word of a rank's command line."""
        return json.dumps(asdict(self))

    @classmethod
    def of_word(cls, word: str) -> EvaluateOptions:
        """The inverse of `as_word`."""
        values: dict[str, Any] = json.loads(word)
        fixed: Any = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return cls(**fixed)


@dataclass(frozen=True)
class EvaluationJob:
    """A checked job.

    Attributes:
        options: the command line.
        config: its settings.
        target: what is evaluated.
        benchmarks: the problems.
        graders: grader of each benchmark, by its name.
        grader_errors_setting: name of the setting `grader_errors` where the user gave it, for messages.
    """

    options: EvaluateOptions
    config: EvaluationJobConfig
    target: ServerTarget | ModelTarget
    benchmarks: tuple[Benchmark, ...]
    graders: Mapping[str, Grader]
    grader_errors_setting: str = "grader_errors"

    @property
    def is_local(self) -> bool:
        """Whether weights on this machine are evaluated, not a server."""
        return isinstance(self.target, ModelTarget)

    @cached_property
    def directory(self) -> Path:
        """The directory of the results."""
        given = self.options.output
        return Path("evaluations") / self.target.name if given is None else user_path(given)

    def asked(self, benchmark: Benchmark, record: Record) -> Record:
        """A record whose problem ends in the instruction."""
        given = self.config.instruction
        asked = benchmark if given is None else replace(benchmark, instruction=given)
        return replace(record, problem=asked.prompt(record))

    def view(self, *, is_chat: bool) -> PromptView:
        """How a model sees a problem; `is_chat`: by a chat template, as behind a server."""
        config = self.config
        return PromptView(config.template, is_chat, config.enable_thinking, "template", config.system)

    def describe(self, benchmark: Benchmark, missing: int) -> str:
        """A line about a benchmark, of whose completions some are `missing`."""
        count = len(benchmark.records) * self.options.n
        text = f"{benchmark.name}: {len(benchmark.records)} problems x {self.options.n} from {benchmark.source}"
        return text if missing == count else f"{text}; {count - missing} of {count} drawn before"

    def settings(self, model: Any, max_completion_length: int, **more: Any) -> dict[str, Any]:
        """What completions depend on, for `Results`."""
        of_draws = {name: getattr(self.config, name) for name in OF_DRAWS}
        return {"model": model, **of_draws, "max_completion_length": max_completion_length, **more}

    def missing(self, results: Results, benchmark: Benchmark) -> Callable[[int, int], bool]:
        """(index, draw) -> whether the completion is not there yet.

        Raises:
            ConfigError: completions of other problems are there under the benchmark's name.
        """
        results.require_same_problems(benchmark.name, benchmark.digests)
        return lambda index, draw: (benchmark.name, index, draw) not in results.rows

    def finish(self, results: Results) -> dict[str, BenchmarkSummary]:
        """Writes the summary, the problems with their pass rates and the sorted completions; returns the figures of the
        job's benchmarks by name."""
        found, problems = {}, []
        for benchmark in self.benchmarks:
            rows = [
                results.rows[benchmark.name, index, draw]
                for index in range(len(benchmark.records))
                for draw in range(self.options.n)
            ]
            found[benchmark.name] = summarize(rows, self.graders[benchmark.name].same_answer)
            rates = pass_rates(rows)
            problems += [
                {**_data_line(record), "benchmark": benchmark.name, "pass_rate": rates[index]}
                for index, record in enumerate(benchmark.records)
            ]
        before = _read_summary(results.directory / SUMMARY)
        figures = {**before, **{name: one.as_json() for name, one in found.items()}}
        others = [row for row in _read_problems(results.directory) if row.get("benchmark") not in found]
        names = [benchmark.name for benchmark in self.benchmarks]
        summary = {"target": self.options.target, "benchmarks": figures}
        results.finish(names, summary, [*problems, *others])
        return found


def read_job(options: EvaluateOptions) -> EvaluationJob:
    """The job of a command line, with its files read and checked; no torch, no other rank.

    Raises:
        ConfigError, DataError, CheckpointError: a target, a benchmark or a setting that cannot be used.
    """
    read = read_recipe(EvaluationJobConfig, None, options.overrides, expand=expand_views)
    config = replace(read.config, instruction=instruction_of(read.config.instruction, read.config.template))
    target = resolve_target(options.target, model=options.model, step=options.step)
    if isinstance(target, ServerTarget):
        useless = [key for key in sorted(read.given) if key.partition(".")[0] in (*OF_LOCAL_MODELS, "chat")]
    else:
        useless = [key for key in sorted(read.given) if key in ("concurrency", "timeout_s")]
    if useless:
        raise ConfigError(
            f"{useless[0]} has no effect on {'a server' if isinstance(target, ServerTarget) else 'a local model'}. "
            "Leave it out."
        )
    benchmarks = tuple(
        load_benchmark(name, folder=options.folder, grader=config.grader, limit=options.limit, sandbox=config.sandbox)
        for name in options.benchmarks
    )
    names = [benchmark.name for benchmark in benchmarks]
    if len(set(names)) < len(names):
        raise ConfigError(f"two benchmarks have one name among {', '.join(names)}. Rename a file, or give each once.")
    graders = {benchmark.name: grader_of(benchmark, config.sandbox) for benchmark in benchmarks}
    return EvaluationJob(options, config, target, benchmarks, graders)


def instruction_of(given: str | None, template: str) -> str | None:
    """The instruction behind problems in a template: what is given, or none where the template has a text of its own,
    which says what is wanted; None: the benchmark's.

    >>> instruction_of(None, "{problem}"), instruction_of(None, "{problem} Go!"), instruction_of("Go.", "{problem}!")
    (None, '', 'Go.')
    """
    return "" if given is None and template != _PLAIN_TEMPLATE else given


def check_chat(config: EvaluationJobConfig, tokenizer: Any, directory: Path) -> None:
    """Raises `ConfigError` where a setting needs a chat template that a model's tokenizer does not have, or that reads
    it."""
    if config.chat is False:
        return
    if tokenizer.chat_template:
        if config.enable_thinking is not None and "enable_thinking" not in str(tokenizer.chat_template):
            raise ConfigError(
                f"enable_thinking: the chat template of {str(directory)!r} does not read it. Leave it out."
            )
        return
    needs = {
        "chat=true": config.chat,
        "system (or a view's system turn)": config.system is not None,
        "enable_thinking": config.enable_thinking is not None,
    }
    for key, is_given in needs.items():
        if is_given:
            raise ConfigError(
                f"{key} needs a tokenizer with a chat template, and that of {str(directory)!r} has none. Leave it out; "
                "what the model is to read in place of it can stand in template or view."
            )


def server_key() -> str | None:
    """The key for a server, from the environment: RENIO_API_KEY, else OPENAI_API_KEY."""
    return os.environ.get("RENIO_API_KEY") or os.environ.get("OPENAI_API_KEY") or None


def _data_line(record: Record) -> dict[str, Any]:
    """The columns of a record; those that the reader made, where it keeps none."""
    own = {"problem": record.problem, "answer": record.answer}
    return dict(record.metadata) or {name: value for name, value in own.items() if value is not None}


def _read_summary(path: Path) -> dict[str, Any]:
    """Figures of an earlier job in the same directory; none where the file is not there, or damaged."""
    try:
        return dict(json.loads(path.read_text())["benchmarks"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _read_problems(directory: Path) -> Sequence[Row]:
    try:
        return [json.loads(line) for line in (directory / "problems.jsonl").read_text().splitlines()]
    except (OSError, ValueError):
        return []
