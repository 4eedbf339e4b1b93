"""Masks that are a function of the token: SplitMix64's published numbers, shards, shares, gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from renio_megatron.data.batching.collate import BatchLayout, collate, select_sequences
from renio_megatron.parallel.token_dropout import TokenDropout, token_keys
from renio_megatron.types import Prompt, Rollout
from tests.helpers.masks_by_hand import mask_by_hand, splitmix64

# Of the generator with seed 1234567, as its authors' C program prints them.
PUBLISHED = [
    6457827717110365317,
    3203168211198807973,
    9817491932198370423,
    4593380528125082431,
    16408922859458223821,
]
ROLLOUTS = [
    Rollout(Prompt(index, tuple(range(1, 2 + length)), (1,)), tuple(range(10, 11 + length)))
    for index, length in ((7, 3), (2**40, 5), (8, 1), (9, 4))
]


def test_the_words_are_the_published_ones():
    assert splitmix64(np.array(1234567, np.uint64), 5).tolist() == PUBLISHED
    words = np.array(PUBLISHED, np.uint64)
    lanes = torch.from_numpy(words.view(np.int16).astype(np.int64))
    for p in (0.1, 0.5, 0.9):
        mask = TokenDropout(p).mask(torch.tensor([1234567 ^ 99]), 99, range(20))[0]
        assert torch.equal(mask, lanes < round(p * 65536) - 32768)


def keys_of(layout: BatchLayout) -> dict[tuple[int, int], int]:
    """(prompt, position) -> key, of all micro-batches."""
    found = {}
    for batch in collate(ROLLOUTS, audience="student", batch_layout=layout):
        keys = token_keys(batch).transpose(0, 1)
        assert keys.shape == batch.token_ids.shape
        for place in (batch.sequence_of >= 0).nonzero().tolist():
            sequence, position = (int(of[tuple(place)]) for of in (batch.sequence_of, batch.position_ids))
            found[int(batch.prompt_index[sequence]), position] = int(keys[tuple(place)])
    return found


def test_a_tokens_key_is_the_same_however_sequences_are_arranged():
    whole = keys_of(BatchLayout(0, micro_batch_size=4))
    assert len(whole) == sum(2 * n + 1 for n in (3, 5, 1, 4)) == len(set(whole.values()))
    for layout in (BatchLayout(0, micro_batch_size=1), BatchLayout(0, max_tokens=20), BatchLayout(0, max_tokens=100)):
        assert keys_of(layout) == whole
    pieces = [keys_of(BatchLayout(0, max_tokens=64, cp_size=2, cp_rank=rank)) for rank in (0, 1)]
    assert not pieces[0].keys() & pieces[1].keys() and pieces[0] | pieces[1] == whole


def test_chosen_sequences_keep_their_prompts():
    (batch,) = collate(ROLLOUTS, audience="student", batch_layout=BatchLayout(0, micro_batch_size=4))
    chosen, _ = select_sequences(batch, torch.tensor([False, True, False, True]))
    assert chosen.prompt_index.tolist() == [2**40, 9]


@pytest.mark.parametrize(("features", "width"), [(range(12), 12), (range(6, 12), 12), (range(3, 6), 9), (range(5), 5)])
def test_a_shard_draws_its_part_of_the_row(features, width):
    (batch,) = collate(ROLLOUTS, audience="student", batch_layout=BatchLayout(0, micro_batch_size=4))
    mask = TokenDropout(0.3).mask(token_keys(batch), 2**62 + 5, features)
    for row, rollout in enumerate(ROLLOUTS):
        length = len(rollout.prompt.student_ids) + len(rollout.completion_ids) - 1
        expected = mask_by_hand(0.3, rollout.prompt.index, length, 2**62 + 5, width)
        assert np.array_equal(mask[:length, row].numpy(), expected[:, features.start : features.stop])


def test_shares_are_those_of_independent_coins():
    prompts = [Rollout(Prompt(index, (1,) * 64, (1,)), (2,)) for index in range(64)]
    (batch,) = collate(prompts, audience="student", batch_layout=BatchLayout(0, micro_batch_size=64))
    keys, p = token_keys(batch), 0.1
    first, second = (TokenDropout(p).mask(keys, stream, range(128)).double() for stream in (5, 6))
    count, deviation = first.numel(), (p * (1 - p)) ** 0.5

    def standard_errors(mask: torch.Tensor, other: torch.Tensor) -> float:
        return float(((mask - p) * (other - p)).sum()) / (deviation**2 * mask.numel() ** 0.5)

    assert abs(float(first.mean()) - p) < 4 * deviation / count**0.5
    for axis in range(3):  # positions, sequences, features
        assert abs(standard_errors(first, first.roll(1, axis))) < 4
    assert abs(standard_errors(first, second)) < 4
    for share in (first.mean((0, 1)), first.mean((1, 2)), first.mean((0, 2))):  # none is dropped more than the others
        assert float((share - p).abs().max()) < 5 * deviation / (count / len(share)) ** 0.5


def test_the_product_and_its_gradients_are_those_of_the_mask():
    generator = torch.Generator().manual_seed(3)
    x, weight, out = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((5, 2, 12), (3, 12), (5, 2, 3))
    )
    keys, dropout = torch.arange(10).reshape(2, 5).transpose(0, 1), TokenDropout(0.25)
    mine = [tensor.clone().requires_grad_() for tensor in (x, weight)]
    dropout.linear(mine[0], mine[1], keys, 11, 6).backward(out)
    theirs = [tensor.clone().requires_grad_() for tensor in (x, weight)]
    mask = dropout.mask(keys, 11, range(6, 18))
    assert 20 < int(mask.sum()) < 40
    product = torch.nn.functional.linear(theirs[0] * ~mask / 0.75, theirs[1])
    torch.testing.assert_close(dropout.linear(x, weight, keys, 11, 6), product, rtol=1e-14, atol=1e-14)
    product.backward(out)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-14, atol=1e-14)
    frozen = dropout.linear(mine[0], weight, keys, 11, 6)
    assert torch.autograd.grad(frozen.sum(), mine[0])[0].shape == x.shape


@pytest.mark.parametrize(("p", "keep"), [(0.05, 1 - 3277 / 65536), (1e-9, 1 - 1 / 65536), (1 - 1e-9, 1 / 65536)])
def test_the_share_is_rounded_to_what_is_drawn(p, keep):
    assert TokenDropout(p).keep == keep
