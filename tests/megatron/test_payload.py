"""The teacher's hidden states on their way to the loss: each token's own, wherever they wait."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from renio_megatron.data.batching.collate import BatchLayout, collate
from renio_megatron.types import MicroBatch, Prompt, Rollout
from tests.helpers.multiprocess import run_ranks

LENGTHS = ((3, 9, 4), (8, 2, 1), (5, 21, 6), (2, 7, 9), (6, 6, 3))
"""Tokens of the student's prompt, the teacher's prompt, the completion."""
ROLLOUTS = [
    Rollout(Prompt(number, (1,) * student, (2,) * teacher), (3,) * completion)
    for number, (student, teacher, completion) in enumerate(LENGTHS)
]


def states_of(rollouts: list[Rollout]) -> torch.Tensor:
    """A hidden state that names its sequence and its place, for each completion token in the flat order [N, 2]."""
    return torch.tensor([[r.prompt.index, place] for r in rollouts for place in range(len(r.completion_ids))]).float()


def wrong_rows(arrangements: dict[str, Any]) -> dict[str, int]:
    """Rows that the loss would be given wrongly, by arrangement and way."""
    from renio_megatron.megatron.teacher.payload import RecomputedPayload, StoredPayload, align

    group = dist.group.WORLD if dist.is_initialized() else None
    place = {"cp_size": group.size(), "cp_rank": group.rank()} if group is not None else {}
    found = {}
    for name, sizes in arrangements.items():
        batch_layout = BatchLayout(0, **sizes, **place)
        student = collate(ROLLOUTS, audience="student", batch_layout=batch_layout)

        def rows_of(rollouts: list[Rollout], batch_layout: BatchLayout = batch_layout) -> tuple[list, list[MicroBatch]]:
            teacher = collate(rollouts, audience="teacher", batch_layout=batch_layout)
            return [states_of(rollouts)[batch.token_index] for batch in teacher], teacher

        def again(rollouts: list[Rollout], batch: MicroBatch, rows_of: Any = rows_of) -> torch.Tensor:
            return align(*rows_of(rollouts), [batch], group)[0]

        payloads = {
            "kept": StoredPayload(align(*rows_of(ROLLOUTS), student, group), torch.device("cpu")),
            "recomputed": RecomputedPayload(ROLLOUTS, student, again),
        }
        for way, payload in payloads.items():
            assert len(payload) == len(payload[:]) == len(student)
            pairs = zip(payload, student, strict=True)
            found[f"{name}, {way}"] = sum(
                int((rows != states_of(ROLLOUTS)[batch.token_index]).any(1).sum()) for rows, batch in pairs
            )
    return found


ARRANGEMENTS = {
    "one a row": {"micro_batch_size": 1},
    "three a micro-batch": {"micro_batch_size": 3},
    "packed": {"max_tokens": 34},
    "all in one": {"max_tokens": 200},
}


def test_each_row_is_its_tokens() -> None:
    found = wrong_rows(ARRANGEMENTS)
    assert found == dict.fromkeys(found, 0)
    assert len(found) == 8


@pytest.mark.timeout(200)
def test_each_row_is_its_tokens_on_context_ranks() -> None:
    for found in run_ranks(wrong_rows, 2, ARRANGEMENTS, timeout=120):
        assert found == dict.fromkeys(found, 0)
        assert len(found) == 8


def test_a_packing_in_which_the_views_differ_is_among_them() -> None:
    batch_layout = BatchLayout(0, max_tokens=34)
    orders = [
        torch.cat([batch.token_index for batch in collate(ROLLOUTS, audience=view, batch_layout=batch_layout)]).tolist()
        for view in ("student", "teacher")
    ]
    assert orders[0] != orders[1]
