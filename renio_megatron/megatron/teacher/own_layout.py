"""A frozen teacher with a layout of its own, on the student's ranks or on ranks that only score.

Four things travel, each as rows that are fetched by number (`parallel.exchange`): the sequences' tokens to the
teacher's replica that reads them; log-probabilities and hidden states of completion tokens to the ranks that train the
sequence; and, once, the LM head, cut at the student's vocabulary edges. Logits never do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from renio_megatron.config import HeadConfig, TrainConfig
from renio_megatron.data.batching.collate import collate
from renio_megatron.errors import NumericsError
from renio_megatron.losses.token_logp import linear_token_logp
from renio_megatron.megatron.model.build import ModelPart
from renio_megatron.megatron.model.schedules import run_forward, share_tokens
from renio_megatron.megatron.runtime.process_groups import Place
from renio_megatron.megatron.teacher.payload import Scattered, gather_pieces
from renio_megatron.megatron.teacher.rank_map import Agenda, Register, Seats
from renio_megatron.megatron.teacher.weights import Averages, TeacherWeights
from renio_megatron.models.architecture import Architecture
from renio_megatron.parallel.layout import Layout
from renio_megatron.parallel.row_exchange import RowExchange, RowsOf, gather_rows, sum_over
from renio_megatron.parallel.vocab import LmHead, VocabShard
from renio_megatron.parallel.worlds import Bridge
from renio_megatron.training.targets import HiddenStateTargets
from renio_megatron.types import MicroBatch, Prompt, Rollout

_GROUP, _ALL, _END = 0, 1, 2
"""What the student's ranks want: some sequences read; what was read of a step's; nothing more."""

HEAD_BYTES = 64 * 2**20
"""Of the LM head that a rank asks for at a time."""


@dataclass(frozen=True)
class Reader:
    """The teacher's weights on this rank, and the layout in which they are used."""

    weights: TeacherWeights
    place: Place | None  # None: its layout is the one in force

    @property
    def part(self) -> ModelPart:
        """Its modules."""
        return self.weights.part

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """The teacher's groups in force, and its weights where they are used."""
        with contextlib.nullcontext() if self.place is None else self.place.entered(), self.weights.in_place():
            yield


@dataclass
class _Heard:
    """Sequences that were read, and on a rank of the teacher's last stage what was kept: numbers, scores and states."""

    agenda: Agenda
    kept: list[tuple[torch.Tensor, ...]] = field(default_factory=list)


class DetachedTeacher:
    """Scores the student's completions in the teacher's layout.

    Every rank of either calls the same methods in the same order. A rank has a `reader` where it holds a part of the
    teacher, and a `student` where it trains.
    """

    def __init__(
        self,
        reader: Reader | None,
        student: Layout | None,
        seats: Seats,
        bridge: Bridge | None = None,
        *,
        architecture: Architecture,
        shard: VocabShard | None,
        train: TrainConfig,
        head: HeadConfig,
        dtype: torch.dtype,
        device: torch.device,
        temperature: float,
        pad_id: int,
        payload_device: str = "device",
    ) -> None:
        """Takes the teacher's LM head to where the student's is; several collectives.

        Args:
            reader: this rank's part of the teacher.
            student: this rank's place in the student.
            seats: everybody's.
            bridge: to the ranks that only score, where there are such ranks.
            architecture: the teacher's.
            shard: the columns of the student's LM head on this rank.
            train: how sequences share micro-batches.
            head: how logits are made.
            dtype: of the teacher's hidden states.
            device: where this rank computes.
            temperature: of the log-probabilities.
            pad_id: fills rows on the right.
            payload_device: `device` or `host`.
        """
        self._reader, self._student, self._seats, self._bridge = reader, student, seats, bridge
        self._head_config, self._temperature, self._payload_device = head, temperature, payload_device
        self._width, self._dtype, self._device = architecture.hidden_size, dtype, device
        if reader is not None:
            self._arrangement = reader.part.arrangement(
                pad_id, train.micro_batch_size, train.max_tokens_per_micro_batch
            )
        self._heard: list[_Heard] = []
        self._head = self._fetch_head(shard)

    averages: Averages = ()
    """What a checkpoint must hold of it: nothing, its weights never change."""

    def after_update(self, *, skipped: bool) -> None:
        """Nothing to do: the teacher does not follow the student."""

    @property
    def head(self) -> LmHead:
        """The LM head, cut at the student's columns; on the student's last stage."""
        assert self._head is not None
        return self._head

    def hear(self, rollouts: Sequence[Rollout]) -> None:
        """Lets ranks that only score read a part of a step's rollouts while the student draws the others.

        Without such ranks everything is read by `score`.

        Args:
            rollouts: some of this student rank's; every rank calls it equally often.
        """
        if self._bridge is not None:
            self._read(self._ask(_GROUP, rollouts), rollouts)

    def score(self, rollouts: Sequence[Rollout], student_batches: Sequence[MicroBatch]) -> HiddenStateTargets:
        """Log-probabilities of the sampled tokens, and the hidden states that the loss will want.

        Args:
            rollouts: this student rank's, all of them; of what was heard before, nothing is missing and nothing new.
            student_batches: the same as micro-batches, whose rows the payload follows.

        Raises:
            NumericsError: a log-probability is NaN or infinite.
        """
        student = self._student
        assert student is not None
        if not self._heard:
            self._read(self._ask(_GROUP, rollouts), rollouts)
        register, logp_of, states_of = self._found(self._ask(_ALL, rollouts))
        if not register.num_sequences:  # one of several teachers, of whose sequences there are none in this step
            return HiddenStateTargets(torch.zeros(0, device=self._device), [], self._head_of, sent_bytes=0)
        batches = list(student_batches) if student.pipeline.is_last else []
        first = register.first_completion_token(student.data.rank)
        pieces = [_piece(first + batch.token_index.cpu(), student) for batch in batches]
        exchange = RowExchange(pieces, register.scorer_of, self._seats.axis, self._device)
        logp = [exchange.fetch(number, logp_of, 1, torch.float32) for number in range(exchange.num_rounds)]
        whole = [
            gather_pieces(part, len(batch.token_index), student.tensor)[:, 0]
            for part, batch in zip(logp, batches, strict=False)
        ]
        flat = share_tokens(whole, student_batches, student)
        if not bool(torch.isfinite(flat).all()):
            raise NumericsError(
                f"rank {student.rank}: the teacher's log-probabilities hold NaN or infinity. "
                "Check the teacher's weights and precision."
            )
        before = exchange.bytes_sent
        states = [self._fetch_states(exchange, number, states_of) for number in range(exchange.num_rounds)]
        sent = sum_over(exchange.bytes_sent - before, self._seats.axis, self._device)
        if not batches:
            return HiddenStateTargets(flat, [], self._head_of, sent_bytes=sent)
        payload = Scattered(
            states[: len(batches)], [len(batch.token_index) for batch in batches], student.tensor, self._device
        )
        at_once = payload.piece_bytes if self._payload_device == "device" else [max(payload.piece_bytes)]
        waiting = sum(at_once) + max(payload.whole_bytes)
        return HiddenStateTargets(flat, payload, self._head_of, payload_bytes=waiting, sent_bytes=sent)

    def _head_of(self) -> LmHead:
        return self.head

    def tune(self, num_tokens: int) -> None:
        """Tunes the kernels that read the teacher's logits, where a rank has some; see `MegatronTeacher.tune`."""
        if self._reader is not None:
            self._reader.part.tune_scores(self._head_config, self._temperature, num_tokens)

    def serve(self) -> bool:
        """The teacher's side of a step, from the first `hear` to `score`; False, and no more, where nothing follows."""
        assert self._bridge is not None
        while True:
            self._bridge.wait_for_call()
            wish, sequences = self._announce(_END, [])
            if wish != _GROUP:
                break
            self._read(sequences, [])
        if wish == _END:
            return False
        register, logp_of, states_of = self._found(sequences)
        if not register.num_sequences:
            return True
        exchange = RowExchange([], register.scorer_of, self._seats.axis, self._device)
        for number in range(exchange.num_rounds):
            exchange.fetch(number, logp_of, 1, torch.float32)
        before = exchange.bytes_sent
        for number in range(exchange.num_rounds):
            exchange.fetch(number, states_of, self._width, self._dtype)
        sum_over(exchange.bytes_sent - before, self._seats.axis, self._device)
        return True

    def close(self) -> None:
        """Lets ranks that only score go; on every rank of the student."""
        if self._bridge is not None:
            self._ask(_END, [])

    def _ask(self, wish: int, rollouts: Sequence[Rollout]) -> list[torch.Tensor]:
        """The student's side of `_announce`: wakes ranks that only score, where there are such ranks."""
        if self._bridge is not None:
            self._bridge.call()
        return self._announce(wish, rollouts)[1]

    def _announce(self, wish: int, rollouts: Sequence[Rollout]) -> tuple[int, list[torch.Tensor]]:
        """(what the speakers want, every rank's sequences as of an `Agenda`); only speakers say any."""
        rows = [(one.prompt.index, len(one.prompt.teacher_ids), len(one.completion_ids)) for one in rollouts]
        speaks = self._seats.axis.rank in self._seats.speakers
        table = torch.tensor([(wish, 0, 0), *rows] if speaks else [], dtype=torch.int64, device=self._device)
        said = gather_rows(table.reshape(-1, 3), self._seats.axis)
        return int(said[self._seats.speakers[0]][0, 0]), [rows[1:] for rows in said]

    def _read(self, sequences: list[torch.Tensor], rollouts: Sequence[Rollout]) -> None:
        """The teacher's pass over its share of sequences; these rollouts are here. Results wait for `_found`."""
        reader, agenda = self._reader, Agenda(self._seats, sequences)
        self._heard.append(heard := _Heard(agenda))
        share = [] if reader is None else agenda.shares[reader.part.layout.data.rank]
        if not agenda.ids:
            return
        exchange = RowExchange([agenda.view_tokens(share)], agenda.speaker_of, self._seats.axis, self._device)
        tokens = exchange.fetch(0, self._tokens_of(agenda, rollouts), 1, torch.int64)[:, 0].tolist()
        if reader is None or not share:
            return
        micro_batches = [
            micro_batch.to(self._device)
            for micro_batch in collate(_sequences(agenda, share, tokens), view="teacher", arrangement=self._arrangement)
        ]
        part = reader.part

        def keep(index: int, micro_batch: MicroBatch, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
            logp = linear_token_logp(
                rows, part.head(), micro_batch.target_ids, self._head_config, self._temperature
            ).float()
            numbers = numbers_of[micro_batch.token_index.cpu()]
            mine = numbers % part.layout.tensor.size == part.layout.tensor.rank  # the others give the other rows
            where = mine.to(rows.device)
            return numbers[mine], logp[where][:, None], self._put(rows[where])

        numbers_of = agenda.completion_tokens(share)
        with reader.entered():
            heard.kept = run_forward(part, micro_batches, keep)

    def _found(self, sequences: list[torch.Tensor]) -> tuple[Register, RowsOf, RowsOf]:
        """Where a step's hidden states are; log-probabilities [n, 1] and hidden states [n, H] of this rank by number.

        What was heard is forgotten.
        """
        heard, self._heard = self._heard, []
        register = Register(self._seats, sequences, [one.agenda for one in heard])
        kept = [
            (register.renumbered(which, numbers), logp, states)
            for which, one in enumerate(heard)
            for numbers, logp, states in one.kept
        ]
        heard.clear()
        if not kept:
            return register, _nothing, _nothing
        numbers, order = torch.cat([numbers for numbers, _, _ in kept]).sort()
        tables = [torch.cat([values[column] for values in kept]) for column in (1, 2)]
        kept.clear()

        def rows_of(table: torch.Tensor) -> RowsOf:
            return lambda asked: table[order[torch.searchsorted(numbers, asked)].to(table.device)]

        return register, rows_of(tables[0]), rows_of(tables[1])

    def _tokens_of(self, agenda: Agenda, rollouts: Sequence[Rollout]) -> RowsOf:
        """Gives tokens of the teacher's view of this rank's sequences by number."""
        flat = [token for rollout in rollouts for token in (*rollout.prompt.teacher_ids, *rollout.completion_ids)]
        table = torch.tensor(flat, dtype=torch.int64)[:, None]
        first = 0 if self._student is None else agenda.first_view_token(self._student.data.rank)
        return lambda asked: table[asked - first]

    def _fetch_states(self, exchange: RowExchange, number: int, states_of: RowsOf) -> torch.Tensor:
        return self._put(exchange.fetch(number, states_of, self._width, self._dtype))

    def _put(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows where they wait."""
        if self._payload_device == "device":
            return rows
        waiting = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=rows.is_cuda)
        return waiting.copy_(rows)

    def _fetch_head(self, shard: VocabShard | None) -> LmHead | None:
        """The teacher's rows of the student's columns, on the student's last stage; zeros for padding."""
        student, reader, axis = self._student, self._reader, self._seats.axis
        row = [0, 0]
        if reader is not None and reader.part.layout.pipeline.is_last:
            row = [reader.part.shard.start, reader.part.shard.stop]
        edges = torch.stack([part[0] for part in gather_rows(torch.tensor([row], device=self._device), axis)]).cpu()
        first_replica = torch.tensor(self._seats.scorers[0])
        stops = edges[first_replica, 1].contiguous()
        is_wanted = student is not None and shard is not None and student.pipeline.is_last
        columns = torch.arange(shard.start, shard.start + shard.num_valid) if is_wanted and shard else torch.empty(0)
        at_once = max(1, HEAD_BYTES // (self._width * self._dtype.itemsize))
        rounds = list(columns.long().split(at_once)) if len(columns) else []
        exchange = RowExchange(
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


def _sequences(agenda: Agenda, share: list[int], tokens: list[int]) -> list[Rollout]:
    """A share's sequences from their tokens, one after the other."""
    result, start = [], 0
    for number in share:
        prompt, completion = agenda.lengths_of(number)
        ids = tuple(tokens[start : start + prompt])
        result.append(Rollout(Prompt(number, ids, ids), tuple(tokens[start + prompt : start + prompt + completion])))
        start += prompt + completion
    return result


def _piece(numbers: torch.Tensor, student: Layout) -> torch.Tensor:
    """What this tensor rank asks for; its peers ask for the rest."""
    size = -(-len(numbers) // student.tensor.size)
    return numbers[student.tensor.rank * size : (student.tensor.rank + 1) * size]
