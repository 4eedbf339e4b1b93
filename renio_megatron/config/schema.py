"""The whole of a run's settings as one dataclass a command."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

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
from renio_megatron.config.validators import require_choice


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Settings of `renio train`: on-policy distillation.

    Attributes:
        model: the student's Hugging Face directory, or a model that ships with the package.
        pretrained_checkpoint: a checkpoint that Megatron wrote (torch_dist, of any layout), whose weights are the
            student's in place of those in `model`; null: `model`'s. config.json and the tokenizer are `model`'s.
        teacher, data, rollout, loss, head, weighting, parallel, precision, teacher_precision, lora, train, checkpoint,
            evaluate: sections, see `settings`.
        output_dir: the run directory.
    """

    model: str
    pretrained_checkpoint: str | None = None
    teacher: TeacherConfig
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    weighting: WeightingConfig = field(default_factory=WeightingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    teacher_precision: TeacherPrecisionConfig = field(default_factory=TeacherPrecisionConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    output_dir: str


@dataclass(frozen=True, kw_only=True)
class SftConfig:
    """Settings of `renio sft`: supervised fine-tuning on given completions.

    Attributes:
        model: Hugging Face directory, or a model that ships with the package.
        pretrained_checkpoint: where the weights come from in place of `model`'s, as in `RunConfig`.
        init: `pretrained` starts from the directory's weights; `random` from random weights of its config.json.
        data, parallel, precision, lora, train, checkpoint, evaluate: sections, see `settings`.
        output_dir: the run directory.
    """

    model: str
    pretrained_checkpoint: str | None = None
    init: str = "pretrained"
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    output_dir: str

    def __post_init__(self) -> None:
        require_choice("init", self.init, ("pretrained", "random"))


SCHEMAS: dict[str, type[RunConfig] | type[SftConfig]] = {"train": RunConfig, "sft": SftConfig}


@dataclass(frozen=True)
class Recipe:
    """A recipe after all checks that need neither the models nor the number of ranks.

    Attributes:
        config: the settings.
        explicit: dotted keys that the recipe or the command line set to something other than null.
        kind: `train` or `sft`.
        dropped: the recipe's own keys that the command line left without effect, and why; they have their defaults.
    """

    config: RunConfig | SftConfig
    explicit: frozenset[str]
    kind: str
    dropped: Mapping[str, str] = field(default_factory=dict)

    def dropped_lines(self) -> list[str]:
        """A sentence for each reason why keys were dropped."""
        keys: dict[str, list[str]] = {}
        for key, because in self.dropped.items():
            keys.setdefault(because, []).append(key)
        return [f"left out of the recipe: {', '.join(names)}: {because}" for because, names in keys.items()]
