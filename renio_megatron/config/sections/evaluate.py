"""Settings of the evaluation on held-out problems."""

from __future__ import annotations

from dataclasses import dataclass

from renio_megatron.config.sections.data import GRADERS, is_place
from renio_megatron.config.validators import require_choice, require_countable, require_positive
from renio_megatron.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Accuracy on held-out problems, greedy and sampled, and on benchmarks as `renio evaluate` has it.

    Attributes:
        every: steps between evaluations; 0 never evaluates. The start and the end are evaluated as well.
        samples: number of held-out problems.
        temperature: temperature of the sampled accuracy, and of benchmarks.
        top_p, top_k: nucleus and top-k sampling there; null keeps every token.
        max_completion_length: tokens after which an answer is cut; null: rollout.max_completion_length.
        benchmarks: names or files of benchmarks; their completions and figures are written to `evaluations/` in
            output_dir. With them, files of records need no data.eval_path; null: none.
        benchmarks_dir: folder of the benchmarks that have a name; null: RENIO_BENCHMARKS.
        grader: grader of the benchmarks, as `data.grader`; null: each one's own.
        n: completions of each problem of a benchmark.
        limit: first problems of each benchmark; null: all.
        instruction: text behind each problem of a benchmark, `''`: none; null: the benchmark's own, unless
            data.student_template has a text of its own.
    """

    every: int = 0
    samples: int = 512
    temperature: float = 1.0
    top_p: float | None = None
    top_k: int | None = None
    max_completion_length: int | None = None
    benchmarks: list[str] | None = None
    benchmarks_dir: str | None = None
    grader: str | None = None
    n: int = 1
    limit: int | None = None
    instruction: str | None = None

    def __post_init__(self) -> None:
        require_positive(
            "evaluate",
            samples=self.samples,
            temperature=self.temperature,
            top_k=self.top_k,
            max_completion_length=self.max_completion_length,
            n=self.n,
            limit=self.limit,
        )
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"evaluate.top_p must lie in (0, 1], or be null; got {self.top_p}.")
        require_countable("evaluate", samples=self.samples)
        if self.grader is not None and not is_place(self.grader):
            require_choice("evaluate.grader", self.grader, (*GRADERS, "a function of your own (module:function)"))
        if self.every < 0:
            raise ConfigError(f"evaluate.every must be at least 0 (0: never); got {self.every}.")
