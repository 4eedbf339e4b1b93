"""Protocol between a student and a teacher in a separate layout: requests, scoring passes, row exchange.

Four things are sent, each as rows that are fetched by number (`parallel.row_exchange`): the sequences' tokens to the
teacher's replica that reads them; log-probabilities and hidden states of completion tokens to the ranks that train the
sequence; and, once, the LM head, sharded at the student's vocabulary boundaries. Logits are never sent.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import torch

from renio_megatron.config import HeadConfig, TrainConfig
from renio_megatron.data.batching.collate import collate
from renio_megatron.losses.token_logp import linear_token_logp
from renio_megatron.megatron.model.build import ModelPart
from renio_megatron.megatron.model.schedules import run_forward
from renio_megatron.megatron.runtime.process_groups import Place
from renio_megatron.megatron.teacher.rank_map import PayloadIndex, RankMap, ScoringBatch
from renio_megatron.megatron.teacher.weights import TeacherWeights
from renio_megatron.parallel.layout import ParallelLayout
from renio_megatron.parallel.row_exchange import RowAllToAll, RowsOf, gather_rows
from renio_megatron.parallel.vocab import LmHead, VocabShard
from renio_megatron.parallel.worlds import WorldBridge
from renio_megatron.types import MicroBatch, Prompt, Rollout

HEAD_BYTES = 64 * 2**20
"""Bytes of the LM head that a rank requests at a time."""


class ScoringRequest(IntEnum):
    """Requests of the student's ranks to the teacher's."""

    READ = 0
    """Score some sequences."""
    COLLECT = 1
    """Return the results of a step's sequences."""
    END = 2
    """No more requests."""


@dataclass(frozen=True)
class Reader:
    """The teacher's weights on this rank, and their layout."""

    weights: TeacherWeights
    place: Place | None  # None: its layout is the current one

    @property
    def part(self) -> ModelPart:
        """The modules of the teacher on this rank."""
        return self.weights.part

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Context with the teacher's groups as the current ones, and its weights on the device."""
        with contextlib.nullcontext() if self.place is None else self.place.entered(), self.weights.activated():
            yield


@dataclass(frozen=True)
class ScoringSettings:
    """Settings of scoring, the same on all ranks.

    Attributes:
        hidden_size, dtype: of the teacher's hidden states.
        device: this rank's device.
        train: settings of micro-batches and packing.
        head: settings of logits.
        temperature: temperature of the log-probabilities.
        pad_id: token that pads rows on the right.
        payload_device: where hidden states are stored, `device` or `host`.
    """

    hidden_size: int
    dtype: torch.dtype
    device: torch.device
    train: TrainConfig
    head: HeadConfig
    temperature: float
    pad_id: int
    payload_device: str = "device"


@dataclass
class _Pending:
    """Scored sequences, and on a rank of the teacher's last stage their numbers, log-probabilities and hidden
    states."""

    batch: ScoringBatch
    kept: list[tuple[torch.Tensor, ...]] = field(default_factory=list)


class ScoringEndpoint:
    """One rank's part in the protocol. Every rank of student and teacher takes the same steps in the same order.

    A rank has a `reader` where it holds a part of the teacher, and a `student` where it trains.
    """

    def __init__(
        self,
        reader: Reader | None,
        student: ParallelLayout | None,
        rank_map: RankMap,
        settings: ScoringSettings,
        *,
        bridge: WorldBridge | None = None,
        shard: VocabShard | None = None,
    ) -> None:
        """Copies the teacher's LM head to the ranks with the student's; several collectives.

        Args:
            reader: this rank's part of the teacher.
            student: this rank's layout in the student.
            rank_map: map of all ranks.
            settings: settings of scoring.
            bridge: connection to dedicated teacher ranks, where there are any.
            shard: the columns of the student's LM head on this rank.
        """
        self._reader, self._student, self._rank_map, self._bridge = reader, student, rank_map, bridge
        self._settings, self._device = settings, settings.device
        self._width, self._dtype = settings.hidden_size, settings.dtype
        if reader is not None:
            self._batch_layout = reader.part.batch_layout(
                settings.pad_id, settings.train.micro_batch_size, settings.train.max_tokens_per_micro_batch
            )
        self._pending: list[_Pending] = []
        self._head = self._fetch_head(shard)

    def tune(self, num_tokens: int) -> None:
        """Tunes the kernels that read the teacher's logits, on ranks that compute them; see
        `SharedLayoutTeacher.tune`."""
        if self._reader is not None:
            self._reader.part.tune_scores(self._settings.head, self._settings.temperature, num_tokens)

    def _broadcast_request(self, request: int, rollouts: Sequence[Rollout]) -> tuple[int, list[torch.Tensor]]:
        """(request of the student's ranks, every rank's sequences as in `ScoringBatch`); only source ranks send any."""
        rows = [(one.prompt.index, len(one.prompt.teacher_ids), len(one.completion_ids)) for one in rollouts]
        speaks = self._rank_map.axis.rank in self._rank_map.student_source_ranks
        table = torch.tensor([(request, 0, 0), *rows] if speaks else [], dtype=torch.int64, device=self._device)
        said = gather_rows(table.reshape(-1, 3), self._rank_map.axis)
        return int(said[self._rank_map.student_source_ranks[0]][0, 0]), [rows[1:] for rows in said]

    def _read(self, sequences: list[torch.Tensor], rollouts: Sequence[Rollout]) -> None:
        """Runs the teacher over its share of sequences; `rollouts` are on this rank. `_collect` returns the results."""
        reader, batch = self._reader, ScoringBatch(self._rank_map, sequences)
        self._pending.append(pending := _Pending(batch))
        share = [] if reader is None else batch.shares[reader.part.layout.data.rank]
        if not batch.ids:
            return
        exchange = RowAllToAll([batch.view_tokens(share)], batch.source_of, self._rank_map.axis, self._device)
        tokens = exchange.fetch(0, self._tokens_of(batch, rollouts), 1, torch.int64)[:, 0].tolist()
        if reader is None or not share:
            return
        micro_batches = [
            micro_batch.to(self._device)
            for micro_batch in collate(
                _sequences(batch, share, tokens), audience="teacher", batch_layout=self._batch_layout
            )
        ]
        part = reader.part

        def keep(index: int, micro_batch: MicroBatch, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
            logp = linear_token_logp(
                rows, part.head(), micro_batch.target_ids, self._settings.head, self._settings.temperature
            ).float()
            numbers = numbers_of[micro_batch.token_index.cpu()]
            mine = numbers % part.layout.tensor.size == part.layout.tensor.rank  # the others give the other rows
            where = mine.to(rows.device)
            return numbers[mine], logp[where][:, None], self._put(rows[where])

        numbers_of = batch.completion_tokens(share)
        with reader.entered():
            pending.kept = run_forward(part, micro_batches, keep)

    def _collect(self, sequences: list[torch.Tensor]) -> tuple[PayloadIndex, RowsOf, RowsOf]:
        """(location of a step's hidden states, this rank's log-probabilities [n, 1] and hidden states [n, H] by
        number).

        Clears the pending results.
        """
        pending, self._pending = self._pending, []
        index = PayloadIndex(self._rank_map, sequences, [one.batch for one in pending])
        kept = [
            (index.renumbered(which, numbers), logp, states)
            for which, one in enumerate(pending)
            for numbers, logp, states in one.kept
        ]
        pending.clear()
        if not kept:
            return index, _nothing, _nothing
        numbers, order = torch.cat([numbers for numbers, _, _ in kept]).sort()
        tables = [torch.cat([values[column] for values in kept]) for column in (1, 2)]
        kept.clear()

        def rows_of(table: torch.Tensor) -> RowsOf:
            return lambda asked: table[order[torch.searchsorted(numbers, asked)].to(table.device)]

        return index, rows_of(tables[0]), rows_of(tables[1])

    def _tokens_of(self, batch: ScoringBatch, rollouts: Sequence[Rollout]) -> RowsOf:
        """A function that returns tokens of the teacher's view of this rank's sequences by number."""
        flat = [token for rollout in rollouts for token in (*rollout.prompt.teacher_ids, *rollout.completion_ids)]
        table = torch.tensor(flat, dtype=torch.int64)[:, None]
        first = 0 if self._student is None else batch.first_view_token(self._student.data.rank)
        return lambda asked: table[asked - first]

    def _put(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows on the device where they are stored."""
        if self._settings.payload_device == "device":
            return rows
        waiting = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=rows.is_cuda)
        return waiting.copy_(rows)

    def _fetch_head(self, shard: VocabShard | None) -> LmHead | None:
        """The teacher's LM-head rows for the student's columns, on the student's last stage; zeros for padding."""
        student, reader, axis = self._student, self._reader, self._rank_map.axis
        row = [0, 0]
        if reader is not None and reader.part.layout.pipeline.is_last:
            row = [reader.part.shard.start, reader.part.shard.stop]
        bounds = torch.stack([part[0] for part in gather_rows(torch.tensor([row], device=self._device), axis)]).cpu()
        first_replica = torch.tensor(self._rank_map.teacher_output_ranks[0])
        stops = bounds[first_replica, 1].contiguous()
        is_wanted = student is not None and shard is not None and student.pipeline.is_last
        columns = torch.arange(shard.start, shard.start + shard.num_valid) if is_wanted and shard else torch.empty(0)
        at_once = max(1, HEAD_BYTES // (self._width * self._dtype.itemsize))
        rounds = list(columns.long().split(at_once)) if len(columns) else []
        exchange = RowAllToAll(
            rounds, lambda rows: first_replica[torch.bucketize(rows, stops, right=True)], axis, self._device
        )

        def rows_of(asked: torch.Tensor) -> torch.Tensor:
            assert reader is not None
            return reader.part.head().weight.detach()[(asked - row[0]).to(self._device)]

        parts = [exchange.fetch(number, rows_of, self._width, self._dtype) for number in range(exchange.num_rounds)]
        if not is_wanted or shard is None:
            return None
        weight = torch.zeros(shard.width, self._width, dtype=self._dtype, device=self._device)
        if rounds:
            weight[: len(columns)] = torch.cat(parts[: len(rounds)])
        return LmHead(weight, shard)


def _nothing(asked: torch.Tensor) -> torch.Tensor:
    raise AssertionError(f"rows {asked.tolist()} were asked of a rank that has none")


def _sequences(batch: ScoringBatch, share: list[int], tokens: list[int]) -> list[Rollout]:
    """A share's sequences from their concatenated tokens."""
    result, start = [], 0
    for number in share:
        prompt, completion = batch.lengths_of(number)
        ids = tuple(tokens[start : start + prompt])
        result.append(Rollout(Prompt(number, ids, ids), tuple(tokens[start + prompt : start + prompt + completion])))
        start += prompt + completion
    return result
