"""A request to stop while completions are drawn: one rank hears of it, and all give up, in every layout."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from renio_megatron.parallel import stopping
from renio_megatron.parallel.layout import ParallelLayout
from renio_megatron.parallel.stopping import StopPoints, StopRequest
from tests.helpers.multiprocess import Ranks
from tests.megatron.moe_cases import save_mixtures
from tests.megatron.stop_cases import LAYOUTS, PASSES, given_up


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_mixtures(folder)
    return folder


@pytest.mark.parametrize("heard_by", [0, -1], ids=["first rank", "last rank"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_all_ranks_give_up_soon_after_one_hears_of_it(
    models: Path, two_ranks: Ranks, four_ranks: Ranks, name: str, heard_by: int
) -> None:
    number, ranks = (4, four_ranks) if " " in name else (2, two_ranks)
    found = ranks(given_up, models, name, heard_by % number)
    # A teacher is told of each group, also of those that were given up; or of all at once, which is then never.
    assert {one["groups"] for one in found} == {0 if name in ("CP2", "EP2") else 8 // (2 * ("DP2" in name) or 1) // 2}
    for one in found:
        assert (one["outcome"], one["known"], one["signal"], one["again"]) == ("abandoned", True, 15, True)
        # The store is looked at five times a second, ranks agree as often, and a pass takes 20 ms.
        assert one["passes"] < 80
    assert max(one["passes"] for one in found) >= PASSES


def test_points_come_about_as_often_as_the_clock_says(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    agreed: list[int] = []
    tensor = torch.tensor
    monkeypatch.setattr(stopping.torch, "tensor", lambda *args, **more: agreed.append(number) or tensor(*args, **more))
    points = StopPoints(StopRequest(), ParallelLayout())
    for number in range(200):
        assert not points.reached()
        now[0] += 0.01 if number < 100 else 0.1
    # Twice as far each time, until 20 passes take 0.2 s; from the 100th on a pass takes ten times as long.
    assert agreed[:6] == [0, 1, 3, 7, 15, 31]
    apart = [after - before for before, after in itertools.pairwise(agreed)]
    assert all(18 <= one <= 20 for one, number in zip(apart, agreed, strict=False) if 15 < number < 80)
    assert set(apart[-5:]) <= {1, 2}


def test_without_a_request_nothing_is_ever_asked() -> None:
    points = StopPoints(None, ParallelLayout())
    assert not any(points.reached() for _ in range(1000))


def test_a_request_known_before_the_first_pass_ends_it() -> None:
    request = StopRequest()
    request.note(2)
    request.note(15)
    assert request.number == 2, "the first one counts"
    assert StopPoints(request, ParallelLayout()).reached()
