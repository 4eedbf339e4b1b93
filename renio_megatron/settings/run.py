"""Settings of a run's parts other than the objective. Megatron's own names are kept where Megatron has one."""

from __future__ import annotations

from dataclasses import dataclass, field

from renio_megatron.errors import ConfigError
from renio_megatron.settings.checks import require_choice, require_positive

TEACHER_KINDS = ("separate", "initial", "ema", "current")
"""Who may teach; `megatron/teacher_weights.py` has the table of what each is made of."""


@dataclass(frozen=True, kw_only=True)
class TeacherParallelConfig:
    """How ranks share the teacher. Its data-parallel size is what remains of them; context parallelism is the student's
    alone, where the teacher has a layout of its own.

    Attributes:
        tensor_model_parallel_size, pipeline_model_parallel_size, sequence_parallel: as in `parallel`; null: the
            student's, where that is possible.
    """

    tensor_model_parallel_size: int | None = None
    pipeline_model_parallel_size: int | None = None
    sequence_parallel: bool | None = None

    def __post_init__(self) -> None:
        require_positive(
            "teacher.parallel",
            tensor_model_parallel_size=self.tensor_model_parallel_size,
            pipeline_model_parallel_size=self.pipeline_model_parallel_size,
        )


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """Who scores the student's completions.

    All kinds but `separate` are the student itself, reading the teacher's view of the prompt (`data.teacher_template`).

    Attributes:
        kind: `separate`, a frozen model of its own; `initial`, the student as the run's `model` is: without its
            adapters (`lora.r`), or a frozen copy where the whole student is trained; `ema`, the moving average of the
            student's trained parameters, the others being the student's; `current`, the student of this step.
        model: Hugging Face directory of a separate teacher.
        pretrained_checkpoint: where its weights come from in place of `model`'s, see the student's.
        adapter: directory of a PEFT adapter that is merged into the separate teacher's weights as they are loaded.
        ema_decay: of `ema`: after each step the average becomes this share of itself and the rest of the student.
        bf16: dtype of the weights of a teacher that has its own; null: train.bf16.
        offload: `host`, the weights of a teacher that has its own wait in (pinned) host memory between its passes,
            except the LM head, which the loss reads; null: they stay on the device.
        payload_device: where its final hidden states at completion tokens wait for the loss: `device`, all of the
            step's; `host`, in pinned memory, one micro-batch's at a time on the device; `recompute`, nowhere: the
            teacher reads each micro-batch a second time.
        parallel: its layout, where it is not the student's.
        ranks: `colocated`, the student's; `dedicated`, the last ranks of the world, which only score.
        data_parallel_size: copies of the teacher on dedicated ranks.
    """

    kind: str = "separate"
    model: str | None = None
    pretrained_checkpoint: str | None = None
    adapter: str | None = None
    ema_decay: float = 0.999
    bf16: bool | None = None
    offload: str | None = None
    payload_device: str = "device"
    parallel: TeacherParallelConfig = field(default_factory=TeacherParallelConfig)
    ranks: str = "colocated"
    data_parallel_size: int = 1

    def __post_init__(self) -> None:
        if self.kind == "self":
            raise ConfigError(
                "teacher.kind=self is called initial now: the student as it started. Set teacher.kind=initial."
            )
        require_choice("teacher.kind", self.kind, TEACHER_KINDS)
        require_choice("teacher.payload_device", self.payload_device, ("device", "host", "recompute"))
        require_choice("teacher.ranks", self.ranks, ("colocated", "dedicated"))
        require_positive("teacher", data_parallel_size=self.data_parallel_size)
        if self.kind == "separate" and self.model is None:
            raise ConfigError("teacher.kind=separate needs teacher.model, the teacher's Hugging Face directory.")
        if self.adapter is not None and self.pretrained_checkpoint is not None:
            raise ConfigError(
                "teacher.adapter with teacher.pretrained_checkpoint: an adapter is merged into Hugging Face's files "
                "alone. Merge it with PEFT and give the result as teacher.model, or leave one of the two out."
            )
        if not 0.0 < self.ema_decay < 1.0:
            raise ConfigError(
                f"teacher.ema_decay must lie in (0, 1); got {self.ema_decay}. With 0 the teacher is kind=current, with "
                "1 it is kind=initial."
            )
        if self.offload is not None:
            require_choice("teacher.offload", self.offload, ("host",))
            if self.payload_device == "recompute":
                raise ConfigError(
                    "teacher.offload=host with teacher.payload_device=recompute: the teacher would be moved to the "
                    "device for every micro-batch of the student. Choose payload_device=host, or offload=null."
                )


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
        student_template, teacher_template: text of the prompt, with the fields {problem} and {solution}; a null
            teacher_template is the student's.
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


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How the student writes its completions.

    Attributes:
        temperature: divides the logits before sampling.
        top_p: keep the smallest set of tokens with at least this probability; null keeps all.
        top_k: keep this many tokens; null keeps all.
        max_completion_length: tokens after which a completion is cut; training on the prefix is this and nothing else.
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
        if self.every < 0:
            raise ConfigError(f"evaluate.every must be at least 0 (0: never); got {self.every}.")
