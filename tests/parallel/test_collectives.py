"""One rank does it, every rank learns how it went; small objects of every rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from renio_megatron.errors import ConfigError, DataError, Scope
from renio_megatron.parallel.collectives import any_rank, gather_objects, on_main_rank
from renio_megatron.parallel.layout import ParallelLayout


def _layout() -> ParallelLayout:
    return ParallelLayout(rank=dist.get_rank(), world_size=dist.get_world_size())


def _results() -> dict[str, Any]:
    layout, ran = _layout(), []
    found: dict[str, Any] = {
        "value": on_main_rank(layout, lambda: ran.append(layout.rank) or {"rank": layout.rank}),
        "ran": list(ran),
        "any": [any_rank(layout, layout.rank == rank) for rank in (0, 1, 7)],
        "gathered": gather_objects(("of", layout.rank)),
    }

    def fail() -> None:
        raise DataError(f"found by rank {layout.rank}") from OSError("the disk")

    try:
        on_main_rank(layout, fail)
    except DataError as error:
        found["error"] = (str(error), error.scope)
    pairs = dist.new_group([1, 0])
    found["of a group"] = gather_objects(layout.rank * 10, pairs)
    return found


def test_what_the_first_rank_does_is_known_to_all(two_ranks):
    for rank, found in enumerate(two_ranks(_results)):
        assert found == {
            "value": {"rank": 0},
            "ran": [0] if rank == 0 else [],
            "any": [True, True, False],
            "gathered": [("of", 0), ("of", 1)],
            "error": ("found by rank 0", Scope.ALL_RANKS),
            "of a group": [0, 10],
        }


def test_a_single_rank_needs_no_world():
    layout = ParallelLayout()
    assert on_main_rank(layout, lambda: 3) == 3
    assert any_rank(layout, True) and not any_rank(layout, False)
    assert gather_objects("mine") == ["mine"]
    with pytest.raises(ConfigError) as error:
        on_main_rank(layout, lambda: (_ for _ in ()).throw(ConfigError("no")))
    assert error.value.scope is Scope.ALL_RANKS
