"""Canaries, values of a run's first step that show whether student, teacher, sampler and data fit together.

They are computed before the first update, from the step's own rollouts and from the teacher's targets for them; the
student reads its completions once more, forward-only, and a large teacher reads nothing again (one micro-batch three
times, where its hidden states are not kept).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import torch

from renio_megatron.config import HeadConfig, LossConfig
from renio_megatron.data.batching.collate import flat_completions, flat_logp, flat_positions
from renio_megatron.errors import ConfigError, Scope
from renio_megatron.parallel.layout import ParallelLayout
from renio_megatron.parallel.reductions import gather_batch
from renio_megatron.parallel.vocab import LmHead
from renio_megatron.training.canary_findings import BOUNDS, Expected, Finding, Level, Measured, findings
from renio_megatron.training.interfaces import Learner, ScoreMore
from renio_megatron.training.targets import LossInputs, TeacherTargets
from renio_megatron.types import MicroBatch, Rollout

logger = logging.getLogger(__name__)

_OF_BOTH = frozenset(("student_logp", "teacher_logp", "divergence"))
_PASS = ("student_logp", "teacher_logp", "divergence", "earlier", "later", "compared")


class Canaries:
    """Looks at a run's first step, and stops the run where it cannot be meant as it is."""

    def __init__(
        self,
        layout: ParallelLayout,
        loss: LossConfig,
        head: HeadConfig,
        expected: Expected,
        *,
        teacher_ends: Mapping[str, Collection[int]] | None = None,
        stops: bool = True,
        report: Callable[[str], None] | None = None,
    ) -> None:
        """Keeps what the step is compared with.

        Args:
            layout: this rank's place; the batch is shared over its data axis.
            loss, head: the divergence, and how logits are computed.
            expected: what is known of the run.
            teacher_ends: by the teachers' names, tokens that end a teacher's completions and not the student's.
            stops: raise an error for a fault; else it is a warning.
            report: called on the first rank with lines about what is as it should be.
        """
        # The bounds of the loss hide how far two distributions are apart.
        self._layout, self._loss, self._head = layout, replace(loss, entry_clip=None), head
        self._expected, self._teacher_ends = expected, teacher_ends or {}
        self._stops, self._report = stops, report

    def look(
        self, rollouts: Sequence[Rollout], batches: Sequence[MicroBatch], learner: Learner, targets: TeacherTargets
    ) -> list[Finding]:
        """Reports the findings of a step before its update. Collective.

        Args:
            rollouts, batches: this rank's, and its micro-batches.
            learner: the student.
            targets: the teacher's targets for them.

        Raises:
            ConfigError: a fault, on every rank the same, where canaries stop runs.
        """
        measured = self.measure(rollouts, batches, learner, targets)
        found = findings(measured, self._expected)
        if self._layout.is_main and self._report is not None:
            self._report(_table(found, measured))
        faults = "; ".join(f"{one.name}: {one.text}" for one in found if one.level is Level.FAULT)
        if faults and self._stops:
            raise ConfigError(
                f"the first step, before any update: {faults}. Nothing was learned. (canaries=warn goes on in spite of "
                "it.)",
                scope=Scope.ALL_RANKS,
            )
        for one in found if self._layout.is_main else ():
            if one.level is not Level.OK:
                logger.warning("the first step, %s: %s.", one.name, one.text.removesuffix("."))
        return found

    def measure(
        self,
        rollouts: Sequence[Rollout],
        batches: Sequence[MicroBatch],
        learner: Learner,
        targets: TeacherTargets,
    ) -> Measured:
        """The values of a step, equal on every rank; arguments as for `look`."""
        device = self._layout.device
        more = ScoreMore(_PASS, self._values_of(targets)) if targets.has_distribution else None
        token = {name: one.to(device).double() for name, one in learner.score(batches, more).items()}
        student, teacher = token["student_logp"], targets.logp.to(device).double()
        known = torch.ones_like(student) if targets.has_logp is None else targets.has_logp.to(device).double()
        owner = flat_completions(rollouts)[1].to(device)
        is_first = (flat_positions(rollouts).to(device) == 0).double()
        columns = {"tokens": torch.ones_like(student)}
        has_sampler = all(rollout.logp is not None for rollout in rollouts)
        if has_sampler:
            columns["gap"] = (student - flat_logp(rollouts).to(device)).abs()
        columns["first student"], columns["first teacher"] = is_first * known * student, is_first * known * teacher
        columns["firsts"], columns["rest"] = is_first * known, (1 - is_first) * known * (student - teacher)
        columns["rests"] = (1 - is_first) * known
        if more is not None:
            columns |= _compared(token, teacher, known, BOUNDS[self._expected.precision].logp)
        sums = torch.stack(list(columns.values()), dim=1)
        table = sums.new_zeros(len(rollouts), len(columns)).index_add_(0, owner, sums)
        whole = torch.tensor([self._whole(one) for one in rollouts], dtype=torch.float64, device=device)
        table = gather_batch(torch.cat([table, whole], dim=1), self._layout.data.group).cpu()
        names = (*columns, "ended", "inside", "same prompt")
        total = {name: float(value) for name, value in zip(names, table.sum(0), strict=True)}
        return _measured(total, len(table), has_sampler=has_sampler)

    def _values_of(
        self, targets: TeacherTargets
    ) -> Callable[[int, MicroBatch, torch.Tensor, LmHead], Mapping[str, torch.Tensor]]:
        """The values of `_PASS`; those of both models for the first micro-batch, 0 for the others."""

        def values_of(
            index: int, micro_batch: MicroBatch, hidden: torch.Tensor, head: LmHead
        ) -> Mapping[str, torch.Tensor]:
            nothing = hidden.new_zeros(len(micro_batch.target_ids), dtype=torch.float32)
            inputs = LossInputs(hidden, head, nothing, None, self._loss, self._head)
            if index:
                found = targets.token_inputs(frozenset(("student_logp",)), index, micro_batch, inputs)
                return {**dict.fromkeys(_PASS, nothing), **found}
            found = {**targets.token_inputs(_OF_BOTH, index, micro_batch, inputs), "compared": nothing + 1}
            for name, shift in (("earlier", -1), ("later", 1)):  # the student's rows are moved: it is the same
                moved = replace(inputs, hidden=hidden.roll(shift, 0))
                found[name] = targets.token_inputs(frozenset(("divergence",)), index, micro_batch, moved)["divergence"]
            return found

        return values_of

    def _whole(self, rollout: Rollout) -> tuple[bool, bool, bool]:
        """Whether it ended; holds, before its last token, an end of its teacher's own; has one prompt for both."""
        ends = self._teacher_ends.get(rollout.prompt.teacher, ())
        is_inside = any(token in ends for token in rollout.drawn_ids[:-1])
        return rollout.finished, is_inside, rollout.prompt.student_ids == rollout.prompt.teacher_ids


def _compared(
    token: Mapping[str, torch.Tensor], teacher: torch.Tensor, known: torch.Tensor, close: float
) -> dict[str, torch.Tensor]:
    """Sums over the tokens at which both distributions were computed."""
    here = token["compared"]
    found = {"compared": here, "others": here * known * ((token["teacher_logp"] - teacher).abs() > close)}
    found |= {name: here * token[name] for name in ("divergence", "earlier", "later")}
    for name in ("earlier", "later"):
        found[f"{name} fall"] = found["divergence"] - found[name]
        found[f"{name} squares"] = found[f"{name} fall"].square()
    return found


def _measured(total: Mapping[str, float], sequences: int, *, has_sampler: bool) -> Measured:
    """Means and counts from sums over the batch."""
    tokens, compared = max(total["tokens"], 1), total.get("compared", 0.0)

    def mean(name: str, count: float) -> float:
        return total.get(name, 0.0) / max(count, 1)

    def standard_errors(name: str) -> float:
        fall = mean(f"{name} fall", compared)
        variance = max(mean(f"{name} squares", compared) - fall**2, 0.0)
        return fall / ((variance / max(compared - 1, 1)) ** 0.5 + 1e-12)

    earlier, later = mean("earlier", compared), mean("later", compared)
    return Measured(
        sequences=sequences,
        tokens=int(total["tokens"]),
        gap=total["gap"] / tokens if has_sampler else None,
        compared=int(compared),
        other_tokens=int(total.get("others", 0.0)),
        divergence=mean("divergence", compared),
        earlier=earlier,
        later=later,
        fall=standard_errors("earlier" if earlier < later else "later"),
        is_same_prompt=total["same prompt"] == sequences,
        first_student=mean("first student", total["firsts"]),
        first_teacher=mean("first teacher", total["firsts"]),
        rest=mean("rest", total["rests"]),
        ended=int(total["ended"]),
        inside=int(total["inside"]),
    )


def _table(found: Sequence[Finding], measured: Measured) -> str:
    """The findings that are as they should be, as lines of text."""
    lines = [f"the first step's {measured.sequences} completions, {measured.tokens:,} tokens, before the update:"]
    return "\n".join([*lines, *(f"  {one.name:<10}  {one.text}" for one in found if one.level is Level.OK)])
