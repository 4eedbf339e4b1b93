"""Rules for parallel layouts: those that need the number of ranks, and those that need the models' config.json."""

from __future__ import annotations

from renio_megatron.config import ParallelConfig, TeacherConfig, TrainConfig
from renio_megatron.config.teachers import fewest_ranks, has_own_layout, num_teacher_ranks, teacher_parallel
from renio_megatron.errors import ConfigError
from renio_megatron.models.architecture import ModelShape


def check_teacher_layout(parallel: ParallelConfig, teacher: TeacherConfig, world_size: int) -> None:
    """Raises `ConfigError` where `world_size` ranks cannot hold the teacher in this way."""
    resolved, num_ranks = teacher_parallel(parallel, teacher), num_teacher_ranks(parallel, teacher)
    if teacher.parallel.sequence_parallel and resolved.tensor_model_parallel_size == 1:
        raise ConfigError(
            "teacher.parallel.sequence_parallel=true would be ignored: it shares the sequence among tensor-parallel "
            "ranks, and the teacher has one. Raise teacher.parallel.tensor_model_parallel_size, or set it to null."
        )
    if num_ranks >= world_size:
        raise ConfigError(
            f"teacher.ranks=dedicated takes {num_ranks} ranks ({resolved.describe(num_ranks)}) of a world of "
            f"{world_size}, and none remains for the student. Start at least {fewest_ranks(parallel, teacher)} ranks "
            "(--nproc), or set teacher.ranks=colocated."
        )
    if has_own_layout(parallel, teacher) and not num_ranks and world_size % resolved.model_ranks:
        raise ConfigError(
            f"one copy of the teacher takes {resolved.model_ranks} ranks (teacher.parallel: {resolved.describe()}), "
            f"which does not divide the world of {world_size}. Start a multiple of {fewest_ranks(parallel, teacher)} "
            "ranks (--nproc), or change the sizes in teacher.parallel."
        )


def check_layout(parallel: ParallelConfig, train: TrainConfig, world_size: int) -> None:
    """Raises `ConfigError` where `world_size` ranks cannot share a model or a batch in this way."""
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size == 1:
        raise ConfigError(
            "parallel.sequence_parallel=true would be ignored: it shares the sequence among tensor-parallel ranks, and "
            "parallel.tensor_model_parallel_size is 1. Raise it, or set parallel.sequence_parallel=false."
        )
    _check_overlap(parallel)
    if world_size % parallel.model_ranks:
        raise ConfigError(
            f"one copy of the model takes {parallel.model_ranks} ranks ({parallel.describe()}), which does "
            f"not divide the world of {world_size}. Start a multiple of {parallel.model_ranks} ranks (--nproc), or "
            "change the sizes in parallel."
        )
    batch, data_ranks = train.global_batch_size, world_size // parallel.model_ranks
    is_packed = train.max_tokens_per_micro_batch is not None
    micro = 1 if is_packed else train.micro_batch_size
    if batch % (micro * data_ranks):
        of = "" if is_packed else f"train.micro_batch_size={micro} times "
        raise ConfigError(
            f"train.global_batch_size={batch} is not a multiple of {micro * data_ranks}: {of}"
            f"the data-parallel size {data_ranks}. Change one of them, or the number of ranks."
        )
    _check_interleaving(parallel, batch // (micro * data_ranks), is_packed)


def check_cut(
    setting: str,
    model: ModelShape,
    parallel: ParallelConfig,
    *,
    trained: bool,
    section: str = "parallel",
) -> None:
    """Raises `ConfigError` where a model cannot be cut as `parallel` asks.

    Args:
        setting: where the model is named; for the message.
        model: the model's dimensions.
        parallel: the layout.
        trained: False for a model without interleaved (virtual pipeline) stages.
        section: where the layout is set; for the message.
    """
    tensor, file = parallel.tensor_model_parallel_size, model.file
    heads, groups = model.num_attention_heads, model.num_query_groups
    if heads % tensor:
        raise ConfigError(
            f"{setting}: {section}.tensor_model_parallel_size={tensor} does not divide num_attention_heads={heads} of "
            f"{file}. Choose a divisor."
        )
    if groups % tensor and tensor % groups:
        raise ConfigError(
            f"{setting}: {section}.tensor_model_parallel_size={tensor} is neither a divisor nor a multiple of "
            f"num_key_value_heads={groups} of {file}. Choose one that is."
        )
    stages = parallel.num_stages if trained else parallel.pipeline_model_parallel_size
    if model.num_layers % stages:
        what = f"{section}.pipeline_model_parallel_size={parallel.pipeline_model_parallel_size}"
        if stages != parallel.pipeline_model_parallel_size:
            what += f" times virtual_pipeline_model_parallel_size={parallel.virtual_pipeline_model_parallel_size}"
        raise ConfigError(
            f"{setting}: {what} does not divide num_hidden_layers={model.num_layers} of {file}. Choose a divisor."
        )


def check_adapters_cut(student: ModelShape, parallel: ParallelConfig) -> None:
    """Raises `ConfigError` where adapters cannot be cut as the student is."""
    tensor, groups = parallel.tensor_model_parallel_size, student.num_query_groups
    if tensor > groups:
        raise ConfigError(
            f"lora.r beside parallel.tensor_model_parallel_size={tensor}: the student has num_key_value_heads={groups}"
            ", and adapters of a group that is cut are not built. Lower the size, or set lora.r=null."
        )


def check_recomputation(num_layers: int, parallel: ParallelConfig, train: TrainConfig) -> None:
    """Raises `ConfigError` where a stage of the trained model does not hold whole groups of recomputed layers.

    Megatron does not check this, and accesses a missing layer in its first forward pass.
    """
    method, group = train.recomputed_layers or ("block", 1)
    if method != "uniform":
        return
    layers = num_layers // parallel.num_stages
    if layers % group:
        raise ConfigError(
            f"train.recompute_num_layers={group} does not divide the {layers} layers of a pipeline stage, which "
            "train.recompute_method=uniform needs. Choose a divisor, for example 1, or train.recompute_method=block."
        )


def _check_overlap(parallel: ParallelConfig) -> None:
    if parallel.overlap_param_gather and not (parallel.use_distributed_optimizer and parallel.overlap_grad_reduce):
        raise ConfigError(
            "parallel.overlap_param_gather=true needs parallel.use_distributed_optimizer=true, whose gather it "
            "overlaps, and parallel.overlap_grad_reduce=true. Set both, or overlap_param_gather=false."
        )


def _check_interleaving(parallel: ParallelConfig, num_micro_batches: int, is_packed: bool) -> None:
    if parallel.virtual_pipeline_model_parallel_size is None:
        return
    pipeline = parallel.pipeline_model_parallel_size
    if pipeline == 1:
        raise ConfigError(
            "parallel.virtual_pipeline_model_parallel_size would be ignored: there is one pipeline rank. "
            "Raise parallel.pipeline_model_parallel_size, or set it to null."
        )
    if num_micro_batches % pipeline:
        what = "sequences" if is_packed else "micro-batches"
        raise ConfigError(
            f"an interleaved pipeline of {pipeline} ranks needs a multiple of {pipeline} micro-batches; each "
            f"data-parallel rank has {num_micro_batches} {what} in a step. Change train.global_batch_size, "
            "train.micro_batch_size or the number of ranks, or set parallel.virtual_pipeline_model_parallel_size=null."
        )
