"""All settings of a run, as one dataclass per command."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

from renio_megatron.config import (
    CheckpointConfig,
    DataConfig,
    EvaluateConfig,
    HeadConfig,
    LoraConfig,
    LossConfig,
    ParallelConfig,
    PrecisionConfig,
    RolloutConfig,
    TeacherConfig,
    TeacherPrecisionConfig,
    TrainConfig,
    WeightingConfig,
)
from renio_megatron.config.lazy import imported
from renio_megatron.config.sections.report import RenioReportConfig, ReportConfig
from renio_megatron.config.sections.weighting import RenioWeighting, renio_in
from renio_megatron.config.teachers import TeacherSpec, fewest_ranks, num_teacher_ranks, resolve_teachers
from renio_megatron.config.validators import require_choice, require_device, require_positive
from renio_megatron.errors import ConfigError

CANARIES = ("stop", "warn", "off")
"""What a fault in the first step does to the run."""


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """Settings common to all commands that train.

    Attributes:
        model: the student's Hugging Face directory, or a model that ships with the package.
        pretrained_checkpoint: a checkpoint that Megatron wrote (torch_dist, of any layout), whose weights are the
            student's in place of those in `model`; null: `model`'s. config.json and the tokenizer are `model`'s.
        algorithm: the training algorithm, a name in `ALGORITHMS`, which selects the keys of the recipe.
        builder: `module:function` that makes the algorithm of `training.algorithms` from `runner.build.Parts`.
        device: `cpu`, GPUs are not used; null: they are, where there are any. One that is there and cannot be used is
            an error.
        data, parallel, precision, lora, train, checkpoint, evaluate: sections, see `config.sections`.
        output_dir: the run directory.
    """

    builder: ClassVar[str] = ""

    model: str
    pretrained_checkpoint: str | None = None
    algorithm: str = ""
    device: str | None = None
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    output_dir: str

    @property
    def teachers(self) -> tuple[TeacherSpec, ...]:
        """The teachers; empty for runs without a teacher."""
        return ()

    @property
    def num_teacher_ranks(self) -> int:
        """Ranks dedicated to teachers; they are the last of the world."""
        return 0

    @property
    def fewest_ranks(self) -> int:
        """Ranks that hold one copy of each model."""
        return self.parallel.model_ranks

    @property
    def longest_completion(self) -> int | None:
        """Tokens after which a completion of the student is cut; None where completions are given."""
        return None

    @property
    def longest_trained(self) -> int | None:
        """Completion tokens of a sequence that the models read in an update, at most; None where they are given."""
        return None

    @property
    def learns_prompts(self) -> bool:
        """Whether tokens of prompts are learned, too."""
        return False

    @property
    def longest_given(self) -> int | None:
        """Tokens of a prompt and its given completion, at most; None: no limit but the model's."""
        return None

    @property
    def completions_per_prompt(self) -> int:
        """Sequences in a row that have one prompt."""
        return 1

    @property
    def evaluates_held_out(self) -> bool:
        """Whether accuracies on held-out problems are measured: not where benchmarks stand in for a missing file."""
        reads_files = "eval_path" in self.data.source_info.settings
        has_file = self.data.eval_path is not None or self.data.has_eval_split
        return self.evaluate.every > 0 and not (self.evaluate.benchmarks and reads_files and not has_file)

    @property
    def decoded_together(self) -> int | None:
        """Sequences that are sampled at a time; None: all of a rank's."""
        return None

    @property
    def loss_temperature(self) -> float:
        """Temperature by which the loss divides logits."""
        return 1.0

    @property
    def lm_head(self) -> HeadConfig:
        """How the loss computes logits."""
        return HeadConfig()

    @property
    def starts_from_weights(self) -> bool:
        """Whether the student's weights are loaded, not initialized at random."""
        return True

    @property
    def sample_needs(self) -> frozenset[str]:
        """Inputs needed for each sample, by their names in `objective.weightings`."""
        return frozenset()


@dataclass(frozen=True, kw_only=True)
class DistillationConfig(JobConfig):
    """Settings of `renio train`: on-policy distillation.

    Attributes:
        teacher, rollout, loss, head, weighting, teacher_precision: sections, see `config.sections`.
        also_report: diagnostics in addition to those of `weighting`: `[renio]`.
        canaries: what happens where the first step shows that student, teacher and sampler do not fit together: `stop`
            the run before its first update, or `warn`; `off` does not look.
    """

    builder: ClassVar[str] = "renio_megatron.runner.build:build_distillation"

    algorithm: str = "distillation"
    teacher: TeacherConfig
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    weighting: WeightingConfig = field(default_factory=WeightingConfig)
    also_report: tuple[ReportConfig, ...] = ()
    canaries: str = "stop"
    teacher_precision: TeacherPrecisionConfig = field(default_factory=TeacherPrecisionConfig)

    def __post_init__(self) -> None:
        require_device(self.device)
        require_choice("canaries", self.canaries, CANARIES)
        object.__setattr__(self, "also_report", tuple(self.also_report))
        if len(self.also_report) > len({one.name for one in self.also_report}):
            raise ConfigError("also_report names diagnostics twice. Give each once.")

    @property
    def renio_report(self) -> RenioWeighting | None:
        """ReNIO's settings for the diagnostics `renio/...`; None where they are not reported."""
        asked = [one.weighting for one in self.also_report if isinstance(one, RenioReportConfig)]
        return renio_in(self.weighting) or next(iter(asked), None)

    @property
    def sample_needs(self) -> frozenset[str]:
        """Inputs that the weighting declares."""
        return self.weighting.needs

    @property
    def longest_completion(self) -> int | None:
        """Tokens after which a completion of the student is cut."""
        return self.rollout.max_completion_length

    @property
    def longest_trained(self) -> int | None:
        """Completion tokens of a sequence that the models read in an update, at most."""
        return self.rollout.prefix_length or self.rollout.max_completion_length

    @property
    def completions_per_prompt(self) -> int:
        """Sequences in a row that have one prompt."""
        return self.rollout.completions_per_prompt

    @property
    def decoded_together(self) -> int | None:
        """Sequences that are sampled at a time; None: all of a rank's."""
        return self.rollout.micro_batch_size

    @property
    def loss_temperature(self) -> float:
        """Temperature by which the loss divides both models' logits."""
        return self.loss.temperature

    @property
    def lm_head(self) -> HeadConfig:
        """How the loss computes logits."""
        return self.head

    @cached_property
    def teachers(self) -> tuple[TeacherSpec, ...]:  # resolved once
        """One teacher per entry of `teacher.routes`; a single teacher is named `ONLY`."""
        return resolve_teachers(self)

    @property
    def num_teacher_ranks(self) -> int:
        """Ranks dedicated to teachers; they are the last of the world."""
        return num_teacher_ranks(self.parallel, self.teacher)

    @property
    def fewest_ranks(self) -> int:
        """Ranks that hold one copy of each model."""
        return fewest_ranks(self.parallel, self.teacher)


@dataclass(frozen=True, kw_only=True)
class SftConfig(JobConfig):
    """Settings of `renio sft`: supervised fine-tuning on given completions.

    Attributes:
        init: `pretrained` starts from the directory's weights; `random` from random weights of its config.json.
        completion_only_loss: as in TRL: `false` learns the tokens of the prompt, too, all but its first.
        max_length: tokens of prompt and completion together, at most; `data.overlong` says what happens to longer ones.
            null: as many as the model has positions.
    """

    builder: ClassVar[str] = "renio_megatron.runner.build:build_sft"

    algorithm: str = "sft"
    init: str = "pretrained"
    completion_only_loss: bool = True
    max_length: int | None = None

    def __post_init__(self) -> None:
        require_device(self.device)
        require_choice("init", self.init, ("pretrained", "random"))
        require_positive("", max_length=self.max_length)

    @property
    def longest_given(self) -> int | None:
        """Tokens of a prompt and its given completion, at most."""
        packed, ranks = self.train.max_tokens_per_micro_batch, self.parallel.context_parallel_size
        if packed is not None:  # the last token is not read; each sequence is padded so that context ranks can share it
            unit = 1 if ranks == 1 else 2 * ranks
            packed = packed // unit * unit + 1
        return min((one for one in (self.max_length, packed) if one is not None), default=None)

    @property
    def starts_from_weights(self) -> bool:
        """Whether the student's weights are loaded, not initialized at random."""
        return self.init == "pretrained"

    @property
    def learns_prompts(self) -> bool:
        """The opposite of `completion_only_loss`."""
        return not self.completion_only_loss


SECTIONS: tuple[str, ...] = (
    *(
        "model",
        "pretrained_checkpoint",
        "algorithm",
        "init",
        "completion_only_loss",
        "max_length",
        "teacher",
        "data",
        "rollout",
        "loss",
        "head",
        "weighting",
        "also_report",
        "canaries",
        "parallel",
    ),
    *("precision", "teacher_precision", "lora", "train", "checkpoint", "evaluate", "output_dir"),
)
"""Top-level keys of a recipe in the order in which they are written and documented."""

COMMANDS = {"train": "distillation", "sft": "sft"}
"""Command -> the algorithm of a recipe that names none."""
ALGORITHMS = {
    "distillation": "renio_megatron.config.schema:DistillationConfig",
    "sft": "renio_megatron.config.schema:SftConfig",
}
"""Algorithm -> `module:class` of its settings, a `JobConfig`, which is imported when it is chosen."""


def schema_of(algorithm: str) -> type[JobConfig]:
    """The class of an algorithm's settings; raises `ConfigError` for an unknown name."""
    require_choice("algorithm", algorithm, ALGORITHMS)
    return imported(ALGORITHMS[algorithm])


@dataclass(frozen=True)
class Recipe:
    """A recipe after all checks that need neither the models nor the number of ranks.

    Attributes:
        config: the settings.
        explicit: dotted keys that the recipe or the command line set to something other than null.
        kind: `train` or `sft`.
        dropped: the recipe's own keys that the command line left without effect, with the reason; they have their
            defaults.
        written: what stands in the recipe for a key, where that is not the key itself.
    """

    config: JobConfig
    explicit: frozenset[str]
    kind: str
    dropped: Mapping[str, str] = field(default_factory=dict)
    written: Mapping[str, str] = field(default_factory=dict)

    def dropped_lines(self) -> list[str]:
        """One sentence per reason why keys were dropped."""
        keys: dict[str, list[str]] = {}
        for key, because in self.dropped.items():
            keys.setdefault(because, []).append(self.written.get(key, key))
        return [f"left out of the recipe: {', '.join(names)}: {because}" for because, names in keys.items()]
