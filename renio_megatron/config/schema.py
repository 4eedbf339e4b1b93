"""The whole of a run's settings as one dataclass a command."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

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
from renio_megatron.config.teachers import TeacherSpec, fewest_ranks, num_teacher_ranks, resolve_teachers
from renio_megatron.config.validators import require_choice


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """Settings that every command which trains has.

    Attributes:
        model: the student's Hugging Face directory, or a model that ships with the package.
        pretrained_checkpoint: a checkpoint that Megatron wrote (torch_dist, of any layout), whose weights are the
            student's in place of those in `model`; null: `model`'s. config.json and the tokenizer are `model`'s.
        data, parallel, precision, lora, train, checkpoint, evaluate: sections, see `config.sections`.
        output_dir: the run directory.
    """

    model: str
    pretrained_checkpoint: str | None = None
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
        """The teachers, none where nobody teaches."""
        return ()

    @property
    def num_teacher_ranks(self) -> int:
        """Ranks that only teachers have; they are the last of the world."""
        return 0

    @property
    def fewest_ranks(self) -> int:
        """Ranks that hold one copy of each model."""
        return self.parallel.model_ranks

    @property
    def starts_from_weights(self) -> bool:
        """Whether the student's weights are read, and not drawn."""
        return True


@dataclass(frozen=True, kw_only=True)
class DistillationConfig(JobConfig):
    """Settings of `renio train`: on-policy distillation.

    Attributes:
        teacher, rollout, loss, head, weighting, teacher_precision: sections, see `config.sections`.
    """

    teacher: TeacherConfig
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    weighting: WeightingConfig = field(default_factory=WeightingConfig)
    teacher_precision: TeacherPrecisionConfig = field(default_factory=TeacherPrecisionConfig)

    @cached_property
    def teachers(self) -> tuple[TeacherSpec, ...]:  # resolved once
        """One for each of `teacher.routes`; a single one is named `ONLY`."""
        return resolve_teachers(self)

    @property
    def num_teacher_ranks(self) -> int:
        """Ranks that only teachers have; they are the last of the world."""
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
    """

    init: str = "pretrained"

    def __post_init__(self) -> None:
        require_choice("init", self.init, ("pretrained", "random"))

    @property
    def starts_from_weights(self) -> bool:
        """Whether the student's weights are read, and not drawn."""
        return self.init == "pretrained"


SECTIONS: tuple[str, ...] = (
    *("model", "pretrained_checkpoint", "init", "teacher", "data", "rollout", "loss", "head", "weighting", "parallel"),
    *("precision", "teacher_precision", "lora", "train", "checkpoint", "evaluate", "output_dir"),
)
"""Keys of a recipe in the order in which people read them."""

SCHEMAS: dict[str, type[JobConfig]] = {"train": DistillationConfig, "sft": SftConfig}


@dataclass(frozen=True)
class Recipe:
    """A recipe after all checks that need neither the models nor the number of ranks.

    Attributes:
        config: the settings.
        explicit: dotted keys that the recipe or the command line set to something other than null.
        kind: `train` or `sft`.
        dropped: the recipe's own keys that the command line left without effect, and why; they have their defaults.
    """

    config: JobConfig
    explicit: frozenset[str]
    kind: str
    dropped: Mapping[str, str] = field(default_factory=dict)

    def dropped_lines(self) -> list[str]:
        """A sentence for each reason why keys were dropped."""
        keys: dict[str, list[str]] = {}
        for key, because in self.dropped.items():
            keys.setdefault(because, []).append(key)
        return [f"left out of the recipe: {', '.join(names)}: {because}" for because, names in keys.items()]
