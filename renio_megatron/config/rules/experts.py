"""Rules for models with experts: those that need the models' config.json, and those that need the number of ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from renio_megatron.config import ParallelConfig, TrainConfig
from renio_megatron.config.sections.lora import OF_ATTENTION
from renio_megatron.errors import ConfigError
from renio_megatron.models.architecture import ModelShape
from renio_megatron.models.families import MOE_FAMILIES


def check_expert_ranks(parallel: ParallelConfig, train: TrainConfig, world_size: int) -> None:
    """Raises `ConfigError` where `world_size` ranks cannot share experts in this way."""
    expert, tensor = parallel.expert_model_parallel_size, parallel.expert_tensor_ranks
    within = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    stage = world_size // parallel.pipeline_model_parallel_size
    sizes = f"parallel.expert_model_parallel_size={expert} times expert_tensor_parallel_size={tensor}"
    if stage % parallel.expert_ranks:
        raise ConfigError(
            f"{sizes} does not divide the {stage} ranks of a pipeline stage (tensor "
            f"{parallel.tensor_model_parallel_size} x context {parallel.context_parallel_size} x data "
            f"{stage // within}). Choose a divisor, or change the number of ranks."
        )
    if within % parallel.expert_ranks and train.max_tokens_per_micro_batch is not None:
        raise ConfigError(
            f"{sizes} puts experts on other data-parallel ranks, and with train.max_tokens_per_micro_batch="
            f"{train.max_tokens_per_micro_batch} these may have different numbers of micro-batches: one would wait for "
            "ever for the other's tokens. Set train.max_tokens_per_micro_batch=null, or "
            "parallel.expert_model_parallel_size=1."
        )


def check_experts(config: Any, models: Mapping[str, ModelShape], layouts: Mapping[str, ParallelConfig]) -> None:
    """Raises `ConfigError` for settings that do not fit the models' experts, or have no effect without experts.

    Args:
        config: a DistillationConfig or SftConfig.
        models: by the setting that names the model: `model` is the student.
        layouts: the layout of each model, by the same names.
    """
    parallel, train = config.parallel, config.train
    moe_models = {setting: model for setting, model in models.items() if model.has_experts}
    if not moe_models and (parallel.expert_model_parallel_size > 1 or parallel.expert_tensor_parallel_size is not None):
        key = "expert_model" if parallel.expert_model_parallel_size > 1 else "expert_tensor"
        raise ConfigError(
            f"parallel.{key}_parallel_size={getattr(parallel, f'{key}_parallel_size')} would be ignored: no model of "
            "this run has experts. Remove it, or choose a model of type " + " or ".join(MOE_FAMILIES) + "."
        )
    if "model" not in moe_models and train.moe_aux_loss_coeff:
        raise ConfigError(
            f"train.moe_aux_loss_coeff={train.moe_aux_loss_coeff} would be ignored: the student has no experts. "
            "Set it to 0."
        )
    for setting, model in moe_models.items():
        _check_cut(setting, model, layouts[setting])
    for setting in moe_models:
        _check_layers(setting, config.precision if setting == "model" else config.teacher_precision)
    if "model" in moe_models:
        _check_student(config)


def _check_cut(setting: str, model: ModelShape, parallel: ParallelConfig) -> None:
    for name, number, key, ranks in (
        ("experts", model.num_experts, "expert_model_parallel_size", parallel.expert_model_parallel_size),
        ("columns of an expert", model.expert_width, "expert_tensor_parallel_size", parallel.expert_tensor_ranks),
    ):
        if number is not None and number % ranks:
            raise ConfigError(
                f"{setting}: parallel.{key}={ranks} does not divide the {number} {name}. Choose a divisor."
            )


def _check_layers(setting: str, precision: Any) -> None:
    if precision.backend == "te" or precision.fp8 is not None:
        key = f"fp8={precision.fp8}" if precision.fp8 is not None else "backend=te"
        raise ConfigError(
            f"{precision.section}.{key} with {setting}, which has experts: they are built of Megatron's own layers in "
            f"the parameters' dtype. Set {precision.section}.backend=local and {precision.section}.fp8=null."
        )


def _check_student(config: Any) -> None:
    parallel, lora = config.parallel, config.lora
    if parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel:
        raise ConfigError(
            f"parallel.tensor_model_parallel_size={parallel.tensor_model_parallel_size} without "
            "parallel.sequence_parallel: a student with experts is trained with both, else every tensor-parallel rank "
            "would send the same tokens to the experts. Set parallel.sequence_parallel=true."
        )
    if getattr(config, "init", "pretrained") == "random" and parallel.expert_model_parallel_size > 1:
        raise ConfigError(
            f"init=random with parallel.expert_model_parallel_size={parallel.expert_model_parallel_size}: every rank's "
            "experts would begin with the same weights. Set expert_model_parallel_size=1, or init=pretrained."
        )
    if lora.r is None:
        return
    others = [name for name in lora.names if name not in OF_ATTENTION]
    if others:
        raise ConfigError(
            f"lora.r={lora.r} on {', '.join(others)} of a student with experts: adapters beside experts are not built. "
            f"Set lora.targets=[{','.join(OF_ATTENTION)}], or some of them."
        )
