"""Who the teachers are, and how ranks share them.

Several are so many runs with one teacher each: whatever asks about a teacher, asks about one of them. A config is a
RunConfig, which is defined on top of these functions.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from renio_megatron.config import ParallelConfig, TeacherConfig, TeacherParallelConfig, TeacherPrecisionConfig
from renio_megatron.files import user_path

ONLY = ""
"""The name of a run's teacher where there is one."""


def setting_of(name: str, key: str) -> str:
    """The recipe's key of a teacher's setting.

    >>> setting_of(ONLY, "model"), setting_of("math", "model")
    ('teacher.model', 'teacher.routes.math.model')
    """
    return f"teacher.{key}" if name == ONLY else f"teacher.routes.{name}.{key}"


def shares_student(config: Any) -> bool:
    """Whether the only teacher is the student's own modules, and so has no weights of its own."""
    kind = config.teacher.kind
    return kind in ("ema", "current") or (kind == "initial" and config.lora.r is not None)


def single_teachers(config: Any) -> dict[str, Any]:
    """By name, for each of teacher.routes the same run with that teacher alone; a run with one teacher under `ONLY`.

    A teacher that is the student's modules has the student's layout and dtype, whatever the others have.
    """
    teacher: TeacherConfig = config.teacher
    if not teacher.routes:
        return {ONLY: config}
    found = {}
    for name, route in teacher.routes.items():
        own = {key: getattr(route, key) for key in ("kind", "model", "pretrained_checkpoint", "adapter", "ema_decay")}
        data = replace(
            config.data,
            teacher_key=None,
            **{
                f"teacher_{key}": value
                for key in ("template", "enable_thinking")
                if (value := getattr(route, key)) is not None
            },
        )
        one = replace(config, teacher=replace(teacher, routes={}, **own), data=data)
        if shares_student(one):
            students = replace(
                one.teacher,
                parallel=TeacherParallelConfig(),
                ranks="colocated",
                data_parallel_size=1,
                bf16=None,
                offload=None,
            )
            one = replace(one, teacher=students, teacher_precision=TeacherPrecisionConfig())
        found[name] = one
    return found


def same_weights(config: Any) -> dict[str, str]:
    """For each teacher's name the first one that has the same weights: those are loaded once.

    Two such teachers see problems differently, which is said with each prompt.
    """
    teachers = single_teachers(config)
    made_of = {name: _made_of(one.teacher) for name, one in teachers.items()}
    return {name: next(first for first, other in made_of.items() if other == mine) for name, mine in made_of.items()}


def _made_of(teacher: TeacherConfig) -> TeacherConfig:
    """What its weights follow from."""
    if teacher.kind != "ema":
        teacher = replace(teacher, ema_decay=TeacherConfig.ema_decay)
    if teacher.model is None:
        return teacher
    return replace(teacher, model=str(user_path(teacher.model).resolve()))


def teacher_parallel(parallel: ParallelConfig, teacher: TeacherConfig) -> ParallelConfig:
    """How ranks share the teacher: the student's layout, or the teacher's own.

    One of its own is neither interleaved nor context-parallel, and shares experts among its tensor ranks alone.
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
    """Whether the teacher's ranks, or their places, are others than the student's."""
    resolved = teacher_parallel(parallel, teacher)
    return _is_given(teacher) and (
        teacher.ranks == "dedicated"
        or resolved.sequence_parallel != parallel.sequence_parallel
        or any(
            getattr(resolved, key) != getattr(parallel, key)
            for key in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
        )
    )


def num_scorers(parallel: ParallelConfig, teacher: TeacherConfig) -> int:
    """Ranks that only score, which are the last of the world."""
    if teacher.ranks != "dedicated":
        return 0
    return teacher_parallel(parallel, teacher).model_ranks * teacher.data_parallel_size


def teacher_words(parallel: ParallelConfig, teacher: TeacherConfig, student_ranks: int) -> str:
    """A teacher's own layout, in words.

    >>> own = TeacherConfig(model="a", ranks="dedicated", data_parallel_size=2)
    >>> teacher_words(ParallelConfig(), own, 4)
    'TP 1 x PP 1 x DP 2 on 2 ranks of its own'
    """
    resolved, own = teacher_parallel(parallel, teacher), num_scorers(parallel, teacher)
    sizes = {
        f"TP {resolved.tensor_model_parallel_size}": True,
        "SP": resolved.sequence_parallel,
        f"PP {resolved.pipeline_model_parallel_size}": True,
        f"DP {(own or student_ranks) // resolved.model_ranks}": True,
    }
    layout = " x ".join(name for name, is_shown in sizes.items() if is_shown)
    return f"{layout} on {own} rank{'s' * (own > 1)} of its own" if own else f"{layout} on the same ranks"


def fewest_ranks(parallel: ParallelConfig, teacher: TeacherConfig | None) -> int:
    """Ranks of the smallest world that can run it: one copy of the student, and the teacher's."""
    if teacher is None:
        return parallel.model_ranks
    if teacher.ranks == "dedicated":
        return parallel.model_ranks + num_scorers(parallel, teacher)
    return math.lcm(parallel.model_ranks, teacher_parallel(parallel, teacher).model_ranks)


def _is_given(teacher: TeacherConfig) -> bool:
    return teacher.ranks == "dedicated" or any(value is not None for value in vars(teacher.parallel).values())
