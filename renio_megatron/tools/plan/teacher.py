"""Memory of the teacher on a rank, and of its hidden states until the loss."""

from __future__ import annotations

from typing import Protocol

from renio_megatron.config.schema import DistillationConfig
from renio_megatron.config.teachers import TeacherSpec
from renio_megatron.tools.plan.activations import forward_bytes
from renio_megatron.tools.plan.parts import PlannedPart
from renio_megatron.tools.plan.scoring import scoring_bytes, with_scales
from renio_megatron.tools.plan.student import PlannedStudent
from renio_megatron.tools.plan.workload import Workload


class PlannedTeacher(Protocol):
    """Memory of a teacher on one rank."""

    def held(self) -> dict[str, int]:
        """Bytes that are held all the time, by name."""

    def phases(self) -> dict[str, dict[str, int]]:
        """Bytes that the scoring phases add, from the forward pass until hidden states are stored for the loss."""

    def payload(self, in_use: bool) -> int:
        """Bytes of hidden states on this rank's device afterwards; `in_use`: while a micro-batch's loss reads
        them."""


class PlannedSharedLayoutTeacher:
    """A teacher in the student's layout (`megatron/teacher/shared_layout.py`): each rank scores what it trains."""

    def __init__(
        self,
        config: DistillationConfig,
        spec: TeacherSpec,
        part: PlannedPart,
        student: PlannedStudent,
        work: Workload,
    ) -> None:
        self._config, self._spec, self._part, self._student, self._work = config, spec, part, student, work
        self._row = part.model.architecture.hidden_size * part.bytes_per_value

    def held(self) -> dict[str, int]:
        """Bytes of its weights; none where it uses the student's modules."""
        teacher, student = self._spec.settings, self._student
        if teacher.kind == "initial" and student.part.model.is_frozen:
            return {"teacher's parameters": 0}
        if teacher.kind == "current":
            return {}
        if teacher.kind == "ema":  # in fp32, and the head that the loss reads where it is trained and narrower
            is_copied = self._part.bytes_per_value < 4 and not student.part.model.is_frozen
            return {"teacher's average": student.trained.count * 4 + (head_bytes(self._part) if is_copied else 0)}
        if teacher.offload is not None:
            return {"teacher's LM head": head_bytes(self._part)}
        return {"teacher's parameters": parameter_bytes(self._spec, self._part)}

    def phases(self) -> dict[str, dict[str, int]]:
        """Bytes of its pass, after which hidden states may have to be reordered for the student."""
        found = {"teacher": scoring_bytes(self._part, self._work.teacher, self._config.head)}
        if self._part.is_last:
            found["teacher"]["payload"] = self.payload(False)
        found["teacher"] |= self._moved()
        if self._part.is_last and self._work.is_realigned and self._spec.settings.payload_device == "device":
            copy = self._work.teacher.step_tokens * self._row
            found["ordering"] = {"payload": self.payload(False), "copy": copy}
        return found

    def payload(self, in_use: bool) -> int:
        """Bytes of the step's hidden states, or only of the micro-batch `in_use` with the memory to recompute them."""
        if not self._part.is_last:
            return 0
        kind, forward = self._spec.settings.payload_device, self._work.student
        if kind == "device":  # all of them, until the end of the step
            return forward.step_rows * self._row
        if not in_use:
            return 0
        again = forward_bytes(self._part.model, self._work.teacher.shape) if kind == "recompute" else 0
        return forward.rows * self._row + again

    def _moved(self) -> dict[str, int]:
        """Bytes of weights that a pass copies into place: the average in bf16, or offloaded weights."""
        if self._spec.settings.kind == "ema" and self._part.bytes_per_value < 4:
            return {"average in bf16": self._student.trained.count * self._part.bytes_per_value}
        return moved_bytes(self._spec, self._part)


class PlannedOwnLayoutTeacher:
    """A teacher in a separate layout (`megatron/teacher/own_layout.py`), on the student's ranks or on others."""

    def __init__(
        self,
        config: DistillationConfig,
        spec: TeacherSpec,
        part: PlannedPart | None,
        student: PlannedPart | None,
        work: Workload,
        *,
        hidden_size: int,
    ) -> None:
        """`part` or `student` is None on a rank without that model; `hidden_size` is the teacher's."""
        self._config, self._spec, self._part, self._student, self._work = config, spec, part, student, work
        self._row = hidden_size * work.teacher.shape.bytes_per_value
        self._waits_here = spec.settings.payload_device == "device"
        self._scores = part is not None and part.is_last
        self._trains = student is not None and student.is_last

    def held(self) -> dict[str, int]:
        """Bytes of the weights in the teacher's layout, and of a copy of the LM head sharded like the student's."""
        found, head = {}, 0
        if self._trains:
            assert self._student is not None
            head = self._student.width * self._row
        if self._part is not None and self._spec.settings.offload is None:
            found["teacher's parameters"] = parameter_bytes(self._spec, self._part)
        elif self._part is not None:  # its own head also stays
            head += head_bytes(self._part)
        return found | ({"teacher's LM head": head} if head else {})

    def phases(self) -> dict[str, dict[str, int]]:
        """Bytes of its pass, of one table with hidden states of all its sequences, and of their exchange."""
        found: dict[str, dict[str, int]] = {}
        if self._part is not None:
            found["teacher"] = scoring_bytes(self._part, self._work.teacher, self._config.head)
            if self._scores:
                found["teacher"]["hidden states"] = self._table
                if self._table:
                    found["ordering"] = {"hidden states": self._table, "copy": self._table}
            found["teacher"] |= moved_bytes(self._spec, self._part)
        exchange = {}
        if self._scores:
            exchange["hidden states"] = self._table
        if self._trains:
            exchange["payload"] = self.payload(False)
        if exchange:
            # Of one micro-batch: rows that this rank sends; rows that arrive, and a copy in the requested order.
            traveling = self._work.given_rows * self._scores + 2 * self._piece * self._trains
            found["exchange"] = exchange | {"rows on their way": traveling * self._row}
        return found

    def payload(self, in_use: bool) -> int:
        """Bytes of this tensor rank's pieces of the step, and of the micro-batch `in_use`, gathered from all ranks."""
        if not self._trains:
            return 0
        forward, tensor = self._work.student, self._config.parallel.tensor_model_parallel_size
        is_packed = self._config.train.max_tokens_per_micro_batch is not None
        shape = -(-forward.step_rows // tensor) if is_packed else forward.num_micro_batches * self._piece
        is_whole = tensor == 1 and self._waits_here
        used = forward.rows if in_use and not is_whole else 0
        return (shape * self._waits_here + used) * self._row

    @property
    def _piece(self) -> int:
        """Rows of a micro-batch that are stored on one of the student's tensor ranks."""
        return -(-self._work.student.rows // self._config.parallel.tensor_model_parallel_size)

    @property
    def _table(self) -> int:
        """Bytes of hidden states of all sequences that the teacher's replica read; each tensor rank keeps its part."""
        assert self._part is not None
        rows = -(-self._work.teacher.step_tokens // self._part.parallel.tensor_model_parallel_size)
        return rows * self._row if self._waits_here else 0


def parameter_bytes(teacher: TeacherSpec, part: PlannedPart) -> int:
    """Bytes of a separate teacher's weights; with FP8 they are stored in FP8 only, without a transposed copy."""
    precision = teacher.precision
    entries = part.fp8_entries(precision)
    return (part.tensors().count - entries) * part.bytes_per_value + with_scales(entries, precision.fp8_recipe)


def head_bytes(part: PlannedPart) -> int:
    """Bytes of the LM head on a rank of the last stage; elsewhere 0."""
    return part.width * part.model.architecture.hidden_size * part.bytes_per_value * part.is_last


def moved_bytes(teacher: TeacherSpec, part: PlannedPart) -> dict[str, int]:
    """Bytes of offloaded weights that a pass copies to the device: all but the LM head."""
    if teacher.settings.offload is None:
        return {}
    return {"teacher's parameters": part.tensors().count * part.bytes_per_value - head_bytes(part)}
