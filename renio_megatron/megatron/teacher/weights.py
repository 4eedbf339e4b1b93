"""Teacher weights of each kind: a separate frozen model, or the student's modules with other values."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

from renio_megatron.config import TeacherConfig
from renio_megatron.config.sections.teacher import EmaTeacher
from renio_megatron.errors import ConfigError
from renio_megatron.megatron.model.build import ModelPart
from renio_megatron.megatron.model.lora import switched_off
from renio_megatron.parallel.vocab import LmHead

Averages = tuple[tuple[torch.nn.Parameter, torch.Tensor], ...]
"""fp32 averages that a checkpoint must hold, each with its parameter."""


class TeacherWeights:
    """Teacher weights as a separate frozen model; the base class of all kinds.

    Attributes:
        part: the modules of the teacher's passes.
        averages: averages of the trained parameters; empty except for `ema`.
    """

    averages: Averages = ()

    def __init__(self, part: ModelPart) -> None:
        """Freezes `part` permanently."""
        for chunk in part.chunks:
            chunk.requires_grad_(False)
        part.train(False)
        self.part = part

    @contextlib.contextmanager
    def activated(self) -> Iterator[None]:
        """Context in which `part` is the teacher, in evaluation mode; restored bit for bit afterwards. No gradient
        flows."""
        yield

    @property
    def head(self) -> LmHead:
        """The teacher's LM head, for its scores and for the loss, inside of `activated` and outside. Last stage
        only."""
        return self.part.head()

    def after_update(self, *, skipped: bool) -> None:
        """Updates the teacher after an optimizer step of the student; `skipped` where the step was skipped."""


class Offloaded(TeacherWeights):
    """Frozen teacher weights in host memory (pinned, with a GPU), except during `activated`.

    The LM head stays on the device: the loss reads it. Nothing is copied back, because nothing has changed.
    """

    def __init__(self, part: ModelPart) -> None:
        """Moves the weights off the device."""
        super().__init__(part)
        last = part.layout.pipeline.is_last
        head = part.head().weight if last else None
        self._waiting = [
            (parameter, self._on_host(parameter.data))
            for _, parameter in part.named_parameters()
            if parameter is not head
        ]
        self._leave()

    @contextlib.contextmanager
    def activated(self) -> Iterator[None]:
        """Context with the weights on the device, each in separate memory that is freed at the end."""
        try:
            for parameter, host in self._waiting:
                there = torch.empty_like(host, device=self.part.layout.device, pin_memory=False)
                parameter.data = there.copy_(host, non_blocking=True)
            yield
        finally:
            self._leave()

    def _leave(self) -> None:
        for parameter, host in self._waiting:
            parameter.data = host

    @staticmethod
    def _on_host(values: torch.Tensor) -> torch.Tensor:
        return torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda).copy_(values)


class LiveStudent(TeacherWeights):
    """Teacher weights of kind=current: the student as it is in this step, including the loss's LM head."""

    def __init__(self, part: ModelPart) -> None:
        """Leaves `part`, the student, unfrozen."""
        self.part = part

    @contextlib.contextmanager
    def activated(self) -> Iterator[None]:
        """Context in evaluation mode."""
        was_training = self.part.chunks[0].training
        self.part.train(False)
        try:
            yield
        finally:
            self.part.train(was_training)


class BaseModel(LiveStudent):
    """Teacher weights as the base model of the student's adapters; the LM head has no adapter."""

    @contextlib.contextmanager
    def activated(self) -> Iterator[None]:
        """Context with the adapters off."""
        with super().activated(), switched_off(self.part.chunks):
            yield


class MovingAverage(LiveStudent):
    """Teacher weights of kind=ema: a moving average of the student's trained parameters, initialized with the student.

    After each optimizer step average = decay x average + (1 - decay) x parameter, elementwise in fp32: a rank holds
    the average of its part of the model, in any layout, and data-parallel ranks hold the same. With the distributed
    optimizer the parameters are the gathered ones. The published implementation initializes lazily with the weights
    after its first step, and before that its teacher is the student: after k steps the two averages differ by decay^k
    times the change of the first step.
    """

    def __init__(self, part: ModelPart, decay: float) -> None:
        """Initializes the average with the current parameters. Every rank calls this at the same time.

        Raises:
            ConfigError: nothing is trained, on any rank.
        """
        super().__init__(part)
        self._decay = decay
        part.sync_params()
        trained = [parameter for _, parameter in part.trained_parameters()]
        count = torch.tensor(float(len(trained)), device=part.layout.device)
        dist.all_reduce(count)
        if not count:
            raise ConfigError(
                "teacher.kind=ema with a student of which nothing is trained: there is nothing to average. Choose "
                "teacher.kind=initial, or train something."
            )
        self.averages = tuple((one, one.detach().to(torch.float32, copy=True)) for one in trained)
        self._head: LmHead | None = None

    @contextlib.contextmanager
    def activated(self) -> Iterator[None]:
        """Context with the average in place of the trained parameters, in their dtype.

        Parameters point to other memory meanwhile; their own, in DDP's buffers, is not written to.
        """
        self.part.sync_params()  # afterwards there is nothing to gather into the parameters' own memory
        own = [parameter.data for parameter, _ in self.averages]
        try:
            for parameter, average in self.averages:
                parameter.data = average.to(parameter.dtype)
            with super().activated():
                yield
        finally:
            for (parameter, _), values in zip(self.averages, own, strict=True):
                parameter.data = values

    @property
    def head(self) -> LmHead:
        """The average's LM head where it is trained, cast once per step to the parameter's dtype."""
        if self._head is None:
            student = self.part.head()
            average = next((average for one, average in self.averages if one is student.weight), None)
            weight = student.weight.detach() if average is None else average.to(student.weight.dtype)
            self._head = LmHead(weight, student.shard)
        return self._head

    @torch.no_grad()
    def after_update(self, *, skipped: bool) -> None:
        """Updates the average, unless the step was skipped."""
        self._head = None
        if skipped:
            return
        self.part.sync_params()
        for parameter, average in self.averages:
            average.mul_(self._decay).add_(parameter, alpha=1.0 - self._decay)


Build = Callable[[], ModelPart]
"""() -> a separate model for the teacher."""


def separate(settings: TeacherConfig, student: ModelPart | None, build: Build) -> TeacherWeights:
    """Teacher weights of kind=separate: another model."""
    return _own(settings, build())


def initial(settings: TeacherConfig, student: ModelPart | None, build: Build) -> TeacherWeights:
    """Teacher weights of kind=initial: the student before training."""
    return BaseModel(student) if student and student.lora.r else _own(settings, build())


def ema(settings: EmaTeacher, student: ModelPart | None, build: Build) -> TeacherWeights:
    """Teacher weights of kind=ema: a moving average of the student's."""
    return MovingAverage(_required(student), settings.ema_decay)


def current(settings: TeacherConfig, student: ModelPart | None, build: Build) -> TeacherWeights:
    """Teacher weights of kind=current: those of the student."""
    return LiveStudent(_required(student))


def _own(settings: TeacherConfig, part: ModelPart) -> TeacherWeights:
    return TeacherWeights(part) if settings.offload is None else Offloaded(part)


def _required(student: ModelPart | None) -> ModelPart:
    assert student is not None  # `renio compare-precision`, which has none, rejects these kinds
    return student
