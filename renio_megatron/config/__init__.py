"""A run's settings: typed sections here, the whole in `schema`, read and checked by `load`. No torch."""

from renio_megatron.config.sections.checkpoint import CheckpointConfig
from renio_megatron.config.sections.data import DataConfig
from renio_megatron.config.sections.evaluate import EvaluateConfig
from renio_megatron.config.sections.lora import LoraConfig
from renio_megatron.config.sections.loss import HeadConfig, LossConfig
from renio_megatron.config.sections.parallel import ParallelConfig
from renio_megatron.config.sections.precision import PrecisionConfig, TeacherPrecisionConfig
from renio_megatron.config.sections.rollout import RolloutConfig
from renio_megatron.config.sections.teacher import TeacherConfig, TeacherParallelConfig
from renio_megatron.config.sections.train import TrainConfig
from renio_megatron.config.sections.weighting import WeightingConfig

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "EvaluateConfig",
    "HeadConfig",
    "LoraConfig",
    "LossConfig",
    "ParallelConfig",
    "PrecisionConfig",
    "RolloutConfig",
    "TeacherConfig",
    "TeacherParallelConfig",
    "TeacherPrecisionConfig",
    "TrainConfig",
    "WeightingConfig",
]
