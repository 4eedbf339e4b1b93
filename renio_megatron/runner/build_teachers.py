"""Construction of one or several teachers: kind, layout and ranks from the settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from renio_megatron.config.lazy import imported
from renio_megatron.config.schema import DistillationConfig
from renio_megatron.config.teachers import ONLY, TeacherSpec
from renio_megatron.files import user_path
from renio_megatron.losses.tune_kernels import tuning_reported
from renio_megatron.parallel.layout import ParallelLayout
from renio_megatron.runner.inputs import RunInputs, TeacherInputs, max_completion_tokens
from renio_megatron.training.algorithms.multi_teacher import MultiTeacher


def build_teacher(
    config: DistillationConfig,
    inputs: RunInputs,
    layout: ParallelLayout,
    student: Any = None,
    report: Callable[[str], None] | None = None,
) -> Any:
    """Builds a `SharedLayoutTeacher`, an `OwnLayoutTeacher` for a layout of its own, or a `MultiTeacher` of several.

    Some kinds use the modules of `student`, a `ModelPart`, and have no weights of their own.
    """
    built = {one.name: _build_one(config, one, inputs, layout, student, report) for one in _with_weights(config)}
    if not config.teacher.routes:
        return built[ONLY]
    return MultiTeacher(built, {one.name: one.weights_of for one in config.teachers})


def _with_weights(config: DistillationConfig) -> list[TeacherSpec]:
    """One teacher for each set of weights, in the recipe's order."""
    return [one for one in config.teachers if one.weights_of == one.name]


def _build_one(
    config: DistillationConfig,
    spec: TeacherSpec,
    inputs: RunInputs,
    layout: ParallelLayout,
    student: Any,
    report: Callable[[str], None] | None,
) -> Any:
    from renio_megatron.megatron.teacher.shared_layout import SharedLayoutTeacher

    if spec.has_own_layout:
        return _own_layout(config, spec, inputs, layout, student, report)

    def build() -> Any:
        return _teacher_part(config, spec, inputs, layout, report)

    return SharedLayoutTeacher(
        imported(spec.settings.weights)(spec.settings, student, build),
        config.train,
        config.head,
        temperature=config.loss.temperature,
        pad_id=inputs.pad_id,
        payload_device=spec.settings.payload_device,
    )


def build_teacher_servers(
    config: DistillationConfig, inputs: RunInputs, layout: ParallelLayout, report: Callable[[str], None] | None = None
) -> list[Any]:
    """Builds the `TeacherServer`s of a dedicated teacher rank, in the order in which they are called."""
    built = [_own_layout(config, one, inputs, layout, None, report) for one in _with_weights(config) if one.num_ranks]
    with tuning_reported(layout.device):
        for teacher in built:
            teacher.tune(max_completion_tokens(config, inputs))
    return built


def _own_layout(
    config: DistillationConfig,
    spec: TeacherSpec,
    inputs: RunInputs,
    layout: ParallelLayout,
    student: Any,
    report: Callable[[str], None] | None,
) -> Any:
    import torch
    import torch.distributed as dist

    from renio_megatron.megatron.runtime.initialize import bridge
    from renio_megatron.megatron.runtime.process_groups import make_place
    from renio_megatron.megatron.teacher.own_layout import OwnLayoutTeacher
    from renio_megatron.megatron.teacher.rank_map import RankMap
    from renio_megatron.megatron.teacher.scoring import Reader, ScoringSettings
    from renio_megatron.megatron.teacher.server import TeacherServer
    from renio_megatron.parallel.row_exchange import axis_of

    is_dedicated, weights = spec.num_ranks > 0, imported(spec.settings.weights)
    reader = None
    if layout.is_teacher_rank:
        part = _teacher_part(config, spec, inputs, layout, report)
        reader = Reader(weights(spec.settings, None, lambda: part), None)
    elif not is_dedicated:
        place = make_place(spec.parallel, layout.device)
        with place.entered():
            part = _teacher_part(config, spec, inputs, place.layout, report)
        reader = Reader(weights(spec.settings, None, lambda: part), place)
    endpoint = TeacherServer if layout.is_teacher_rank else OwnLayoutTeacher
    return endpoint(
        reader,
        None if layout.is_teacher_rank else layout,
        RankMap.of(
            bridge().axis if is_dedicated else axis_of(dist.distributed_c10d._get_default_group()),
            None if layout.is_teacher_rank else layout,
            None if reader is None else reader.part.layout,
            layout.device,
        ),
        ScoringSettings(
            hidden_size=inputs.teachers[spec.name].architecture.hidden_size,
            dtype=torch.bfloat16 if spec.bf16 else torch.float32,
            device=layout.device,
            train=config.train,
            head=config.head,
            temperature=config.loss.temperature,
            pad_id=inputs.pad_id,
            payload_device=spec.settings.payload_device,
        ),
        bridge=bridge() if is_dedicated else None,
        shard=None if layout.is_teacher_rank else student.shard,
    )


def _teacher_part(
    config: DistillationConfig,
    spec: TeacherSpec,
    inputs: RunInputs,
    layout: ParallelLayout,
    report: Callable[[str], None] | None,
) -> Any:
    """Builds the frozen `ModelPart` of a teacher with weights of its own, in the current process groups."""
    from renio_megatron.megatron.model.build import build_model
    from renio_megatron.megatron.weights.merge_adapter import Merger
    from renio_megatron.megatron.weights.pretrained import load_pretrained

    teacher: TeacherInputs = inputs.teachers[spec.name]
    part = build_model(
        teacher.architecture,
        layout,
        spec.parallel,
        replace(config.train, bf16=spec.bf16),
        spec.precision,
        vocab_size=inputs.vocab_size,
        num_rows=inputs.architecture.vocab_size,
        trained=False,
        initialize=False,
    )
    adapter = spec.settings.adapter
    change = None if adapter is None else Merger(user_path(adapter), part.architecture, teacher.weights, layout.device)
    load_pretrained(part, teacher.weights, title=spec.title, report=report, change=change)
    return part
