"""Map of the ranks of a student and of a teacher in a separate layout, and location of a step's results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from renio_megatron.data.batching.packing import share_out
from renio_megatron.parallel.layout import Axis, ParallelLayout
from renio_megatron.parallel.row_exchange import gather_rows


@dataclass(frozen=True)
class RankMap:
    """The ranks of student and teacher, on one axis that holds them all.

    Attributes:
        axis: all ranks, each of the student, the teacher, or both.
        student_source_ranks: for each of the student's data-parallel replicas the rank that sends its sequences, [D].
        teacher_output_ranks: for each of the teacher's replicas the tensor ranks of its last stage, [R][T].
    """

    axis: Axis
    student_source_ranks: tuple[int, ...]
    teacher_output_ranks: tuple[tuple[int, ...], ...]

    @classmethod
    def of(
        cls, axis: Axis, student: ParallelLayout | None, teacher: ParallelLayout | None, device: torch.device
    ) -> RankMap:
        """The map from every rank's layouts; two collectives. A rank without student or teacher passes None for it."""
        row = [-1, -1, -1]
        if student is not None and student.tensor.is_first and student.context.is_first and student.pipeline.is_last:
            row[0] = student.data.rank
        if teacher is not None and teacher.pipeline.is_last:
            row[1:] = [teacher.data.rank, teacher.tensor.rank]
        places = torch.cat(gather_rows(torch.tensor([row], device=device), axis)).tolist()
        student_source_ranks = {place[0]: rank for rank, place in enumerate(places) if place[0] >= 0}
        teacher_output_ranks = {(place[1], place[2]): rank for rank, place in enumerate(places) if place[1] >= 0}
        replicas = 1 + max(replica for replica, _ in teacher_output_ranks)
        return cls(
            axis,
            tuple(student_source_ranks[replica] for replica in sorted(student_source_ranks)),
            tuple(
                tuple(teacher_output_ranks[key] for key in sorted(teacher_output_ranks) if key[0] == replica)
                for replica in range(replicas)
            ),
        )


class ScoringBatch:
    """Assignment of sequences to the teacher's replicas, and the location of their tokens.

    Sequences are numbered in the order of the student's replicas. Tokens of the teacher's view (prompt and completion)
    and completion tokens are also numbered in that order.

    Attributes:
        ids: ids of the sequences.
        shares: the sequences of each of the teacher's replicas, ascending.
        reader: the replica of each sequence, int64 [n].
        completion_starts: number of the first completion token of each sequence, and at the end the total.
    """

    def __init__(self, rank_map: RankMap, sequences: list[torch.Tensor]) -> None:
        """`sequences` of every rank, [n, 3]: id, prompt and completion tokens; only source ranks have rows."""
        self._rank_map = rank_map
        table, self._first = _table(rank_map, sequences)
        self.ids: list[int] = table[:, 0].tolist()
        self._lengths = [(prompt, completion) for prompt, completion in table[:, 1:].tolist()]
        costs = table[:, 1:].sum(1).tolist()
        self._view_starts = _starts(costs)
        self.completion_starts = _starts(table[:, 2].tolist())
        self.shares = _shares(costs, len(rank_map.teacher_output_ranks))
        self.reader = torch.empty(len(table), dtype=torch.int64)
        for replica, share in enumerate(self.shares):
            self.reader[share] = replica

    def source_of(self, view_tokens: torch.Tensor) -> torch.Tensor:
        """Ranks that hold tokens of the teacher's view, given their numbers [n]."""
        sequences = _which(view_tokens, self._view_starts)
        replicas = _which(sequences, self._first)
        return torch.tensor(self._rank_map.student_source_ranks)[replicas]

    def view_tokens(self, sequences: list[int]) -> torch.Tensor:
        """Numbers of all tokens of some sequences, concatenated."""
        return _ranges(self._view_starts, sequences)

    def completion_tokens(self, sequences: list[int]) -> torch.Tensor:
        """Numbers of all completion tokens of some sequences, concatenated."""
        return _ranges(self.completion_starts, sequences)

    def lengths_of(self, sequence: int) -> tuple[int, int]:
        """Numbers of prompt and completion tokens."""
        return self._lengths[sequence]

    def first_view_token(self, replica: int) -> int:
        """Number of the first token of a student's replica."""
        return self._view_starts[self._first[replica]]


class PayloadIndex:
    """Location of the hidden states of a step's sequences, which were scored in several batches.

    Sequences and completion tokens are numbered in the order of the student's replicas in training: they may have
    exchanged sequences since a batch was made.
    """

    def __init__(self, rank_map: RankMap, sequences: list[torch.Tensor], batches: Sequence[ScoringBatch]) -> None:
        """`sequences` as in `ScoringBatch`, of the whole step."""
        table, self._first = _table(rank_map, sequences)
        self._starts = _starts(table[:, 2].tolist())
        self._output_ranks = torch.tensor(rank_map.teacher_output_ranks)
        self._reader = torch.full((len(table),), -1, dtype=torch.int64)
        self._shift = torch.zeros(len(table), dtype=torch.int64)  # from a number here to that of its batch
        number_of = {sequence: number for number, sequence in enumerate(table[:, 0].tolist())}
        self._moves = []
        for batch in batches:
            numbers = torch.tensor([number_of[sequence] for sequence in batch.ids], dtype=torch.int64)
            shift = torch.tensor(batch.completion_starts[:-1], dtype=torch.int64) - torch.tensor(self._starts)[numbers]
            self._reader[numbers], self._shift[numbers] = batch.reader, shift
            self._moves.append((batch.completion_starts, shift))
        assert not len(table) or int(self._reader.min()) >= 0, "a sequence that no batch had"

    @property
    def num_sequences(self) -> int:
        """Sequences of the whole batch."""
        return len(self._reader)

    def output_rank_of(self, completion_tokens: torch.Tensor) -> torch.Tensor:
        """Ranks that hold the teacher's hidden states of completion tokens, given their numbers [n].

        All tensor ranks of a replica compute them; tokens are assigned to them in turn, by their numbers in the batch.
        """
        sequences = _which(completion_tokens, self._starts)
        turns = (completion_tokens + self._shift[sequences]) % self._output_ranks.shape[1]
        return self._output_ranks[self._reader[sequences], turns]

    def renumbered(self, batch: int, completion_tokens: torch.Tensor) -> torch.Tensor:
        """Numbers in this index of completion tokens, from their numbers in one of the batches, [n]."""
        starts, shift = self._moves[batch]
        return completion_tokens - shift[_which(completion_tokens, starts)]

    def first_completion_token(self, replica: int) -> int:
        """Number of the first completion token of a student's replica."""
        return self._starts[self._first[replica]]


def _table(rank_map: RankMap, sequences: list[torch.Tensor]) -> tuple[torch.Tensor, list[int]]:
    """(the sequences of all of the student's replicas [n, 3], number of each replica's first one)."""
    mine = [sequences[rank].cpu() for rank in rank_map.student_source_ranks]
    return torch.cat(mine), _starts([len(part) for part in mine])


def _shares(costs: list[int], count: int) -> list[list[int]]:
    """Sequences of each of the teacher's replicas, in equal numbers where that is possible."""
    if len(costs) < count:
        return [[number] for number in range(len(costs))] + [[] for _ in range(count - len(costs))]
    return share_out(costs, count, equal_numbers=len(costs) % count == 0)


def _starts(lengths: list[int]) -> list[int]:
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    return starts


def _which(numbers: torch.Tensor, starts: list[int]) -> torch.Tensor:
    """Index i of the range [starts[i], starts[i + 1]) of each number."""
    return torch.bucketize(numbers, torch.tensor(starts[1:]), right=True)


def _ranges(starts: list[int], which: list[int]) -> torch.Tensor:
    parts = [torch.arange(starts[number], starts[number + 1]) for number in which]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
