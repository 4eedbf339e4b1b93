"""Several teachers behind the interface of one; each scores the sequences that name it.

A sequence has one teacher, and the loss is a sum over sequences; so the loss of a micro-batch is the sum of its
teachers' losses over their rows, whatever their hidden sizes. Weights do not depend on it: they are normalized over the
batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from renio_megatron.data.batching.collate import select_sequences
from renio_megatron.parallel.layout import ParallelLayout
from renio_megatron.parallel.reductions import sum_over_ranks
from renio_megatron.training.interfaces import Teacher
from renio_megatron.training.targets import LossInputs, MicroBatchLoss, TeacherTargets
from renio_megatron.types import MicroBatch, Rollout


class MultiTeacher:
    """Teachers by name.

    Attributes:
        names: what `Prompt.teacher` may be, in order.
    """

    def __init__(self, teachers: Mapping[str, Teacher], same: Mapping[str, str]) -> None:
        """`same` maps each name to the one in `teachers` that has its weights."""
        self.names = tuple(same)
        self._teachers = teachers
        self._parts = list(teachers)
        self._part_of_name = {name: self._parts.index(first) for name, first in same.items()}

    def prefetch(self, rollouts: Sequence[Rollout]) -> None:
        """Does nothing: ranks that only score serve one teacher after the other."""

    def score(self, rollouts: Sequence[Rollout], student_batches: Sequence[MicroBatch]) -> MultiTeacherTargets:
        """Every teacher's targets for its own sequences; each is called, even where this rank has none for it."""
        part_of = torch.tensor([self._part_of_name[rollout.prompt.teacher] for rollout in rollouts])
        name_of = torch.tensor([self.names.index(rollout.prompt.teacher) for rollout in rollouts])
        lengths = torch.tensor([len(rollout.completion_ids) for rollout in rollouts])
        part_of_token = part_of.repeat_interleave(lengths)
        logp = torch.zeros(len(part_of_token))
        parts = []
        for number, name in enumerate(self._parts):
            here, tokens = part_of == number, part_of_token == number
            mine = [rollout for rollout, is_mine in zip(rollouts, here.tolist(), strict=True) if is_mine]
            chosen = _select(student_batches, here)
            batches = [_renumbered(one.micro_batch, here, tokens) for one in chosen.values()]
            targets = self._teachers[name].score(mine, batches)
            logp = logp.to(targets.logp.device)
            logp[tokens.to(logp.device)] = targets.logp
            parts.append(_Part(targets, chosen))
        return MultiTeacherTargets(logp, parts, self.names, name_of)

    @property
    def averages(self) -> tuple[tuple[Any, torch.Tensor], ...]:
        """The averages of all teachers, for a checkpoint."""
        return tuple(pair for teacher in self._teachers.values() for pair in teacher.averages)

    def after_update(self, *, skipped: bool) -> None:
        """Notifies every teacher."""
        for teacher in self._teachers.values():
            teacher.after_update(skipped=skipped)

    def tune(self, num_tokens: int) -> None:
        """Tunes every teacher's kernels."""
        for teacher in self._teachers.values():
            teacher.tune(num_tokens)

    def close(self) -> None:
        """Releases every teacher's ranks."""
        for teacher in self._teachers.values():
            teacher.close()


@dataclass(frozen=True)
class _Selection:
    """One teacher's sequences of a micro-batch: a micro-batch of them alone, their rows in the whole one, and its index
    among that teacher's micro-batches."""

    micro_batch: MicroBatch
    rows: torch.Tensor
    number: int


@dataclass(frozen=True)
class _Part:
    """One teacher's targets for its sequences on a rank, and the places of these in the student's micro-batches."""

    targets: TeacherTargets
    chosen: Mapping[int, _Selection]


class MultiTeacherTargets(TeacherTargets):
    """Several teachers' targets: the loss of a micro-batch is the sum of theirs over their rows."""

    def __init__(
        self, logp: torch.Tensor, parts: Sequence[_Part], names: tuple[str, ...], name_of: torch.Tensor
    ) -> None:
        """`logp` is each token's log-probability under its sequence's teacher; names with equal weights share a
        part."""
        self.logp, self.names, self.name_of = logp, names, name_of
        self._parts = parts
        self.has_distribution = all(part.targets.has_distribution for part in parts)
        self.payload_bytes = sum(part.targets.payload_bytes for part in parts)
        sent = [part.targets.sent_bytes for part in parts if part.targets.sent_bytes is not None]
        self.sent_bytes = sum(sent) if sent else None
        self._sums: torch.Tensor | None = None  # by name: of the divergence, and of tokens

    def token_inputs(
        self, wanted: frozenset[str], index: int, micro_batch: MicroBatch, inputs: LossInputs
    ) -> dict[str, torch.Tensor]:
        """Each teacher's inputs for its own rows, merged."""
        nothing = inputs.token_scale.new_zeros(len(micro_batch.target_ids))
        found = {name: nothing.clone() for name in wanted}
        for part in self._parts:
            if (chosen := part.chosen.get(index)) is None:
                continue
            rows = _rows_of(inputs, chosen.rows)
            values = part.targets.token_inputs(wanted, chosen.number, chosen.micro_batch, rows)
            for name in wanted:
                found[name][chosen.rows] = values[name].to(nothing)
        return found

    def micro_batch_loss(self, index: int, micro_batch: MicroBatch, inputs: LossInputs) -> MicroBatchLoss:
        """The sum of each teacher's loss over its own rows."""
        assert self.name_of is not None
        device = inputs.hidden.device
        if self._sums is None:
            self._sums = torch.zeros(len(self.names), 2, dtype=torch.float64, device=device)
        name_of = self.name_of.to(device)
        total = inputs.hidden.new_zeros((), dtype=torch.float32)
        divergence = inputs.token_scale.new_zeros(len(micro_batch.target_ids))
        found = []
        for part in self._parts:
            if (chosen := part.chosen.get(index)) is None:
                continue
            one = part.targets.micro_batch_loss(chosen.number, chosen.micro_batch, _rows_of(inputs, chosen.rows))
            found.append(one)
            total = total + one.total
            divergence[chosen.rows] = one.token_divergence.to(divergence)
            names = name_of[chosen.micro_batch.sequence_index][chosen.micro_batch.owner]
            tokens = one.token_divergence.double()
            self._sums.index_add_(0, names, torch.stack((tokens, torch.ones_like(tokens)), dim=1))
        clipped = [one.clipped_tokens for one in found if one.clipped_tokens is not None]
        probes = [one.probe for one in found if one.probe is not None]
        return MicroBatchLoss(
            total,
            divergence,
            loss_sum=sum((one.loss_sum for one in found), total.new_zeros((), dtype=torch.float64)),
            divergence_sum=sum((one.divergence_sum for one in found), total.new_zeros((), dtype=torch.float64)),
            clipped_tokens=torch.stack(clipped).sum() if clipped else None,
            probe=torch.stack(probes).sum(0) if probes else None,
        )

    def metrics(self, layout: ParallelLayout) -> dict[str, float]:
        """The mean divergence for each teacher's name, over all ranks; those without a token are left out."""
        mine = torch.zeros(len(self.names), 2, dtype=torch.float64) if self._sums is None else self._sums
        sums = sum_over_ranks(mine.to(layout.device), layout).tolist()
        return {
            f"teacher/{name}/kl": total / count for name, (total, count) in zip(self.names, sums, strict=True) if count
        }


def _select(student_batches: Sequence[MicroBatch], here: torch.Tensor) -> dict[int, _Selection]:
    """The selection in each micro-batch that has some of the sequences `here` [B], by micro-batch index."""
    found: dict[int, _Selection] = {}
    for index, batch in enumerate(student_batches):
        chosen = here.to(batch.sequence_index.device)[batch.sequence_index]
        if bool(chosen.any()):
            found[index] = _Selection(*select_sequences(batch, chosen), len(found))
    return found


def _rows_of(inputs: LossInputs, rows: torch.Tensor) -> LossInputs:
    """The inputs of some rows."""
    return replace(
        inputs,
        hidden=inputs.hidden[rows],
        token_scale=inputs.token_scale[rows],
        sampler_logp=None if inputs.sampler_logp is None else inputs.sampler_logp[rows],
        probe=None if inputs.probe is None else inputs.probe[rows],
    )


def _renumbered(batch: MicroBatch, sequences: torch.Tensor, tokens: torch.Tensor) -> MicroBatch:
    """The micro-batch reduced to the chosen sequences and tokens (two masks), renumbered from 0."""
    device = batch.token_index.device
    return replace(
        batch,
        sequence_index=_places(sequences, device)[batch.sequence_index],
        token_index=_places(tokens, device)[batch.token_index],
    )


def _places(chosen: torch.Tensor, device: torch.device) -> torch.Tensor:
    """For each position of a mask, the number of chosen ones before it."""
    return (chosen.long().cumsum(0) - 1).to(device)


def names_metrics(
    names: Sequence[str],
    name_of: torch.Tensor,
    weights: torch.Tensor,
    raw_weights: torch.Tensor | None,
    correct: torch.Tensor | None,
    unread: torch.Tensor | None = None,
) -> dict[str, float]:
    """Share of the sequences, mean weight, and where they are known ReNIO's mean raw weight, the accuracy and the share
    without an answer, for each teacher's name, from the whole batch's [B].

    >>> weights = torch.tensor([0.5, 1.5, 1.0, 1.0])
    >>> found = names_metrics(["math", "code"], torch.tensor([0, 0, 1, 0]), weights, None, None)
    >>> found["teacher/math/sequences_frac"], found["teacher/math/weight_mean"]
    (0.75, 1.0)
    """
    found = {}
    for number, name in enumerate(names):
        mine = name_of == number
        found[f"teacher/{name}/sequences_frac"] = float(mine.double().mean())
        if bool(mine.any()):
            found[f"teacher/{name}/weight_mean"] = float(weights[mine].mean())
            if raw_weights is not None:
                found[f"teacher/{name}/raw_weight_mean"] = float(raw_weights[mine].mean())
            if correct is not None:
                found[f"teacher/{name}/accuracy"] = float(correct[mine].double().mean())
            if unread is not None:
                found[f"teacher/{name}/no_answer_frac"] = float(unread[mine].double().mean())
    return found
