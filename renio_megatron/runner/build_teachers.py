"""Config -> the teacher, or several: which kind, in which layout, on which ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from renio_megatron.config import ParallelConfig, TrainConfig
from renio_megatron.config.schema import RunConfig
from renio_megatron.config.teachers import (
    ONLY,
    has_own_layout,
    num_scorers,
    same_weights,
    single_teachers,
    teacher_parallel,
)
from renio_megatron.files import user_path
from renio_megatron.losses.tune_kernels import tuning_reported
from renio_megatron.parallel.layout import Layout
from renio_megatron.runner.inputs import Inputs, TeacherInputs, most_completion_tokens
from renio_megatron.training.algorithms.multi_teacher import RoutedTeachers


def build_teacher(
    config: RunConfig,
    inputs: Inputs,
    layout: Layout,
    student: Any = None,
    say: Callable[[str], None] | None = None,
) -> Any:
    """The teacher: `MegatronTeacher`, `DetachedTeacher` where it has a layout of its own, `RoutedTeachers` of several.

    Some kinds are `student`, the `ModelPart`, and have no weights of their own.
    """
    if not config.teacher.routes:
        return _build_one(config, inputs, ONLY, layout, student, say)
    teachers, same = single_teachers(config), same_weights(config)
    built = {
        name: _build_one(teachers[name], inputs, name, layout, student, say) for name in dict.fromkeys(same.values())
    }
    return RoutedTeachers(built, same)


def _build_one(
    config: RunConfig,
    inputs: Inputs,
    name: str,
    layout: Layout,
    student: Any,
    say: Callable[[str], None] | None,
) -> Any:
    from renio_megatron.megatron.teacher.shared_layout import MegatronTeacher
    from renio_megatron.megatron.teacher.weights import KINDS

    if has_own_layout(config.parallel, config.teacher):
        return _detached_teacher(config, inputs, name, layout, student, say)

    def build() -> Any:
        return _teacher_part(config, inputs, name, layout, config.parallel, say)

    return MegatronTeacher(
        KINDS[config.teacher.kind](config.teacher, student, build),
        config.train,
        config.head,
        temperature=config.loss.temperature,
        pad_id=inputs.pad_id,
        payload_device=config.teacher.payload_device,
    )


def build_scorers(
    config: RunConfig, inputs: Inputs, layout: Layout, say: Callable[[str], None] | None = None
) -> list[Any]:
    """The `DetachedTeacher`s of a rank that only scores, in the order in which they are asked."""
    teachers, same = single_teachers(config), same_weights(config)
    built = [
        _detached_teacher(teachers[name], inputs, name, layout, None, say)
        for name in dict.fromkeys(same.values())
        if num_scorers(config.parallel, teachers[name].teacher)
    ]
    with tuning_reported(layout.device):
        for teacher in built:
            teacher.tune(most_completion_tokens(config, inputs))
    return built


def _detached_teacher(
    config: RunConfig,
    inputs: Inputs,
    name: str,
    layout: Layout,
    student: Any,
    say: Callable[[str], None] | None,
) -> Any:
    import torch
    import torch.distributed as dist

    from renio_megatron.megatron.runtime.initialize import bridge
    from renio_megatron.megatron.runtime.process_groups import place_beside
    from renio_megatron.megatron.teacher.own_layout import DetachedTeacher, Reader
    from renio_megatron.megatron.teacher.rank_map import Seats
    from renio_megatron.megatron.teacher.weights import KINDS
    from renio_megatron.parallel.row_exchange import axis_of

    parallel = teacher_parallel(config.parallel, config.teacher)
    is_dedicated = config.teacher.ranks == "dedicated"
    reader = None
    if layout.is_scorer:
        part = _teacher_part(config, inputs, name, layout, parallel, say)
        reader = Reader(KINDS[config.teacher.kind](config.teacher, None, lambda: part), None)
    elif not is_dedicated:
        place = place_beside(parallel, layout.device)
        with place.entered():
            part = _teacher_part(config, inputs, name, place.layout, parallel, say)
        reader = Reader(KINDS[config.teacher.kind](config.teacher, None, lambda: part), place)
    return DetachedTeacher(
        reader,
        None if layout.is_scorer else layout,
        Seats.of(
            bridge().axis if is_dedicated else axis_of(dist.distributed_c10d._get_default_group()),
            None if layout.is_scorer else layout,
            None if reader is None else reader.part.layout,
            layout.device,
        ),
        bridge() if is_dedicated else None,
        architecture=inputs.teachers[name].architecture,
        shard=None if layout.is_scorer else student.shard,
        train=config.train,
        head=config.head,
        dtype=torch.bfloat16 if _teacher_train(config).bf16 else torch.float32,
        device=layout.device,
        temperature=config.loss.temperature,
        pad_id=inputs.pad_id,
        payload_device=config.teacher.payload_device,
    )


def _teacher_part(
    config: RunConfig,
    inputs: Inputs,
    name: str,
    layout: Layout,
    parallel: ParallelConfig,
    say: Callable[[str], None] | None,
) -> Any:
    """The frozen `ModelPart` of a teacher with weights of its own, whose groups are in force."""
    from renio_megatron.megatron.model.build import build_model
    from renio_megatron.megatron.weights.merge_adapter import Merger
    from renio_megatron.megatron.weights.pretrained import load_pretrained

    teacher: TeacherInputs = inputs.teachers[name]
    part = build_model(
        teacher.architecture,
        layout,
        parallel,
        _teacher_train(config),
        config.teacher_precision,
        vocab_size=inputs.vocab_size,
        num_rows=inputs.architecture.vocab_size,
        trained=False,
        initialise=False,
    )
    adapter = config.teacher.adapter
    change = None if adapter is None else Merger(user_path(adapter), part.architecture, teacher.weights, layout.device)
    title = "teacher" if name == ONLY else f"teacher {name}"
    load_pretrained(part, teacher.weights, title=title, say=say, change=change)
    return part


def _teacher_train(config: RunConfig) -> TrainConfig:
    """`train`, in the teacher's dtype."""
    own = config.teacher.bf16
    return config.train if own is None else replace(config.train, bf16=own)
