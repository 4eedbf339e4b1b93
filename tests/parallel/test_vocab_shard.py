"""Which columns a rank holds where all hold equally many."""

from __future__ import annotations

import pytest
import torch.distributed as dist

import renio_megatron
from renio_megatron.errors import LayoutError
from renio_megatron.parallel.vocab import VocabShard


def _shards() -> list[tuple[int, int, int, int]]:
    group = dist.new_group([0, 1])
    found = [
        VocabShard.for_vocab(10, group),
        VocabShard.for_vocab(11, group),
        VocabShard.for_vocab(10, group, width=8),
        VocabShard.for_vocab(1, group),
    ]
    return [(one.start, one.stop, one.num_valid, one.group is group) for one in found]


def test_equal_shards_of_two_ranks(two_ranks):
    first, second = two_ranks(_shards)
    assert first == [(0, 5, 5, True), (0, 6, 6, True), (0, 8, 8, True), (0, 1, 1, True)]
    assert second == [(5, 10, 5, True), (6, 12, 5, True), (8, 16, 2, True), (1, 2, 0, True)]


def test_a_shard_that_is_the_whole_vocabulary():
    assert VocabShard.for_vocab(30) == VocabShard(0, 30, 30)
    assert VocabShard.for_vocab(30, width=32) == VocabShard(0, 32, 30)
    with pytest.raises(LayoutError, match="does not hold all 30 columns"):
        VocabShard.for_vocab(30, width=16)


def test_the_public_face_is_all_there():
    face = {name: getattr(renio_megatron, name) for name in renio_megatron.__all__}
    assert sorted(face) == sorted(renio_megatron._HOMES)
    assert all(callable(one) for one in face.values())
