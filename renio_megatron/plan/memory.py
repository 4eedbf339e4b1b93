"""The memory of every kind of rank of a run: what is held throughout, and what each phase of a step adds."""

from __future__ import annotations

from dataclasses import dataclass

from renio_megatron.config import RunConfig
from renio_megatron.layout_rules import has_own_layout
from renio_megatron.plan.activations import tokens_bytes
from renio_megatron.plan.mixture import left_bytes
from renio_megatron.plan.models import PlannedModel
from renio_megatron.plan.parts import PlannedPart
from renio_megatron.plan.student import PlannedStudent
from renio_megatron.plan.teacher import AlikeTeacher, DetachedTeacher, PlannedTeacher
from renio_megatron.plan.workload import Workload, ranks_of, teacher_element, teacher_layout, workload
from renio_megatron.teacher_routes import shares_student

RESERVE = 0.1
"""Share of a GPU's memory that is left for what is not counted: CUDA's context, NCCL's buffers, gaps."""
HELD = (
    "parameters",
    "parameters in FP8",
    "gradients",
    "optimiser",
    "teacher's parameters",
    "teacher's average",
    "teacher's LM head",
    "gathered sequence",
    "routing of the last pass",
)
"""What is there all the time, in the order in which it is told."""
PHASES = ("sampling", "teacher", "ordering", "exchange", "scores", "loss", "backward", "step")
"""Of a step, one after the other."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes on ranks that hold the same parts of both models; tensor, context and data ranks are alike.

    Attributes:
        student_stage, teacher_stage: the pipeline ranks of the two; None: it holds no part of that model.
        held: those of `HELD` that are there, by name.
        phases: what each of `PHASES` adds, by name; those that add nothing are left out.
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


def plan_memory(
    config: RunConfig, student: PlannedModel, teacher: PlannedModel, world_size: int, *, fused_norm: bool = True
) -> list[RankMemory]:
    """What each kind of rank holds, in the order of the ranks; the largest decides.

    Args:
        config: the recipe, checked against `world_size` and the models.
        student, teacher: for teachers that are the student the same one twice; the student with config.lora.
        world_size: ranks of the job, those that only score included.
        fused_norm: as torch computes norms on CUDA; False on a CPU.
    """
    work = workload(config, world_size, fused_norm=fused_norm)
    trainers, readers = ranks_of(config, world_size)
    vocab_size = min(student.architecture.vocab_size, teacher.architecture.vocab_size)

    def student_part(stage: int) -> PlannedPart:
        chunks = config.parallel.virtual_pipeline_model_parallel_size or 1
        element = work.student.pieces.element
        return PlannedPart(student, config.parallel, vocab_size, element, trainers, stage, chunks)

    def teacher_part(stage: int) -> PlannedPart:
        return PlannedPart(teacher, teacher_layout(config), vocab_size, teacher_element(config), readers, stage)

    return [
        _rank_memory(
            config,
            None if mine is None else student_part(mine),
            None if theirs is None else teacher_part(theirs),
            work,
            hidden_size=teacher.architecture.hidden_size,
        )
        for mine, theirs in stages(config, world_size)
    ]


def stages(config: RunConfig, world_size: int) -> list[tuple[int | None, int | None]]:
    """The pipeline ranks of student and teacher that meet on a rank, each pair once, in the order of the ranks.

    Pipeline ranks are consecutive blocks of ranks: Megatron's outermost axis.
    """
    mine, theirs = config.parallel.pipeline_model_parallel_size, teacher_layout(config).pipeline_model_parallel_size
    if config.teacher.ranks == "dedicated":
        return [(stage, None) for stage in range(mine)] + [(None, stage) for stage in range(theirs)]
    return list(dict.fromkeys((rank * mine // world_size, rank * theirs // world_size) for rank in range(world_size)))


def _rank_memory(
    config: RunConfig, student: PlannedPart | None, teacher: PlannedPart | None, work: Workload, *, hidden_size: int
) -> RankMemory:
    """Of a rank that holds these parts; `hidden_size` is the teacher's."""
    scorer: PlannedTeacher
    learner = None if student is None else PlannedStudent(config, student, work)
    if has_own_layout(config.parallel, config.teacher):
        scorer = DetachedTeacher(config, teacher, student, work, hidden_size=hidden_size)
    else:
        assert teacher is not None
        assert learner is not None
        scorer = AlikeTeacher(config, teacher, learner, work)
    held = {} if learner is None else learner.held()
    held |= scorer.held() | _left_over(config, student, teacher, work)
    phases = scorer.phases()
    if learner is not None:
        phases |= {"sampling": learner.sampling(), **learner.update(scorer.payload)}
    return RankMemory(
        None if student is None else student.pipeline_rank,
        None if teacher is None else teacher.pipeline_rank,
        {name: held[name] for name in HELD if name in held},
        {name: phases[name] for name in PHASES if name in phases},
    )


def _left_over(
    config: RunConfig, student: PlannedPart | None, teacher: PlannedPart | None, work: Workload
) -> dict[str, int]:
    """What passes leave in Megatron's hands: the buffer into which sequences are gathered, and the routers' results.

    Only products whose weight is trained gather into a buffer that stays.
    """
    found = {}
    if student is not None and work.student.pieces.sequence_parallel and not student.model.is_frozen:
        found["gathered sequence"] = tokens_bytes(student.model, work.student.pieces)
    routed = [
        left_bytes(part.model, reading.pieces) * part.num_layers
        for part, reading in ((student, work.student), (teacher, work.teacher))
        if part is not None
    ]
    if any(routed):
        found["routing of the last pass"] = max(routed) if shares_student(config) else sum(routed)
    return found
