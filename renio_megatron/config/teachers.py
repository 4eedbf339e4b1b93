"""The teachers of a run and the ranks that hold them, resolved once into `TeacherSpec`s."""

from __future__ import annotations

import math
from dataclasses import Field, dataclass, fields, replace
from typing import Any

from renio_megatron.config import (
    DataConfig,
    ParallelConfig,
    TeacherConfig,
    TeacherParallelConfig,
    TeacherPrecisionConfig,
)
from renio_megatron.files import user_path

ONLY = ""
"""The name of a run's only teacher."""


@dataclass(frozen=True)
class TeacherSpec:
    """A teacher of a run, with all settings that follow from the recipe.

    Attributes:
        name: its route's name; `ONLY` where there is one teacher.
        settings: the section `teacher` for this teacher alone, with the keys of its route and without routes.
        precision: the section `teacher_precision` for this teacher.
        data: the section `data`, with this one's view of a problem.
        parallel: the layout that it is built in: its own, or the student's.
        bf16: whether it computes in bf16, else in fp32.
        shares_student: whether it uses the student's modules, and so has no weights of its own.
        has_own_layout: whether its ranks, or their places on the mesh axes, differ from the student's.
        num_ranks: ranks dedicated to teachers; 0 where it is on the student's.
        weights_of: the first teacher with the same weights, which are loaded once: two such teachers see problems
            differently, which each prompt carries.
    """

    name: str
    settings: TeacherConfig
    precision: TeacherPrecisionConfig
    data: DataConfig
    parallel: ParallelConfig
    bf16: bool
    shares_student: bool
    has_own_layout: bool
    num_ranks: int
    weights_of: str

    @property
    def kind(self) -> str:
        """One of `TEACHER_KINDS`."""
        return self.settings.kind

    @property
    def title(self) -> str:
        """Its name in messages."""
        return "teacher" if self.name == ONLY else f"teacher {self.name}"

    def setting(self, key: str) -> str:
        """The recipe's dotted key of one of its settings, for example `teacher.routes.math.model` for `model`."""
        return f"teacher.{key}" if self.name == ONLY else f"teacher.routes.{self.name}.{key}"


def resolve_teachers(config: Any) -> tuple[TeacherSpec, ...]:
    """The teachers of a `DistillationConfig`, one for each of teacher.routes, or a single one.

    A teacher that uses the student's modules has the student's layout and dtype, whatever the others have.
    """
    sections = _sections_of_each(config)
    made_of = {name: _made_of(teacher) for name, (teacher, _, _) in sections.items()}
    found = []
    for name, (teacher, precision, data) in sections.items():
        is_own = has_own_layout(config.parallel, teacher)
        found.append(
            TeacherSpec(
                name=name,
                settings=teacher,
                precision=precision,
                data=data,
                parallel=teacher_parallel(config.parallel, teacher) if is_own else config.parallel,
                bf16=config.train.bf16 if teacher.bf16 is None else teacher.bf16,
                shares_student=_shares_student(teacher, config),
                has_own_layout=is_own,
                num_ranks=num_teacher_ranks(config.parallel, teacher),
                weights_of=next(first for first, other in made_of.items() if other == made_of[name]),
            )
        )
    return tuple(found)


def _sections_of_each(config: Any) -> dict[str, tuple[TeacherConfig, TeacherPrecisionConfig, DataConfig]]:
    """By name, the sections teacher, teacher_precision and data for each teacher alone."""
    shared: TeacherConfig = config.teacher
    if not shared.routes:
        return {ONLY: (shared, config.teacher_precision, config.data)}
    found = {}
    for name, route in shared.routes.items():
        views = {f"teacher_{key}": getattr(route, key) for key in ("template", "system", "enable_thinking")}
        given = {key: value for key, value in views.items() if value is not None}
        data = replace(config.data, teacher_key=None, **given)
        of_all = {one.name: getattr(shared, one.name) for one in fields(TeacherConfig) if _is_of_all(one)}
        teacher, precision = (
            replace(route, template=None, system=None, enable_thinking=None, **of_all),
            config.teacher_precision,
        )
        if _shares_student(teacher, config):
            precision = TeacherPrecisionConfig()
            teacher = replace(
                teacher,
                parallel=TeacherParallelConfig(),
                ranks="colocated",
                data_parallel_size=1,
                bf16=None,
                offload=None,
            )
        found[name] = (teacher, precision, data)
    return found


def _is_of_all(one: Field[Any]) -> bool:
    """Whether a setting is shared by all teachers."""
    return one.metadata.get("of") == "teacher" and one.name != "routes"


def _shares_student(teacher: TeacherConfig, config: Any) -> bool:
    return teacher.shares_student(has_adapters=config.lora.r is not None)


def _made_of(teacher: TeacherConfig) -> TeacherConfig:
    """The settings that determine a teacher's weights."""
    if teacher.model is None:
        return teacher
    resolved: Any = {"model": str(user_path(teacher.model).resolve())}  # a field of every class that has one
    return replace(teacher, **resolved)


def teacher_parallel(parallel: ParallelConfig, teacher: TeacherConfig) -> ParallelConfig:
    """How ranks share the teacher: the student's layout, or the teacher's own.

    A layout of its own is neither interleaved nor context-parallel, and shares experts among its tensor ranks alone.
    """
    own = teacher.parallel
    tensor = own.tensor_model_parallel_size or parallel.tensor_model_parallel_size
    pipeline = own.pipeline_model_parallel_size or parallel.pipeline_model_parallel_size
    wants_sequence = parallel.sequence_parallel if own.sequence_parallel is None else own.sequence_parallel
    return replace(
        parallel,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=None,
        context_parallel_size=1 if _is_given(teacher) else parallel.context_parallel_size,
        sequence_parallel=wants_sequence and tensor > 1,
        expert_model_parallel_size=1 if _is_given(teacher) else parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=None if _is_given(teacher) else parallel.expert_tensor_parallel_size,
        use_distributed_optimizer=False,
        overlap_grad_reduce=False,
        overlap_param_gather=False,
    )


def has_own_layout(parallel: ParallelConfig, teacher: TeacherConfig) -> bool:
    """Whether the teacher's ranks, or their places on the mesh axes, differ from the student's."""
    resolved = teacher_parallel(parallel, teacher)
    return _is_given(teacher) and (
        teacher.ranks == "dedicated"
        or resolved.sequence_parallel != parallel.sequence_parallel
        or any(
            getattr(resolved, key) != getattr(parallel, key)
            for key in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
        )
    )


def num_teacher_ranks(parallel: ParallelConfig, teacher: TeacherConfig) -> int:
    """Ranks dedicated to teachers; they are the last of the world."""
    if teacher.ranks != "dedicated":
        return 0
    return teacher_parallel(parallel, teacher).model_ranks * teacher.data_parallel_size


def teacher_words(parallel: ParallelConfig, teacher: TeacherConfig, student_ranks: int) -> str:
    """A teacher's own layout, in words.

    >>> own = TeacherConfig(model="a", ranks="dedicated", data_parallel_size=2)
    >>> teacher_words(ParallelConfig(), own, 4)
    'TP 1 x PP 1 x DP 2 on 2 ranks of its own'
    """
    own = num_teacher_ranks(parallel, teacher)
    layout = teacher_parallel(parallel, teacher).describe(own or student_ranks)
    return f"{layout} on {own} rank{'s' * (own > 1)} of its own" if own else f"{layout} on the same ranks"


def fewest_ranks(parallel: ParallelConfig, teacher: TeacherConfig) -> int:
    """Ranks of the smallest world that can run it: one copy of the student, plus the teacher's own ranks."""
    if teacher.ranks == "dedicated":
        return parallel.model_ranks + num_teacher_ranks(parallel, teacher)
    return math.lcm(parallel.model_ranks, teacher_parallel(parallel, teacher).model_ranks)


def _is_given(teacher: TeacherConfig) -> bool:
    return teacher.ranks == "dedicated" or any(value is not None for value in vars(teacher.parallel).values())
