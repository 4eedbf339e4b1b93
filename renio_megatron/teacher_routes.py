"""Several teachers as so many runs with one teacher each: whatever asks about a teacher, asks about one of them.

A config is a RunConfig, which is defined on top of these functions.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from renio_megatron.files import user_path
from renio_megatron.settings import TeacherConfig, TeacherParallelConfig, TeacherPrecisionConfig

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
