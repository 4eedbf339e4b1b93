"""Who sits where when student and teacher have layouts of their own: ranks of both, by what they hold."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from renio_megatron.parallel.exchange import gather_rows
from renio_megatron.parallel.layout import Axis, Layout
from renio_megatron.parallel.packing import share_out


@dataclass(frozen=True)
class Seats:
    """The ranks of student and teacher, on one axis that holds them all.

    Attributes:
        axis: all ranks, each a student's, a teacher's, or both.
        speakers: for each of the student's data-parallel replicas the rank that tells of its sequences, [D].
        scorers: for each of the teacher's replicas its last stage's tensor ranks, [R][T].
    """

    axis: Axis
    speakers: tuple[int, ...]
    scorers: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, axis: Axis, student: Layout | None, teacher: Layout | None, device: torch.device) -> Seats:
        """From every rank's places; two collectives. A rank that is no student, or no teacher, gives None."""
        row = [-1, -1, -1]
        if student is not None and student.tensor.is_first and student.context.is_first and student.pipeline.is_last:
            row[0] = student.data.rank
        if teacher is not None and teacher.pipeline.is_last:
            row[1:] = [teacher.data.rank, teacher.tensor.rank]
        places = torch.cat(gather_rows(torch.tensor([row], device=device), axis)).tolist()
        speakers = {place[0]: rank for rank, place in enumerate(places) if place[0] >= 0}
        scorers = {(place[1], place[2]): rank for rank, place in enumerate(places) if place[1] >= 0}
        replicas = 1 + max(replica for replica, _ in scorers)
        return cls(
            axis,
            tuple(speakers[replica] for replica in sorted(speakers)),
            tuple(tuple(scorers[key] for key in sorted(scorers) if key[0] == replica) for replica in range(replicas)),
        )


class Agenda:
    """Which of the teacher's replicas reads which sequence, and where everything of it is found.

    Sequences are counted over the whole batch, in the order of the student's replicas. Tokens of the teacher's view
    (prompt and completion) and completion tokens are counted in that order, too.

    Attributes:
        shares: the sequences of each of the teacher's replicas, ascending.
    """

    def __init__(self, seats: Seats, lengths: list[torch.Tensor]) -> None:
        """`lengths` of every rank's sequences, [n, 2]: prompt and completion tokens; the speakers' alone have rows."""
        self._seats = seats
        mine = [lengths[rank].cpu() for rank in seats.speakers]
        self._first = _starts([len(part) for part in mine])
        table = torch.cat(mine)
        self._prompts, self._completions = table[:, 0].tolist(), table[:, 1].tolist()
        self._view_starts = _starts(table.sum(1).tolist())
        self._completion_starts = _starts(self._completions)
        self.shares = _shares(table.sum(1).tolist(), len(seats.scorers))
        self._reader = torch.empty(len(table), dtype=torch.int64)
        for replica, share in enumerate(self.shares):
            self._reader[share] = replica
        self._scorers = torch.tensor(seats.scorers)

    @property
    def num_sequences(self) -> int:
        """Of the whole batch."""
        return len(self._prompts)

    def speaker_of(self, view_tokens: torch.Tensor) -> torch.Tensor:
        """The ranks that have tokens of the teacher's view, by number [n]."""
        sequences = _which(view_tokens, self._view_starts)
        replicas = _which(sequences, self._first)
        return torch.tensor(self._seats.speakers)[replicas]

    def scorer_of(self, completion_tokens: torch.Tensor) -> torch.Tensor:
        """The ranks that have the teacher's hidden states of completion tokens, by number [n].

        A replica's tensor ranks all have them; they take turns.
        """
        sequences = _which(completion_tokens, self._completion_starts)
        return self._scorers[self._reader[sequences], completion_tokens % self._scorers.shape[1]]

    def view_tokens(self, sequences: list[int]) -> torch.Tensor:
        """Numbers of all tokens of some sequences, one after the other."""
        return _ranges(self._view_starts, sequences)

    def completion_tokens(self, sequences: list[int]) -> torch.Tensor:
        """Numbers of all completion tokens of some sequences, one after the other."""
        return _ranges(self._completion_starts, sequences)

    def lengths_of(self, sequence: int) -> tuple[int, int]:
        """Prompt and completion tokens."""
        return self._prompts[sequence], self._completions[sequence]

    def first_view_token(self, replica: int) -> int:
        """Number of the first token of a student's replica."""
        return self._view_starts[self._first[replica]]

    def first_completion_token(self, replica: int) -> int:
        """Number of the first completion token of a student's replica."""
        return self._completion_starts[self._first[replica]]


def _shares(costs: list[int], count: int) -> list[list[int]]:
    """Sequences of each of the teacher's replicas: equally many where that is possible."""
    if len(costs) < count:
        return [[number] for number in range(len(costs))] + [[] for _ in range(count - len(costs))]
    return share_out(costs, count, equal_numbers=len(costs) % count == 0)


def _starts(lengths: list[int]) -> list[int]:
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    return starts


def _which(numbers: torch.Tensor, starts: list[int]) -> torch.Tensor:
    """Which range [starts[i], starts[i + 1]) each number lies in."""
    return torch.bucketize(numbers, torch.tensor(starts[1:]), right=True)


def _ranges(starts: list[int], which: list[int]) -> torch.Tensor:
    parts = [torch.arange(starts[number], starts[number + 1]) for number in which]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
