import pytest
import torch

from renio_megatron.data.batching.collate import BatchLayout, collate, flat_completions, flat_logp
from renio_megatron.errors import DataError
from renio_megatron.types import Prompt, Rollout


def rollout(prompt_ids, completion_ids, teacher_ids=None, logp=None, index=0):
    prompt = Prompt(index, prompt_ids, teacher_ids or prompt_ids)
    return Rollout(prompt, completion_ids, None if logp is None else torch.tensor(logp))


THREE = [
    rollout((5, 6), (7, 8), teacher_ids=(1, 2, 5, 6)),
    rollout((5,), (9,), teacher_ids=(1, 5)),
    rollout((4, 5, 6), (7, 7, 8), teacher_ids=(1, 2, 3, 4)),
]


def test_layout_by_hand():
    # Rows: (5,6,7), (5), (4,5,6,7,7): the longest has 5 tokens, rounded up to 6.
    first, second = collate(THREE, audience="student", batch_layout=BatchLayout(0, 2, sp_size=3))
    assert first.token_ids.tolist() == [[5, 6, 7, 0, 0, 0], [5, 0, 0, 0, 0, 0]]
    assert first.row_index.tolist() == [1, 2, 6]
    assert first.target_ids.tolist() == [7, 8, 9]
    assert first.owner.tolist() == [0, 0, 1]
    assert first.lengths.tolist() == [2, 1]
    assert first.position_ids.tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    assert second.token_ids.tolist() == [[4, 5, 6, 7, 7, 0]]
    assert second.row_index.tolist() == [2, 3, 4]
    assert second.target_ids.tolist() == [7, 7, 8]
    assert second.owner.tolist() == [0, 0, 0]


def test_both_views_have_the_same_targets_in_the_same_order():
    student = collate(THREE, audience="student", batch_layout=BatchLayout(0, 2))
    teacher = collate(THREE, audience="teacher", batch_layout=BatchLayout(0, 2))
    assert teacher[0].token_ids.tolist() == [[1, 2, 5, 6, 7, 0], [1, 5, 0, 0, 0, 0]]
    for one, other in zip(student, teacher, strict=True):
        assert torch.equal(one.target_ids, other.target_ids)
        assert torch.equal(one.owner, other.owner)


def test_every_target_follows_the_token_that_predicts_it():
    # A pad between prompt and completion, or a second shift, would break the chain of tokens.
    for batch in collate(THREE, audience="teacher", batch_layout=BatchLayout(0, 3)):
        flat = batch.token_ids.flatten()
        start = 0
        for row, length in enumerate(batch.lengths.tolist()):
            index = batch.row_index[start : start + length]
            targets = batch.target_ids[start : start + length]
            assert index.tolist() == list(range(index[0], index[0] + length))
            assert flat[index[0]] == THREE[row].prompt.teacher_ids[-1]
            assert torch.equal(flat[index[1:]], targets[:-1])
            start += length


def test_end_token_is_trained_where_it_is_the_padding_token():
    end = 2
    (batch,) = collate(
        [rollout((5,), (7, end)), rollout((5, 6, 5), (end,))], audience="student", batch_layout=BatchLayout(end, 2)
    )
    assert batch.target_ids.tolist() == [7, end, end]
    assert batch.lengths.tolist() == [2, 1]
    assert batch.token_ids.tolist() == [[5, 7, end], [5, 6, 5]]


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 5])
def test_micro_batches_of_any_size_hold_the_same_tokens(micro_batch_size):
    batches = collate(THREE, audience="student", batch_layout=BatchLayout(0, micro_batch_size))
    assert {batch.token_ids.shape[1] for batch in batches} == {5}
    assert torch.cat([batch.target_ids for batch in batches]).tolist() == [7, 8, 9, 7, 7, 8]
    assert sum(batch.num_sequences for batch in batches) == 3


def test_one_token_prompt_and_completion():
    (batch,) = collate([rollout((5,), (9,))], audience="student", batch_layout=BatchLayout(0, 1))
    assert (batch.token_ids.tolist(), batch.row_index.tolist(), batch.target_ids.tolist()) == ([[5]], [0], [9])


def test_nothing_predicts_the_first_token_of_an_empty_prompt():
    with pytest.raises(DataError, match="Prompt 3: the student's prompt is empty"):
        collate([rollout((), (1,), index=3)], audience="student", batch_layout=BatchLayout(0, 1))
    with pytest.raises(DataError, match="Prompt 3: the completion is empty"):
        collate([rollout((1,), (), index=3)], audience="student", batch_layout=BatchLayout(0, 1))


def test_flat_completions():
    token_ids, owner, lengths = flat_completions(THREE)
    assert token_ids.tolist() == [7, 8, 9, 7, 7, 8]
    assert owner.tolist() == [0, 0, 1, 2, 2, 2]
    assert lengths.tolist() == [2, 1, 3]
    assert {tensor.dtype for tensor in (token_ids, owner, lengths)} == {torch.int64}


def test_flat_logp():
    both = [rollout((1,), (2, 3), logp=[-1.0, -2.0]), rollout((1,), (2,), logp=[-0.5])]
    assert flat_logp(both).tolist() == [-1.0, -2.0, -0.5]
    assert flat_logp([]).dtype == torch.float32
    with pytest.raises(DataError, match=r"Prompt 4: 2 completion tokens .* got none"):
        flat_logp([rollout((1,), (2, 3), index=4)])
    with pytest.raises(DataError, match="got 1"):
        flat_logp([rollout((1,), (2, 3), logp=[-1.0])])


def test_packed_rows_by_hand():
    # Lengths 3, 1 and 5 in rows of at most 6: the longest goes first and alone, the others share a row.
    first, second = collate(THREE, audience="student", batch_layout=BatchLayout(0, max_tokens=6))
    assert first.token_ids.tolist() == [[5, 6, 7, 5]]
    assert first.position_ids.tolist() == [[0, 1, 2, 0]]
    assert first.boundaries == (0, 3, 4)
    assert first.row_index.tolist() == [1, 2, 3]
    assert first.target_ids.tolist() == [7, 8, 9]
    assert first.owner.tolist() == [0, 0, 1]
    assert first.sequence_index.tolist() == [0, 1]
    assert first.token_index.tolist() == [0, 1, 2]
    assert second.token_ids.tolist() == [[4, 5, 6, 7, 7]]
    assert second.boundaries == (0, 5)
    assert second.sequence_index.tolist() == [2]
    assert second.token_index.tolist() == [3, 4, 5]


def test_packed_rows_are_padded_at_their_end_for_sequence_parallelism():
    (batch,) = collate(THREE, audience="student", batch_layout=BatchLayout(0, max_tokens=99, sp_size=4))
    assert batch.token_ids.tolist() == [[5, 6, 7, 5, 4, 5, 6, 7, 7, 0, 0, 0]]
    assert batch.boundaries == (0, 3, 4, 12)


def test_a_sequence_that_no_packed_row_can_hold_is_named():
    with pytest.raises(DataError, match=r"Prompt 3: prompt and completion make 5 tokens, more than .*=4\. Raise it"):
        collate([rollout((1, 2, 3), (4, 5, 6), index=3)], audience="student", batch_layout=BatchLayout(0, max_tokens=4))


def test_context_ranks_hold_mirrored_chunks_by_hand():
    # Two ranks, so rows are a multiple of 4 long: (5,6,7,0) and (5,0,0,0). Rank 0 has positions 0 and 3.
    both = [
        collate(THREE[:2], audience="student", batch_layout=BatchLayout(0, 2, cp_size=2, cp_rank=rank))[0]
        for rank in range(2)
    ]
    assert [batch.token_ids.tolist() for batch in both] == [[[5, 0], [5, 0]], [[6, 7], [0, 0]]]
    assert [batch.position_ids.tolist() for batch in both] == [[[0, 3], [0, 3]], [[1, 2], [1, 2]]]
    # The first sequence's tokens are predicted at positions 1 and 2, the second's at position 0.
    assert [batch.row_index.tolist() for batch in both] == [[2], [0, 1]]
    assert [batch.target_ids.tolist() for batch in both] == [[9], [7, 8]]
    assert [batch.owner.tolist() for batch in both] == [[1], [0, 0]]
    assert [batch.token_index.tolist() for batch in both] == [[2], [0, 1]]
    assert all(batch.lengths.tolist() == [2, 1] and batch.row_length == 4 for batch in both)


@pytest.mark.parametrize("max_tokens", [None, 12, 40])
@pytest.mark.parametrize(("cp_size", "sp_size"), [(1, 1), (2, 1), (2, 2), (3, 2), (4, 3)])
@pytest.mark.parametrize("view", ["student", "teacher"])
def test_all_pieces_together_hold_every_completion_token_once(view, cp_size, sp_size, max_tokens):
    token_ids, _, _ = flat_completions(THREE)
    seen, rows = [], set()
    for rank in range(cp_size):
        batch_layout = BatchLayout(0, 2, max_tokens, sp_size, cp_size, rank)
        for batch in collate(THREE, audience=view, batch_layout=batch_layout):
            assert torch.equal(token_ids[batch.token_index], batch.target_ids)
            assert batch.token_ids.shape[1] % sp_size == 0
            assert batch.token_ids.shape[1] * cp_size == batch.row_length
            rows.add(batch.row_length)
            seen += batch.token_index.tolist()
            for place, owner, token in zip(batch.row_index, batch.owner, batch.token_index, strict=True):
                sequence = THREE[batch.sequence_index[owner]]
                ids = sequence.prompt.student_ids if view == "student" else sequence.prompt.teacher_ids
                earlier = int(token) - sum(len(one.completion_ids) for one in THREE[: batch.sequence_index[owner]])
                # The hidden state stands where the token before the predicted one was read.
                assert batch.position_ids.flatten()[place] == len(ids) - 1 + earlier
                assert batch.token_ids.flatten()[place] == (ids + sequence.completion_ids)[len(ids) - 1 + earlier]
    assert sorted(seen) == list(range(6))
    assert all(length % (2 * cp_size) == 0 for length in rows) or cp_size == 1
