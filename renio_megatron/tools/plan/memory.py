"""Memory of every kind of rank of a run: permanent parts, and those that each phase of a step adds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from renio_megatron.config.schema import DistillationConfig
from renio_megatron.config.teachers import TeacherSpec
from renio_megatron.tools.plan.activations import tokens_bytes
from renio_megatron.tools.plan.models import PlannedModel
from renio_megatron.tools.plan.moe import left_bytes
from renio_megatron.tools.plan.parts import PlannedPart
from renio_megatron.tools.plan.student import PlannedStudent
from renio_megatron.tools.plan.teacher import PlannedOwnLayoutTeacher, PlannedSharedLayoutTeacher, PlannedTeacher
from renio_megatron.tools.plan.workload import Workload, bytes_per_value_of, ranks_of, workload

RESERVE = 0.1
"""Share of a GPU's memory that is left for what is not counted: CUDA's context, NCCL's buffers, gaps."""
HELD = (
    "parameters",
    "parameters in FP8",
    "gradients",
    "optimizer",
    "teacher's parameters",
    "teacher's average",
    "teacher's LM head",
    "gathered sequence",
    "routing of the last pass",
)
"""Parts that are held all the time, in the order of the report."""
PHASES = ("sampling", "teacher", "ordering", "exchange", "scores", "loss", "backward", "step")
"""Phases of a step, in order."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes on ranks that hold the same parts of both models; tensor, context and data ranks are alike.

    Attributes:
        student_stage, teacher_stage: the pipeline ranks of the two; None: it holds no part of that model.
        held: bytes of those of `HELD` that exist, by name.
        phases: bytes that each of `PHASES` adds, by name; those that add nothing are left out.
    """

    student_stage: int | None
    teacher_stage: int | None
    held: dict[str, int]
    phases: dict[str, dict[str, int]]

    @property
    def peak_phase(self) -> str:
        """The phase that adds most."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def peak(self) -> int:
        """Bytes at the largest moment."""
        return sum(self.held.values()) + sum(self.phases[self.peak_phase].values())


@dataclass(frozen=True)
class _Teaching:
    """One teacher of a run.

    Attributes:
        spec: its specification.
        model: the teacher.
        work: the workload of a step, where all sequences are this teacher's.
        readers: ranks that hold the teacher.
        places: the pipeline ranks of student and teacher on each rank of the job; None where it has no part of a model.
    """

    spec: TeacherSpec
    model: PlannedModel
    work: Workload
    readers: int
    places: list[tuple[int | None, int | None]]


def plan_memory(
    config: DistillationConfig,
    student: PlannedModel,
    teachers: Mapping[str, PlannedModel],
    world_size: int,
    *,
    fused_norm: bool = True,
) -> list[RankMemory]:
    """Memory of each kind of rank, in the order of the ranks; the largest decides.

    With several teachers each is assumed to score all of the step's sequences, since the assignment depends on the
    data. Their weights are held together; they score one after the other.

    Args:
        config: the recipe, checked against `world_size` and the models.
        student: with config.lora.
        teachers: by their names; the student for those that are the student.
        world_size: ranks of the job, those that only score included.
        fused_norm: as torch computes norms on CUDA; False on a CPU.
    """
    trainers = world_size - config.num_teacher_ranks
    vocab_size = min(model.architecture.vocab_size for model in (student, *teachers.values()))
    num_rows = student.architecture.vocab_size
    bytes_per_value, chunks = 2 if config.train.bf16 else 4, config.parallel.virtual_pipeline_model_parallel_size or 1
    teaching = []
    for spec in config.teachers:
        if spec.weights_of != spec.name:
            continue
        ranks = world_size if spec.num_ranks else trainers
        here = stages_of_ranks(config, spec, ranks) + [(None, None)] * (world_size - ranks)
        work = workload(config, spec, ranks, fused_norm=fused_norm)
        teaching.append(_Teaching(spec, teachers[spec.name], work, ranks_of(spec, ranks)[1], here))

    def student_part(stage: int) -> PlannedPart:
        return PlannedPart(student, config.parallel, vocab_size, num_rows, bytes_per_value, trainers, stage, chunks)

    def teacher_part(one: _Teaching, stage: int | None) -> PlannedPart | None:
        if stage is None:
            return None
        return PlannedPart(
            one.model, one.spec.parallel, vocab_size, num_rows, bytes_per_value_of(one.spec), one.readers, stage
        )

    found = []
    for places in dict.fromkeys(zip(*(one.places for one in teaching), strict=True)):
        mine = next((stage for stage, _ in places if stage is not None), None)
        parts = [teacher_part(one, stage) for one, (_, stage) in zip(teaching, places, strict=True)]
        found.append(_rank_memory(config, None if mine is None else student_part(mine), teaching, parts))
    return found


def stages_of_ranks(
    config: DistillationConfig, teacher: TeacherSpec, world_size: int
) -> list[tuple[int | None, int | None]]:
    """The pipeline ranks of student and teacher on each rank.

    Pipeline ranks are consecutive blocks of ranks: Megatron's outermost axis.
    """
    mine, theirs = config.parallel.pipeline_model_parallel_size, teacher.parallel.pipeline_model_parallel_size
    trainers, readers = ranks_of(teacher, world_size)
    if teacher.num_ranks:
        training = [(rank * mine // trainers, None) for rank in range(trainers)]
        return [*training, *((None, rank * theirs // readers) for rank in range(readers))]
    return [(rank * mine // world_size, rank * theirs // world_size) for rank in range(world_size)]


def _rank_memory(
    config: DistillationConfig,
    student: PlannedPart | None,
    teaching: Sequence[_Teaching],
    parts: Sequence[PlannedPart | None],
) -> RankMemory:
    """Memory of a rank that holds these parts, one for each teacher."""
    work = teaching[0].work
    learner = None if student is None else PlannedStudent(config, student, work)
    teachers = [
        _planned_teacher(config, one, part, learner)
        for one, part in zip(teaching, parts, strict=True)
        if part is not None or one.spec.has_own_layout
    ]
    held = {} if learner is None else learner.held()
    phases: dict[str, dict[str, int]] = {}
    for teacher in teachers:
        for label, size in teacher.held().items():
            held[label] = held.get(label, 0) + size
        for phase, sizes in teacher.phases().items():
            there = phases.setdefault(phase, {})
            there.update({label: max(size, there.get(label, 0)) for label, size in sizes.items()})
    held |= _left_over(student, teaching, parts)
    if learner is not None:
        phases["sampling"] = learner.sampling()
        phases |= learner.update(lambda in_use: max(teacher.payload(in_use) for teacher in teachers))
    own = [
        part.pipeline_rank
        for one, part in zip(teaching, parts, strict=True)
        if part is not None and one.spec.has_own_layout
    ]
    theirs = own or [part.pipeline_rank for part in parts if part is not None]
    return RankMemory(
        None if student is None else student.pipeline_rank,
        theirs[0] if theirs else None,
        {name: held[name] for name in HELD if name in held},
        {name: phases[name] for name in PHASES if name in phases},
    )


def _planned_teacher(
    config: DistillationConfig, one: _Teaching, part: PlannedPart | None, learner: PlannedStudent | None
) -> PlannedTeacher:
    if one.spec.has_own_layout:
        student = None if learner is None else learner.part
        return PlannedOwnLayoutTeacher(
            config, one.spec, part, student, one.work, hidden_size=one.model.architecture.hidden_size
        )
    assert part is not None
    assert learner is not None
    return PlannedSharedLayoutTeacher(config, one.spec, part, learner, one.work)


def _left_over(
    student: PlannedPart | None, teaching: Sequence[_Teaching], parts: Sequence[PlannedPart | None]
) -> dict[str, int]:
    """Bytes that Megatron keeps after passes: the buffer into which sequences are gathered, and the routers' results.

    Only products whose weight is trained gather into a buffer that stays.
    """
    found, forward = {}, teaching[0].work.student
    if student is not None and forward.shape.sequence_parallel and not student.model.is_frozen:
        found["gathered sequence"] = tokens_bytes(student.model, forward.shape)
    routed = 0 if student is None else left_bytes(student.model, forward.shape) * student.num_layers
    for one, part in zip(teaching, parts, strict=True):
        theirs = 0 if part is None else left_bytes(part.model, one.work.teacher.shape) * part.num_layers
        routed = max(routed, theirs) if one.spec.shares_student else routed + theirs
    if routed:
        found["routing of the last pass"] = routed
    return found
