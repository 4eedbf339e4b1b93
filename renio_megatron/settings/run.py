"""Settings of a run's parts other than the objective. Megatron's own names are kept where Megatron has one."""

from __future__ import annotations

from dataclasses import dataclass

from renio_megatron.errors import ConfigError
from renio_megatron.settings.checks import require_choice, require_countable, require_positive
from renio_megatron.settings.templates import check_template


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where problems come from and how the two models see them.

    Attributes:
        source: `modchain`, `jsonl`, `datasets` or `reasoning_gym`.
        seed: order of the problems, and their choice where they are generated.
        path: file (`jsonl`) or directory written by `datasets.save_to_disk` (`datasets`).
        eval_path: the same for evaluation; the generated sources need none.
        task: generator of `reasoning_gym`, for example `gsm_symbolic`.
        size: number of problems that `reasoning_gym` generates before they repeat.
        problem_key, solution_key, answer_key: columns of a record. The solution and the answer may be missing.
        teacher_key: column that names which of teacher.routes scores a record's completions.
        student_template, teacher_template: text of the prompt, with the fields {problem} and {solution}; a null
            teacher_template is the student's, which must have {problem}.
        chat: wrap the prompt by the tokenizer's chat template.
        enable_thinking: passed to the chat template of tokenizers that know it; null leaves it out.
        teacher_enable_thinking: the same for the teacher's view; null follows enable_thinking.
        grader: `modchain`, `number` (the last number of the completion), `reasoning_gym`, `none`, or null: what the
            source brings.
        grader_errors: what an exception in the grader does: `raise` stops the run and names the prompt, `count_wrong`
            counts the completion as wrong, which `rollout/grader_error_frac` shows.
        max_prompt_length: longer prompts are refused, in tokens.
    """

    source: str = "modchain"
    seed: int = 1
    path: str | None = None
    eval_path: str | None = None
    task: str | None = None
    size: int | None = None
    problem_key: str = "problem"
    solution_key: str = "solution"
    answer_key: str = "answer"
    teacher_key: str | None = None
    student_template: str = "{problem}"
    teacher_template: str | None = None
    chat: bool = False
    enable_thinking: bool | None = None
    teacher_enable_thinking: bool | None = None
    grader: str | None = None
    grader_errors: str = "raise"
    max_prompt_length: int = 4096

    def __post_init__(self) -> None:
        require_positive("data", size=self.size, max_prompt_length=self.max_prompt_length)
        require_choice("data.grader_errors", self.grader_errors, ("raise", "count_wrong"))
        check_template("data.student_template", self.student_template, ("problem",))
        if self.teacher_template is not None:
            check_template("data.teacher_template", self.teacher_template, ("problem", "solution"))


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How the student writes its completions.

    Attributes:
        temperature: divides the logits before sampling.
        top_p: keep the smallest set of tokens with at least this probability; null keeps all.
        top_k: keep this many tokens; null keeps all.
        max_completion_length: tokens after which a completion is cut.
        prefix: the run trains on prefixes, completions that are cut on purpose; nothing is said about them.
        stop_token_ids, stop_strings: tokens, and texts inside a completion, that end it beside those of the model;
            null: none.
        student_scores: `sampler` takes the student's log-probabilities from sampling, `recompute` from a forward-only
            pass before the update.
        micro_batch_size: sequences sampled at a time, null: all of the rank's.
        log: write what the first data-parallel rank's share of each step was, to `rollouts.jsonl` in output_dir.
    """

    temperature: float = 1.0
    top_p: float | None = None
    top_k: int | None = None
    max_completion_length: int = 1024
    student_scores: str = "sampler"
    micro_batch_size: int | None = None
    log: bool = False
    prefix: bool = False
    stop_token_ids: list[int] | None = None
    stop_strings: list[str] | None = None

    def __post_init__(self) -> None:
        require_positive(
            "rollout",
            temperature=self.temperature,
            top_k=self.top_k,
            max_completion_length=self.max_completion_length,
            micro_batch_size=self.micro_batch_size,
        )
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"rollout.top_p must lie in (0, 1], or be null; got {self.top_p}.")
        require_choice("rollout.student_scores", self.student_scores, ("sampler", "recompute"))
        if any(token < 0 for token in self.stop_token_ids or ()):
            raise ConfigError(f"rollout.stop_token_ids are token ids, from 0 on; got {self.stop_token_ids}.")
        if "" in (self.stop_strings or ()):
            raise ConfigError("rollout.stop_strings: an empty text ends every completion at once. Remove it.")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the state is saved, into `output_dir/checkpoints`, and where a new run takes it from.

    Attributes:
        save_interval: steps between checkpoints; the last step is saved in any case.
        ckpt_format: `torch_dist`, Megatron's distributed format.
        keep_last: checkpoints that are kept, the newest ones; null keeps all.
        async_save: write in a process of its own while training goes on. The memory of the state is needed twice
            until it is written. The last save of a run is waited for.
        load: where a run starts from that has no checkpoint of its own yet: another run's output_dir, its checkpoints
            directory, or one iter_ directory, in any layout. Weights, optimiser, step, place in the data and moving
            averages are taken over.
    """

    save_interval: int = 100
    ckpt_format: str = "torch_dist"
    keep_last: int | None = None
    async_save: bool = False
    load: str | None = None

    def __post_init__(self) -> None:
        require_positive("checkpoint", save_interval=self.save_interval, keep_last=self.keep_last)
        require_choice("checkpoint.ckpt_format", self.ckpt_format, ("torch_dist",))


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Accuracy on held-out problems, greedy and sampled.

    Attributes:
        every: steps between evaluations; 0 evaluates never. The start and the end are evaluated as well.
        samples: problems.
        temperature: of the sampled accuracy.
        max_completion_length: tokens after which an answer is cut; null: rollout.max_completion_length.
    """

    every: int = 0
    samples: int = 512
    temperature: float = 1.0
    max_completion_length: int | None = None

    def __post_init__(self) -> None:
        require_positive(
            "evaluate",
            samples=self.samples,
            temperature=self.temperature,
            max_completion_length=self.max_completion_length,
        )
        require_countable("evaluate", samples=self.samples)
        if self.every < 0:
            raise ConfigError(f"evaluate.every must be at least 0 (0: never); got {self.every}.")
