"""Each notice, said by a real run into which its cause was put."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from renio_megatron.training.notices.observer import NOTICES
from tests.helpers.multiprocess import Ranks
from tests.megatron.notice_cases import PLANTED, said


@pytest.fixture(scope="module")
def rank() -> Iterator[Ranks]:
    ranks = Ranks(1)
    yield ranks
    ranks.close()


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_cause_is_said(rank: Ranks, tmp_path: Path, name: str) -> None:
    (found,) = rank(said, tmp_path, name)
    words = PLANTED[name][2]
    assert [text for text in found if text.startswith(words)], found
    assert len(found) == len(set(found)), "each once"


def test_all_but_one_are_planted() -> None:
    # The accuracy has two causes; no strategy that ships weighs every sequence 0, which is for other people's.
    assert len(PLANTED) == len(NOTICES)
