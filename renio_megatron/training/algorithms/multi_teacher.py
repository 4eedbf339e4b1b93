"""Several teachers, each of which scores the sequences that name it: one teacher's parts, put together.

A sequence has one teacher, and the loss is a sum over sequences; so the loss of a micro-batch is the sum of its
teachers' losses over their rows, whatever their hidden sizes. Weights know nothing of it: their mean is the batch's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from renio_megatron.parallel.layout import Layout
from renio_megatron.parallel.reductions import sum_over_ranks
from renio_megatron.parallel.vocab import LmHead
from renio_megatron.training.interfaces import StepLoss, Teacher
from renio_megatron.training.metrics.accumulator import Tally
from renio_megatron.types import MicroBatch, Rollout, TeacherScores


@dataclass(frozen=True)
class Part:
    """What one teacher says about its sequences of a rank.

    Attributes:
        teacher: who.
        scores: of its sequences alone, in their order.
        numbers: for each of the student's micro-batches that has sequences of this teacher, its number among those.
    """

    teacher: Teacher
    scores: TeacherScores
    numbers: Mapping[int, int]


@dataclass(frozen=True)
class RoutedScores:
    """What all teachers say about a rank's rollouts.

    Attributes:
        logp: log-probability of each sampled token under its sequence's teacher, nats fp32 [N].
        parts: of each teacher.
        part_of: number of each sequence's part, int64 [B].
        name_of: number of each sequence's teacher among the names, int64 [B]; names may share a part.
    """

    logp: torch.Tensor
    parts: tuple[Part, ...]
    part_of: torch.Tensor
    name_of: torch.Tensor


class RoutedTeachers:
    """Teachers by name.

    Attributes:
        names: what `Prompt.teacher` may be, in order.
    """

    def __init__(self, teachers: Mapping[str, Teacher], same: Mapping[str, str]) -> None:
        """`same` gives for each name the one in `teachers` that has its weights."""
        self.names = tuple(same)
        self._teachers = teachers
        self._parts = list(teachers)
        self._part_of_name = {name: self._parts.index(first) for name, first in same.items()}

    def hear(self, rollouts: Sequence[Rollout]) -> None:
        """Nothing: ranks that only score answer one teacher's questions after the other's."""

    def score(self, rollouts: Sequence[Rollout], student_batches: Sequence[MicroBatch]) -> RoutedScores:
        """Every teacher's scores of its own sequences; each is called, also where this rank has none for it."""
        part_of = torch.tensor([self._part_of_name[rollout.prompt.teacher] for rollout in rollouts])
        name_of = torch.tensor([self.names.index(rollout.prompt.teacher) for rollout in rollouts])
        lengths = torch.tensor([len(rollout.completion_ids) for rollout in rollouts])
        part_of_token = part_of.repeat_interleave(lengths)
        logp = torch.zeros(len(part_of_token))
        parts = []
        for number, name in enumerate(self._parts):
            here = part_of == number
            mine = [rollout for rollout, is_mine in zip(rollouts, here.tolist(), strict=True) if is_mine]
            tokens = part_of_token == number
            numbers: dict[int, int] = {}
            batches: list[MicroBatch] = []
            for index, batch in enumerate(student_batches):
                chosen = here.to(batch.sequence_index.device)[batch.sequence_index]
                if bool(chosen.any()):
                    numbers[index] = len(batches)
                    batches.append(_renumbered(batch.of_sequences(chosen)[0], here, tokens))
            scores = self._teachers[name].score(mine, batches)
            logp = logp.to(scores.logp.device)
            logp[tokens.to(logp.device)] = scores.logp
            parts.append(Part(self._teachers[name], scores, numbers))
        return RoutedScores(logp, tuple(parts), part_of, name_of)

    @property
    def averages(self) -> tuple[tuple[Any, torch.Tensor], ...]:
        """What a checkpoint must hold of all of them."""
        return tuple(pair for teacher in self._teachers.values() for pair in teacher.averages)

    def after_update(self, *, skipped: bool) -> None:
        """Tells every teacher."""
        for teacher in self._teachers.values():
            teacher.after_update(skipped=skipped)

    def tune(self, num_tokens: int) -> None:
        """Tunes every teacher's kernels."""
        for teacher in self._teachers.values():
            teacher.tune(num_tokens)

    def close(self) -> None:
        """Lets every teacher go."""
        for teacher in self._teachers.values():
            teacher.close()


class RoutedDivergence:
    """The loss of a micro-batch whose sequences have several teachers."""

    def __init__(
        self,
        scores: RoutedScores,
        names: Sequence[str],
        make: Callable[[Teacher, TeacherScores, Callable[[int, torch.Tensor], None]], StepLoss],
    ) -> None:
        """`make` gives the loss of one teacher: (teacher, scores, what is shown the divergence at each row)."""
        self._scores, self._names = scores, names
        self._losses = [make(part.teacher, part.scores, self._look) for part in scores.parts]
        self._divergence = torch.empty(0)
        self._sums = torch.zeros(len(names), 2, dtype=torch.float64)  # of the divergence, and of tokens

    def __call__(
        self, index: int, micro_batch: MicroBatch, hidden: torch.Tensor, head: LmHead
    ) -> tuple[torch.Tensor, float, Tally]:
        """(sum over sequences, number of sequences, metrics), of all teachers together."""
        total, share, tally = hidden.new_zeros((), dtype=torch.float32), 0.0, Tally()
        part_of = self._scores.part_of.to(hidden.device)[micro_batch.sequence_index]
        name_of = self._scores.name_of.to(hidden.device)[micro_batch.sequence_index]
        for number, (part, loss) in enumerate(zip(self._scores.parts, self._losses, strict=True)):
            if index not in part.numbers:
                continue
            chosen = part_of == number
            own, rows = micro_batch.of_sequences(chosen)
            value, count, counted = loss(part.numbers[index], own, hidden[rows], head)
            total, share = total + value, share + count
            tally.merge(counted)
            names = name_of[chosen][own.owner].cpu()
            self._sums[:, 0].index_add_(0, names, self._divergence.cpu().double())
            self._sums[:, 1] += torch.bincount(names, minlength=len(self._names))
        tally.add_max("memory/teacher_payload_mb", sum(p.scores.payload_bytes for p in self._scores.parts) / 2**20)
        sent = [part.scores.sent_bytes for part in self._scores.parts if part.scores.sent_bytes is not None]
        if sent:
            tally.add_max("teacher/payload_sent_mb", sum(sent) / 2**20)
        return total, share, tally

    def metrics(self, layout: Layout) -> dict[str, float]:
        """The mean divergence for each teacher's name, over all ranks; those without a token are left out."""
        sums = sum_over_ranks(self._sums.to(layout.device), layout).tolist()
        return {
            f"teacher/{name}/kl": total / count for name, (total, count) in zip(self._names, sums, strict=True) if count
        }

    def _look(self, index: int, divergence: torch.Tensor) -> None:
        self._divergence = divergence


def _renumbered(batch: MicroBatch, sequences: torch.Tensor, tokens: torch.Tensor) -> MicroBatch:
    """The micro-batch with its sequences and tokens counted among the chosen ones alone (two masks)."""
    device = batch.token_index.device
    return replace(
        batch,
        sequence_index=_places(sequences, device)[batch.sequence_index],
        token_index=_places(tokens, device)[batch.token_index],
    )


def _places(chosen: torch.Tensor, device: torch.device) -> torch.Tensor:
    """For each place of a mask how many are chosen before it."""
    return (chosen.long().cumsum(0) - 1).to(device)


def names_metrics(
    names: Sequence[str], name_of: torch.Tensor, raw_weights: torch.Tensor, correct: torch.Tensor | None
) -> dict[str, float]:
    """Share of the sequences, mean raw weight and accuracy for each teacher's name, from the whole batch's [B].

    >>> found = names_metrics(["math", "code"], torch.tensor([0, 0, 1, 0]), torch.tensor([1.0, 3.0, 2.0, 2.0]), None)
    >>> found["teacher/math/sequences_frac"], found["teacher/math/raw_weight_mean"]
    (0.75, 2.0)
    """
    found = {}
    for number, name in enumerate(names):
        mine = name_of == number
        found[f"teacher/{name}/sequences_frac"] = float(mine.double().mean())
        if bool(mine.any()):
            found[f"teacher/{name}/raw_weight_mean"] = float(raw_weights[mine].mean())
            if correct is not None:
                found[f"teacher/{name}/accuracy"] = float(correct[mine].double().mean())
    return found
