"""Settings of the teacher, which scores the student's completions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from renio_megatron.config.tagged import Tagged
from renio_megatron.config.templates import FIELDS, check_template
from renio_megatron.config.validators import require_choice, require_positive
from renio_megatron.errors import ConfigError

_HERE, _WEIGHTS = __name__, "renio_megatron.megatron.teacher.weights"
TEACHER_KINDS: dict[str, str] = {
    "separate": f"{_HERE}:SeparateTeacher",
    "initial": f"{_HERE}:InitialTeacher",
    "ema": f"{_HERE}:EmaTeacher",
    "current": f"{_HERE}:CurrentTeacher",
}
"""Kind -> `module:class` of its settings."""

ROUTE_NAME = re.compile(r"[A-Za-z0-9_-]+")
"""Valid names of several teachers: they are used in dotted keys and in the names of metrics."""


@dataclass(frozen=True, kw_only=True)
class TeacherParallelConfig:
    """How ranks share the teacher. Its data-parallel size follows from the number of ranks; a teacher with a layout of
    its own has no context parallelism.

    Attributes:
        tensor_model_parallel_size, pipeline_model_parallel_size, sequence_parallel: as in `parallel`; null: the
            student's, where that is possible.
    """

    tensor_model_parallel_size: int | None = None
    pipeline_model_parallel_size: int | None = None
    sequence_parallel: bool | None = None

    def __post_init__(self) -> None:
        require_positive(
            "teacher.parallel",
            tensor_model_parallel_size=self.tensor_model_parallel_size,
            pipeline_model_parallel_size=self.pipeline_model_parallel_size,
        )


def _of(place: str, default: Any) -> Any:
    """A field that is a key only of the section `teacher`, or only of its routes."""
    return field(default=default, metadata={"of": place})


@dataclass(frozen=True, kw_only=True, init=False)
class TeacherConfig(Tagged):
    """The teacher, which scores the student's completions: `TeacherConfig(kind="ema", ema_decay=0.99)` makes the
    settings of `ema`.

    Several teachers are routes: each has its kind, the settings of that kind, and its view of a problem; all other
    settings of the section apply to all of them.

    Attributes:
        kind: `separate`, a frozen model of its own. All others are the student itself, reading the teacher's view of
            the prompt (`data.teacher_template`): `initial`, with the weights of the run's `model`: without its adapters
            (`lora.r`), or a frozen copy where the whole student is trained; `ema`, with a moving average of its
            trained parameters; `current`, with the weights of this step.
        bf16: dtype of the weights of a teacher that has its own; null: train.bf16.
        offload: `host`, the weights of a teacher that has its own are kept in (pinned) host memory between its passes,
            except the LM head, which the loss reads; null: they stay on the device.
        payload_device: where its final hidden states at completion tokens are kept for the loss: `device`, all of the
            step's; `host`, in pinned memory, one micro-batch's at a time on the device; `recompute`, nowhere: the
            teacher reads each micro-batch a second time.
        parallel: its layout, where it is not the student's.
        ranks: `colocated`, the student's ranks; `dedicated`, the last ranks of the world, which only score.
        data_parallel_size: copies of the teacher on dedicated ranks.
        routes: several teachers by name; data.teacher_key is the column that names one for each record.
        template, system, enable_thinking: a route's view of a problem; null: data.teacher_template,
            data.teacher_system, data.teacher_enable_thinking.
        view: name or file of a view in their place, as data.teacher_view.
    """

    SECTION: ClassVar[str] = "teacher"
    TAG: ClassVar[str] = "kind"
    VARIANTS: ClassVar[Mapping[str, str]] = TEACHER_KINDS
    weights: ClassVar[str] = ""
    """`module:function`, (settings, the student's `ModelPart` or None, builder of a model of the teacher's own) ->
    `TeacherWeights`."""
    is_averaged: ClassVar[bool] = False
    """Whether it is a moving average of the student, which a checkpoint must hold."""
    follows_student: ClassVar[bool] = False
    """Whether it changes as the student is trained."""

    kind: str = "separate"
    bf16: bool | None = _of("teacher", None)
    offload: str | None = _of("teacher", None)
    payload_device: str = _of("teacher", "device")
    parallel: TeacherParallelConfig = field(default_factory=TeacherParallelConfig, metadata={"of": "teacher"})
    ranks: str = _of("teacher", "colocated")
    data_parallel_size: int = _of("teacher", 1)
    routes: dict[str, TeacherConfig] = field(default_factory=dict, metadata={"of": "teacher"})
    template: str | None = _of("routes", None)
    system: str | None = _of("routes", None)
    view: str | None = _of("routes", None)
    enable_thinking: bool | None = _of("routes", None)

    @property
    def model(self) -> str | None:
        """Hugging Face directory of the teacher's own model; None: the student's."""
        return None

    @property
    def pretrained_checkpoint(self) -> str | None:
        """Megatron checkpoint with the weights of the teacher's own model, in place of its directory."""
        return None

    @property
    def adapter(self) -> str | None:
        """PEFT adapter that is merged into the weights of the teacher's own model."""
        return None

    def shares_student(self, *, has_adapters: bool) -> bool:
        """Whether it uses the student's modules; `has_adapters`: of the student only adapters are trained."""
        return True

    def __post_init__(self) -> None:
        require_choice("teacher.payload_device", self.payload_device, ("device", "host", "recompute"))
        require_choice("teacher.ranks", self.ranks, ("colocated", "dedicated"))
        require_positive("teacher", data_parallel_size=self.data_parallel_size)
        for name in self.routes:
            if not ROUTE_NAME.fullmatch(name):
                raise ConfigError(
                    f"teacher.routes: {name!r} cannot name a teacher. Names are of letters, digits, '_' and '-'; they "
                    "are what the column data.teacher_key holds."
                )
        if self.template is not None:
            check_template("teacher.template", self.template, FIELDS)
        if self.offload is not None:
            require_choice("teacher.offload", self.offload, ("host",))
            if self.payload_device == "recompute":
                raise ConfigError(
                    "teacher.offload=host with teacher.payload_device=recompute: the teacher would be moved to the "
                    "device for every micro-batch of the student. Choose payload_device=host, or offload=null."
                )

    @classmethod
    def variant(cls, tag: str, section: str = "") -> Any:
        """The class of a kind; an old name is refused with the new one."""
        section = section or cls.SECTION
        if tag == "self":
            raise ConfigError(
                f"{section}.kind=self is called initial now: the student as it started. Set {section}.kind=initial."
            )
        return super().variant(tag, section)


@dataclass(frozen=True, kw_only=True)
class SeparateTeacher(TeacherConfig):
    """A frozen model of its own.

    Attributes:
        model: its Hugging Face directory.
        pretrained_checkpoint: a Megatron checkpoint with its weights in place of those in `model`; see the student's.
        adapter: directory of a PEFT adapter that is merged into its weights as they are loaded.
    """

    weights: ClassVar[str] = f"{_WEIGHTS}:separate"

    kind: str = "separate"
    model: str | None = None
    pretrained_checkpoint: str | None = None
    adapter: str | None = None

    def shares_student(self, *, has_adapters: bool) -> bool:
        """Never: a separate teacher has weights of its own."""
        return False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model is None and not self.routes:
            raise ConfigError("teacher.kind=separate needs teacher.model, the teacher's Hugging Face directory.")
        if self.adapter is not None and self.pretrained_checkpoint is not None:
            raise ConfigError(
                "teacher.adapter with teacher.pretrained_checkpoint: an adapter is merged into Hugging Face's files "
                "alone. Merge it with PEFT and give the result as teacher.model, or leave one of the two out."
            )


@dataclass(frozen=True, kw_only=True)
class InitialTeacher(TeacherConfig):
    """The student with its initial weights, those of the run's `model`."""

    weights: ClassVar[str] = f"{_WEIGHTS}:initial"

    kind: str = "initial"

    def shares_student(self, *, has_adapters: bool) -> bool:
        """With adapters it is the student without them; otherwise it is a frozen copy."""
        return has_adapters


@dataclass(frozen=True, kw_only=True)
class EmaTeacher(TeacherConfig):
    """Teacher weights of kind=ema: a moving average of the student's.

    Attributes:
        ema_decay: after each step the average becomes this share of itself and the rest of the student.
    """

    weights: ClassVar[str] = f"{_WEIGHTS}:ema"
    is_averaged: ClassVar[bool] = True
    follows_student: ClassVar[bool] = True

    kind: str = "ema"
    ema_decay: float = 0.999

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.ema_decay < 1.0:
            raise ConfigError(
                f"teacher.ema_decay must lie in (0, 1); got {self.ema_decay}. With 0 the teacher is kind=current, "
                "with 1 it is kind=initial."
            )


@dataclass(frozen=True, kw_only=True)
class CurrentTeacher(TeacherConfig):
    """The student itself, with its current weights."""

    weights: ClassVar[str] = f"{_WEIGHTS}:current"
    follows_student: ClassVar[bool] = True

    kind: str = "current"
