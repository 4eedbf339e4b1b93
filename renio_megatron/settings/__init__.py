"""Typed settings of every component: values and their ranges, no behaviour."""

from renio_megatron.settings.lora import LoraConfig
from renio_megatron.settings.loss import HeadConfig, LossConfig
from renio_megatron.settings.precision import PrecisionConfig, TeacherPrecisionConfig
from renio_megatron.settings.run import CheckpointConfig, DataConfig, EvaluateConfig, RolloutConfig
from renio_megatron.settings.teacher import TeacherConfig, TeacherParallelConfig, TeacherRouteConfig
from renio_megatron.settings.train import ParallelConfig, TrainConfig
from renio_megatron.settings.weighting import WeightingConfig

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
    "TeacherRouteConfig",
    "TrainConfig",
    "WeightingConfig",
]
