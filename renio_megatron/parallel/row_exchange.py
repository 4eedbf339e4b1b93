"""Exchange of table rows between ranks by row number; each row is sent once, whatever the ranks' layouts.

Tensors go through the group's own methods and not through `torch.distributed`, because a group may span two separate
worlds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from renio_megatron.parallel.layout import Axis

RowsOf = Callable[[torch.Tensor], torch.Tensor]
"""Row numbers, int64 [n] -> the rows [n, width]."""


def gather_rows(rows: torch.Tensor, axis: Axis) -> list[torch.Tensor]:
    """Every rank's rows [n of the rank, width], in rank order; the ranks may have different numbers of them, or none.

    Two collectives. Meant for a few small rows: every rank gets all.
    """
    if axis.group is None or axis.size == 1:
        return [rows]
    counts = [rows.new_zeros(1) for _ in range(axis.size)]
    axis.group.allgather([counts], [rows.new_tensor([len(rows)])]).wait()
    lengths = [int(count) for count in counts]
    padded = rows.new_zeros(max(lengths), *rows.shape[1:])
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in range(axis.size)]
    if max(lengths):
        axis.group.allgather([gathered], [padded]).wait()
    return [part[:length] for part, length in zip(gathered, lengths, strict=True)]


class RowAllToAll:
    """All-to-all exchange of table rows: requests are exchanged once, the rows are then sent in rounds.

    Attributes:
        num_rounds: the same on every rank: the number of the rank with the most.
        bytes_sent: bytes sent from this rank to others so far.
    """

    def __init__(self, wanted: Sequence[torch.Tensor], holder_of: RowsOf, axis: Axis, device: torch.device) -> None:
        """Sends this rank's requests to the others; three collectives.

        Args:
            wanted: row numbers, int64 [n] for each round; this rank may have fewer rounds than others, or none.
            holder_of: row numbers [n] -> the rank of the axis that sends each row.
            axis: the ranks that take part.
            device: device of the sent and received tensors.
        """
        self.bytes_sent = 0
        self._axis, self._device = axis, device
        self.num_rounds = max(int(row) for row in gather_rows(torch.tensor([len(wanted)], device=device), axis))
        self._order: list[torch.Tensor] = []
        self._counts = torch.zeros(self.num_rounds, axis.size, dtype=torch.int64)
        asked: list[list[torch.Tensor]] = [[] for _ in range(axis.size)]
        for number, rows in enumerate(wanted):
            rows = rows.to("cpu")
            holders = holder_of(rows).to("cpu")
            order = holders.argsort(stable=True)
            self._order.append(order)
            self._counts[number] = torch.bincount(holders, minlength=axis.size)
            for rank, part in enumerate(rows[order].split(self._counts[number].tolist())):
                asked[rank].append(part)
        counts = self._exchange(self._counts.T.contiguous(), [1] * axis.size, [1] * axis.size)
        mine = torch.cat([part for parts in asked for part in parts] or [torch.empty(0, dtype=torch.int64)])
        theirs = self._exchange(mine[:, None], self._counts.sum(0).tolist(), counts.sum(1).tolist())[:, 0]
        # [rank][round]: this rank's rows that another rank requests in a round.
        self._given = [
            list(part.split(rounds))
            for part, rounds in zip(theirs.split(counts.sum(1).tolist()), counts.tolist(), strict=True)
        ]

    def fetch(self, number: int, rows_of: RowsOf, width: int, dtype: torch.dtype) -> torch.Tensor:
        """The rows that this rank requested in a round, in the order of its request: [n, width]; one collective.

        Every rank calls it, for each round in turn.

        Args:
            number: number of the round.
            rows_of: returns this rank's rows by their numbers; not called where no rank requests any.
            width, dtype: width and dtype of the rows, the same on every rank.
        """
        given = [rounds[number] for rounds in self._given]
        numbers = torch.cat(given)
        rows = rows_of(numbers) if len(numbers) else torch.empty(0, width, dtype=dtype)
        lengths = [len(part) for part in given]
        own = lengths[self._axis.rank]
        self.bytes_sent += (len(numbers) - own) * width * dtype.itemsize
        received = self._exchange(rows.to(dtype).contiguous(), lengths, self._counts[number].tolist(), keep=True)
        if number >= len(self._order):
            return received
        result = torch.empty_like(received)
        result[self._order[number].to(received.device)] = received
        return result

    def _exchange(
        self, rows: torch.Tensor, leaving: list[int], arriving: list[int], *, keep: bool = False
    ) -> torch.Tensor:
        """Sends rows [sum of leaving, width] to the ranks in order; returns those received, on the CPU unless `keep`.

        They are sent as bytes, because not every backend supports every dtype.
        """
        sent = rows.to(self._device)
        if self._axis.group is None or self._axis.size == 1:
            return sent if keep else sent.cpu()
        width = rows.shape[1]
        as_bytes = sent.flatten().view(torch.uint8).reshape(len(rows), width * rows.element_size())
        received = as_bytes.new_empty(sum(arriving), as_bytes.shape[1])
        self._axis.group.alltoall_base(received, as_bytes, arriving, leaving).wait()
        result = received.flatten().view(rows.dtype).reshape(len(received), width)
        return result if keep else result.cpu()


def sum_over(value: int, axis: Axis, device: torch.device) -> int:
    """Sum of an integer over the ranks; one collective."""
    return sum(int(part) for part in gather_rows(torch.tensor([value], device=device), axis))


def axis_of(group: dist.ProcessGroup) -> Axis:
    """All ranks of a group as an axis."""
    return Axis(group.size(), group.rank(), group, tuple(range(group.size())))
