"""Which sequences share a micro-batch, and which rank takes them."""

from __future__ import annotations

import random
from typing import Any

import pytest

from renio_megatron.data.batching.balance import balance
from renio_megatron.data.batching.collate import BatchLayout, collate
from renio_megatron.data.batching.packing import pack, share_out
from renio_megatron.parallel.layout import Axis
from renio_megatron.types import Prompt, Rollout
from tests.helpers.multiprocess import run_ranks


def _lengths(count: int) -> list[int]:
    draw = random.Random(0)
    return [draw.randint(10, 400) for _ in range(count)]


@pytest.mark.parametrize("max_tokens", [400, 1000, 5000, 10**6])
def test_every_sequence_is_in_one_pack_and_no_pack_is_too_long(max_tokens: int) -> None:
    lengths = _lengths(100)
    packs = pack(lengths, max_tokens)
    assert sorted(i for chosen in packs for i in chosen) == list(range(100))
    assert all(sum(lengths[i] for i in chosen) <= max_tokens for chosen in packs)
    assert len(packs) <= 1.15 * sum(lengths) / max_tokens + 1


@pytest.mark.parametrize("multiple", [2, 3, 4])
def test_interleaved_pipelines_get_a_multiple_of_packs(multiple: int) -> None:
    lengths = _lengths(24)
    packs = pack(lengths, 1000, multiple_of=multiple)
    assert len(packs) % multiple == 0
    assert all(packs)


def test_few_sequences_are_packed_one_by_one() -> None:
    assert pack([], 10) == []
    assert pack([10], 10, multiple_of=4) == [[0]]
    assert pack([10, 10, 10], 10) == [[0], [1], [2]]


@pytest.mark.parametrize(("cp_size", "sp_size"), [(1, 1), (1, 2), (2, 1), (2, 2), (4, 8)])
def test_packed_rows_compute_few_tokens_that_do_not_exist(cp_size: int, sp_size: int) -> None:
    rollouts = [Rollout(Prompt(i, (5,) * n, (5,) * n), (6,) * 24) for i, n in enumerate(_lengths(64))]
    exist = sum(len(rollout.prompt.student_ids) + len(rollout.completion_ids) - 1 for rollout in rollouts)
    packed = collate(rollouts, audience="student", batch_layout=BatchLayout(0, 1, 2048, sp_size, cp_size))
    computed = sum(batch.row_length for batch in packed)
    padded = collate(rollouts, audience="student", batch_layout=BatchLayout(0, 4, None, sp_size, cp_size))
    assert exist <= computed <= 1.05 * exist
    assert sum(batch.row_length * batch.num_sequences for batch in padded) > 1.5 * exist


def test_shares_of_equal_numbers_are_nearly_equal() -> None:
    costs = _lengths(64)
    shares = share_out(costs, 8, equal_numbers=True)
    assert sorted(i for share in shares for i in share) == list(range(64))
    assert {len(share) for share in shares} == {8}
    totals = [sum(costs[i] for i in share) for share in shares]
    assert max(totals) < 1.02 * sum(totals) / 8


def _exchange() -> dict[str, Any]:
    import torch.distributed as dist

    rank = dist.get_rank()
    axis = Axis(2, rank, dist.group.WORLD, (0, 1))
    # Rank 0 holds the four long ones.
    items = [f"{rank}{i}" for i in range(4)]
    costs = [100, 90, 80, 70] if rank == 0 else [4, 3, 2, 1]
    return {
        "alone": balance(items, costs, axis),
        "pairs": balance(items, costs, axis, unit=2),
        "odd": balance(items, costs, axis, unit=3),
    }


def test_ranks_exchange_until_they_have_as_much() -> None:
    first, second = run_ranks(_exchange, 2)
    # By hand, the costliest to the poorer rank each time: 100 | 90, 80 | then 70 makes 170 each | 4 | 3, 2 | 1.
    assert (first["alone"], second["alone"]) == (["00", "03", "10", "13"], ["01", "02", "11", "12"])
    # Pairs of neighbours stay together: (100, 90) and (80, 70) part.
    assert (first["pairs"], second["pairs"]) == (["00", "01", "12", "13"], ["02", "03", "10", "11"])
    # Groups of three do not divide four sequences: nothing moves.
    assert first["odd"] == ["00", "01", "02", "03"]


def test_a_single_rank_keeps_its_order() -> None:
    assert balance(["a", "b"], [1, 9], Axis()) == ["a", "b"]
