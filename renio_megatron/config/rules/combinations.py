"""Settings of a recipe that cannot work together, each with a remedy."""

from __future__ import annotations

from typing import Any

from renio_megatron.config import PrecisionConfig
from renio_megatron.config.teachers import ONLY, TeacherSpec
from renio_megatron.errors import ConfigError


def check_combinations(config: Any) -> None:
    """Raises `ConfigError` for combinations of settings that cannot work.

    Args:
        config: a JobConfig.
    """
    _check_completions_per_prompt(config)
    if config.longest_trained is not None:
        _check_packing(config, config.longest_trained)
    if config.teachers:
        _check_routes(config)
        for one in config.teachers:
            try:
                _check_self_teacher(config, one)
                _check_head(config, one)
                _check_teachers_precision(config, one)
                _check_adapters_teacher(config, one)
            except ConfigError as error:
                if one.name == ONLY:
                    raise
                raise ConfigError(f"teacher.routes.{one.name}: {error}") from error
    _check_precision(config)
    if config.lora.r is not None:
        _check_lora(config)


def _check_completions_per_prompt(config: Any) -> None:
    count, batch = config.completions_per_prompt, config.train.global_batch_size
    if batch % count:
        raise ConfigError(
            f"rollout.completions_per_prompt={count} does not divide train.global_batch_size={batch}, a number of "
            f"completions: a step has whole prompts. Choose a multiple of it, such as {-(-batch // count) * count}."
        )


def _check_routes(config: Any) -> None:
    """Checks that the settings allow several teachers."""
    routes, parallel = config.teacher.routes, config.parallel
    if not routes:
        return
    if not config.data.source_info.has_records:
        raise ConfigError(
            f"teacher.routes with data.source={config.data.source}: a column of each record names its teacher, and the "
            "problems of this source have no columns. Choose data.source=jsonl or datasets, or give one teacher."
        )
    averages = [one.name for one in config.teachers if one.settings.is_averaged and one.weights_of == one.name]
    if len(averages) > 1:
        raise ConfigError(
            f"teacher.routes.{averages[0]} and teacher.routes.{averages[1]} are moving averages with different "
            "ema_decay; a run keeps one. Give both the same, or leave one of them out."
        )
    students = [one.name for one in config.teachers if one.shares_student]
    if students and parallel.virtual_pipeline_model_parallel_size is not None:
        raise ConfigError(
            f"teacher.routes.{students[0]} is the student's own modules, and an interleaved pipeline reads a multiple "
            f"of {parallel.pipeline_model_parallel_size} micro-batches at a time, which the records of one of several "
            "teachers need not be. Set parallel.virtual_pipeline_model_parallel_size=null, or give one teacher."
        )
    if parallel.tensor_model_parallel_size * parallel.context_parallel_size % parallel.expert_ranks:
        raise ConfigError(
            f"teacher.routes with parallel.expert_model_parallel_size={parallel.expert_model_parallel_size} times "
            f"expert_tensor_parallel_size={parallel.expert_tensor_ranks} puts experts on other data-parallel ranks, "
            "where a teacher may have no sequence to read: one rank would wait for ever for the other's tokens. Choose "
            "sizes that divide tensor x context, or give one teacher."
        )


def _check_self_teacher(config: Any, one: TeacherSpec) -> None:
    data, kind = one.data, one.kind
    same_text = data.teacher_template in (None, data.student_template)
    is_own = data.teacher_template is not None or data.teacher_system is not None
    same_text &= not is_own or data.teacher_system == data.student_system
    same_thinking = data.teacher_enable_thinking in (None, data.enable_thinking)
    # Records may hold the teacher's prompts; whether they do is seen when they are read.
    may_differ = data.source_info.has_records and data.teacher_template is None
    if one.settings.model is None and same_text and same_thinking and not may_differ:
        raise ConfigError(
            f"teacher.kind={kind} with the student's own view of the prompt: teacher and student are then the same "
            "model on the same text, and their KL is exactly zero at the first step. Give data.teacher_template "
            "something that the student does not see, for example {solution}, or set data.teacher_enable_thinking."
        )
    if one.shares_student and one.settings.payload_device == "recompute":
        raise ConfigError(
            f"teacher.kind={kind} with teacher.payload_device=recompute: student and teacher are one model, which "
            "cannot read for one of them in the middle of a step of the other. Choose host, which keeps as little on "
            "the device."
        )
    if one.settings.is_averaged and config.precision.fp8_param_gather:
        raise ConfigError(
            f"teacher.kind={kind} with precision.fp8_param_gather=true: parameters that are kept in FP8 cannot be "
            "exchanged for their average. Set precision.fp8_param_gather=false."
        )


def _check_packing(config: Any, completion: int) -> None:
    limit = config.train.max_tokens_per_micro_batch
    # The last token is not read, and context parallelism pads each sequence by less than 2 x its ranks.
    context = config.parallel.context_parallel_size
    padding = 2 * context - 1 if context > 1 else 0
    longest = config.data.max_prompt_length + completion - 1 + padding
    setting = f"rollout.{'max_completion_length' if completion == config.longest_completion else 'prefix_length'}"
    if limit is not None and longest > limit:
        raise ConfigError(
            f"train.max_tokens_per_micro_batch={limit} cannot hold the longest sequence that the recipe allows: "
            f"data.max_prompt_length={config.data.max_prompt_length} and {setting}={completion} "
            f"make {longest} tokens. Raise it to {longest}, or lower one of the two."
        )


def _check_teachers_precision(config: Any, one: TeacherSpec) -> None:
    teacher, precision = one.settings, one.precision
    if teacher.offload is not None and precision.fp8 and not precision.emulate_fp8:
        raise ConfigError(
            f"teacher.offload=host with teacher_precision.fp8={precision.fp8}: weights that are kept in FP8 are not "
            "moved. Set teacher.offload=null, or teacher_precision.fp8=null."
        )
    if teacher.bf16 is None:
        _check_rest_of_fp8(precision, "train.bf16", config.train.bf16)
    else:
        _check_rest_of_fp8(precision, "teacher.bf16", teacher.bf16)


def _check_rest_of_fp8(precision: PrecisionConfig, setting: str, bf16: bool) -> None:
    if precision.fp8 is not None and not precision.emulate_fp8 and not bf16:
        raise ConfigError(
            f"{precision.section}.fp8={precision.fp8} with {setting}=false: what stays out of FP8 would be fp32, and "
            f"the products gain nothing. Set {setting}=true."
        )


def _check_precision(config: Any) -> None:
    _check_rest_of_fp8(config.precision, "train.bf16", config.train.bf16)
    if config.precision.fp8_param_gather:
        if not config.parallel.use_distributed_optimizer:
            raise ConfigError(
                "precision.fp8_param_gather=true needs parallel.use_distributed_optimizer=true: that optimizer gathers "
                "the parameters. Set it, or precision.fp8_param_gather=false."
            )
        if not config.starts_from_weights:
            raise ConfigError(
                "precision.fp8_param_gather=true needs init=pretrained: random FP8 weights would be the same on every "
                "tensor-parallel rank. Set init=pretrained, or precision.fp8_param_gather=false."
            )


def _check_lora(config: Any) -> None:
    r, precision = config.lora.r, config.precision
    if not config.starts_from_weights:
        raise ConfigError(
            f"lora.r={r} with init={config.init}: everything but the adapters would stay random. Set init=pretrained, "
            "or lora.r=null."
        )
    if precision.backend == "te" or precision.fp8 is not None:
        setting = f"backend={precision.backend}" if precision.fp8 is None else f"fp8={precision.fp8}"
        raise ConfigError(
            f"lora.r={r} with precision.{setting}: adapters stand beside Megatron's own linear layers in the "
            "parameters' dtype; beside Transformer Engine's or FP8 products they are not built. Set "
            "precision.backend=local and precision.fp8=null, or lora.r=null."
        )


def _check_adapters_teacher(config: Any, one: TeacherSpec) -> None:
    if config.lora.r is not None and one.kind == "initial" and config.lora.adapter is not None:
        raise ConfigError(
            f"lora.adapter={config.lora.adapter!r} with teacher.kind=initial: the teacher is the student with its "
            "adapters switched off, so it would not be the student that the run starts from. Merge the adapter into "
            "the model and give that as `model`, or name a separate teacher."
        )


def _check_head(config: Any, one: TeacherSpec) -> None:
    if config.head.logits_dtype == "bf16" and not config.train.bf16:
        raise ConfigError(
            "head.logits_dtype=bf16 with train.bf16=false: the models are fp32, and so are their logits. Set fp32."
        )
    if one.settings.payload_device == "recompute" and one.has_own_layout:
        raise ConfigError(
            "teacher.payload_device=recompute beside a layout of the teacher's own (teacher.parallel, teacher.ranks): "
            "its ranks cannot read in the middle of the student's step. Choose host, which keeps as little on the "
            "device."
        )
    if config.head.logits_dtype == "bf16" and one.settings.bf16 is False:
        raise ConfigError(
            "head.logits_dtype=bf16 with teacher.bf16=false: the teacher's logits would be rounded to what its "
            "weights were kept out of. Set head.logits_dtype=fp32, or teacher.bf16=null."
        )
    if one.settings.payload_device == "recompute" and config.parallel.pipeline_model_parallel_size > 1:
        raise ConfigError(
            "teacher.payload_device=recompute needs parallel.pipeline_model_parallel_size=1: the teacher's stages "
            "cannot run inside the student's schedule. Choose host, which keeps as little on the device."
        )
