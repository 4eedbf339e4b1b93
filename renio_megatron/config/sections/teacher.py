"""Settings of who scores the student's completions."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from renio_megatron.config.templates import FIELDS, check_template
from renio_megatron.config.validators import require_choice, require_positive
from renio_megatron.errors import ConfigError

TEACHER_KINDS = ("separate", "initial", "ema", "current")
"""Who may teach; `megatron/teacher/weights.py` has the table of what each is made of."""

ROUTE_NAME = re.compile(r"[A-Za-z0-9_-]+")
"""What several teachers may be called: the names stand in dotted keys and in the names of metrics."""


@dataclass(frozen=True, kw_only=True)
class TeacherParallelConfig:
    """How ranks share the teacher. Its data-parallel size is what remains of them; context parallelism is the student's
    alone, where the teacher has a layout of its own.

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


@dataclass(frozen=True, kw_only=True)
class TeacherRouteConfig:
    """One of several teachers: what it is made of, and how it sees a problem. What else there is to say of a teacher,
    `TeacherConfig` says of all of them.

    Attributes:
        kind, model, pretrained_checkpoint, adapter, ema_decay: as in `TeacherConfig`.
        template, enable_thinking: its view of a problem; null: data.teacher_template, data.teacher_enable_thinking.
    """

    kind: str = "separate"
    model: str | None = None
    pretrained_checkpoint: str | None = None
    adapter: str | None = None
    ema_decay: float = 0.999
    template: str | None = None
    enable_thinking: bool | None = None


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """Who scores the student's completions.

    All kinds but `separate` are the student itself, reading the teacher's view of the prompt (`data.teacher_template`).

    Attributes:
        kind: `separate`, a frozen model of its own; `initial`, the student as the run's `model` is: without its
            adapters (`lora.r`), or a frozen copy where the whole student is trained; `ema`, the moving average of the
            student's trained parameters, the others being the student's; `current`, the student of this step.
        model: Hugging Face directory of a separate teacher.
        pretrained_checkpoint: where its weights come from in place of `model`'s, see the student's.
        adapter: directory of a PEFT adapter that is merged into the separate teacher's weights as they are loaded.
        ema_decay: of `ema`: after each step the average becomes this share of itself and the rest of the student.
        bf16: dtype of the weights of a teacher that has its own; null: train.bf16.
        offload: `host`, the weights of a teacher that has its own wait in (pinned) host memory between its passes,
            except the LM head, which the loss reads; null: they stay on the device.
        payload_device: where its final hidden states at completion tokens wait for the loss: `device`, all of the
            step's; `host`, in pinned memory, one micro-batch's at a time on the device; `recompute`, nowhere: the
            teacher reads each micro-batch a second time.
        parallel: its layout, where it is not the student's.
        ranks: `colocated`, the student's; `dedicated`, the last ranks of the world, which only score.
        data_parallel_size: copies of the teacher on dedicated ranks.
        routes: several teachers by name; data.teacher_key is the column that names one for each record. Each has its
            own kind and model; dtype, layout, ranks and where anything waits are set here for all of them.
    """

    kind: str = "separate"
    model: str | None = None
    pretrained_checkpoint: str | None = None
    adapter: str | None = None
    ema_decay: float = 0.999
    bf16: bool | None = None
    offload: str | None = None
    payload_device: str = "device"
    parallel: TeacherParallelConfig = field(default_factory=TeacherParallelConfig)
    ranks: str = "colocated"
    data_parallel_size: int = 1
    routes: dict[str, TeacherRouteConfig] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_choice("teacher.payload_device", self.payload_device, ("device", "host", "recompute"))
        require_choice("teacher.ranks", self.ranks, ("colocated", "dedicated"))
        require_positive("teacher", data_parallel_size=self.data_parallel_size)
        if not self.routes:
            _check_one("teacher", self)
        for name, route in self.routes.items():
            if not ROUTE_NAME.fullmatch(name):
                raise ConfigError(
                    f"teacher.routes: {name!r} cannot name a teacher. Names are of letters, digits, '_' and '-'; they "
                    "are what the column data.teacher_key holds."
                )
            _check_one(f"teacher.routes.{name}", route)
            if route.template is not None:
                check_template(f"teacher.routes.{name}.template", route.template, FIELDS)
        if self.offload is not None:
            require_choice("teacher.offload", self.offload, ("host",))
            if self.payload_device == "recompute":
                raise ConfigError(
                    "teacher.offload=host with teacher.payload_device=recompute: the teacher would be moved to the "
                    "device for every micro-batch of the student. Choose payload_device=host, or offload=null."
                )


def _check_one(section: str, teacher: TeacherConfig | TeacherRouteConfig) -> None:
    """Raises `ConfigError` where a teacher cannot be made of what its section says."""
    if teacher.kind == "self":
        raise ConfigError(
            f"{section}.kind=self is called initial now: the student as it started. Set {section}.kind=initial."
        )
    require_choice(f"{section}.kind", teacher.kind, TEACHER_KINDS)
    if teacher.kind == "separate" and teacher.model is None:
        raise ConfigError(f"{section}.kind=separate needs {section}.model, the teacher's Hugging Face directory.")
    if teacher.adapter is not None and teacher.pretrained_checkpoint is not None:
        raise ConfigError(
            f"{section}.adapter with {section}.pretrained_checkpoint: an adapter is merged into Hugging Face's files "
            f"alone. Merge it with PEFT and give the result as {section}.model, or leave one of the two out."
        )
    if not 0.0 < teacher.ema_decay < 1.0:
        raise ConfigError(
            f"{section}.ema_decay must lie in (0, 1); got {teacher.ema_decay}. With 0 the teacher is kind=current, "
            "with 1 it is kind=initial."
        )
