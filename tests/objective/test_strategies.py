"""Strategies of weights on one rank, by hand: what each weighs, what it is divided by, what several of them make."""

from __future__ import annotations

import math

import pytest
import torch

from renio_megatron.config import WeightingConfig
from renio_megatron.config.sections.combined_weighting import PermutedWeighting, ProductWeighting
from renio_megatron.config.sections.weighting import (
    LengthWeighting,
    RenioWeighting,
    StudentEntropyWeighting,
    UniformWeighting,
)
from renio_megatron.errors import ConfigError, LayoutError
from renio_megatron.losses.sample_weights import sample_weights
from renio_megatron.objective.weightings.strategy import seeded
from tests.fakes.strategies import CountedWeighting, GateWeighting, PrefixWeighting, SeenWeighting, ShareWeighting

OWNER = torch.tensor([0, 2, 0, 2, 1, 2])  # 2, 1 and 3 tokens, interleaved
ENTROPIES = [1.0, 0.0, 3.0, 0.0, 8.0, 0.0]  # 1 and 3; 8; nothing but zeros


def numbers(values):
    return torch.tensor(values, dtype=torch.float64)


def weigh(config, owner=OWNER, num_sequences=3, *, ratio=None, **inputs):
    """Of tokens whose log ratios are `ratio`; other inputs by name, lists being fp64."""
    zeros = torch.zeros(len(owner), dtype=torch.float64)
    given = {name: numbers(value) if isinstance(value, list) else value for name, value in inputs.items()}
    teacher = zeros if ratio is None else -numbers(ratio)
    return sample_weights(zeros, teacher, owner, num_sequences, config, inputs=given)


def weights_of_lengths(lengths, **settings):
    owner = torch.repeat_interleave(torch.tensor(lengths))
    return weigh(LengthWeighting(**settings), owner, len(lengths)).weights.tolist()


def test_length_by_hand():
    assert weights_of_lengths([2, 1, 3, 6]) == pytest.approx([2 / 3, 1 / 3, 1.0, 2.0])
    assert weights_of_lengths([2, 1, 3, 6], cap=1.5) == pytest.approx([2 / 3, 1 / 3, 1.0, 1.5])
    assert weights_of_lengths([2, 1, 3, 6], normalize="none") == [2.0, 1.0, 3.0, 6.0]  # and no cap
    assert weights_of_lengths([2, 0, 4]) == pytest.approx([1.0, 0.0, 2.0])
    assert weights_of_lengths([20] + [1] * 20) == pytest.approx([10.0] + [21 / 40] * 20)  # 10.5 without the cap


def test_length_is_of_whole_sequences():
    zeros = torch.zeros(6, dtype=torch.float64)
    lengths = torch.tensor([10, 20, 30])
    found = sample_weights(zeros, zeros, OWNER, 3, LengthWeighting(), sequence_lengths=lengths)
    assert found.weights.tolist() == pytest.approx([0.5, 1.0, 1.5])
    assert found.denominators.tolist() == found.lengths.tolist() == [10.0, 20.0, 30.0]


@pytest.mark.parametrize(
    ("normalize", "expected"),
    [
        ("unit_mean", [0.5, 1.0, 1.5, 1.0, 1.0, 1.0]),  # means 2, 8 and 0, which gives 1
        ("batch", [0.5, 0.0, 1.5, 0.0, 4.0, 0.0]),  # mean of all six 2
        ("none", ENTROPIES),
    ],
)
def test_student_entropy_of_tokens_by_hand(normalize, expected):
    found = weigh(StudentEntropyWeighting(normalize=normalize), student_entropy=ENTROPIES)
    assert found.token_weights.tolist() == pytest.approx(expected)
    assert found.weights.tolist() == [1.0] * 3
    assert found.denominators.tolist() == [2.0, 1.0, 3.0]


def test_entropies_that_are_all_zero_weigh_one():
    for normalize in ("unit_mean", "batch"):
        found = weigh(StudentEntropyWeighting(normalize=normalize), student_entropy=[0.0] * 6)
        assert found.token_weights.tolist() == [1.0] * 6


def test_weights_of_sequences_that_are_all_zero_stay_zero():
    """Where a filter keeps nobody, nobody teaches; there is no NaN."""
    config = StudentEntropyWeighting(per="sequence", normalize="batch")
    for one in (config, ProductWeighting(factors=(config, LengthWeighting()))):
        assert weigh(one, student_entropy=[0.0] * 6).weights.tolist() == [0.0] * 3


def test_student_entropy_of_sequences_by_hand():
    def weights(**settings):
        found = weigh(StudentEntropyWeighting(per="sequence", **settings), student_entropy=ENTROPIES)
        assert found.token_weights is None
        return found.weights.tolist()

    assert weights(normalize="batch") == pytest.approx([0.6, 2.4, 0.0])  # 2, 8 and 0 over 10/3
    assert weights(normalize="batch", cap=2.0) == pytest.approx([0.6, 2.0, 0.0])
    assert weights(normalize="none") == pytest.approx([2.0, 8.0, 0.0])


def test_tokens_are_not_bounded():
    owner = torch.zeros(20, dtype=torch.int64)
    found = weigh(StudentEntropyWeighting(), owner, 1, student_entropy=[5.0] + [0.0] * 19)
    assert found.token_weights.tolist() == pytest.approx([20.0] + [0.0] * 19)


GATE = {"student_entropy": [1.0, 5.0, 3.0, 2.0, 8.0, 100.0], "teacher_entropy": [1.0, 1.0, 1.0, 1.0, 0.8, 0.1]}


@pytest.mark.parametrize(
    ("normalize", "expected"),
    [
        ("unit_mean", [0.5, 10 / 7, 1.5, 4 / 7, 0.0, 0.0]),  # kept: 1 and 3; none; 5 and 2
        ("batch", [4 / 11, 20 / 11, 12 / 11, 8 / 11, 0.0, 0.0]),  # 11 over 4 kept tokens
        ("none", [1.0, 5.0, 3.0, 2.0, 0.0, 0.0]),
    ],
)
def test_tokens_that_are_not_kept_count_neither_above_nor_below(normalize, expected):
    found = weigh(GateWeighting(normalize=normalize), **GATE)
    assert found.token_weights.tolist() == pytest.approx(expected)
    assert found.denominators.tolist() == [2.0, 0.0, 2.0]
    assert found.lengths.tolist() == [2.0, 1.0, 3.0]


def test_of_two_masks_the_mean_is_over_what_both_keep():
    gates = (GateWeighting(normalize="none"), GateWeighting(normalize="none", above=0.9))
    teacher_entropy = [1.0, 0.85, 1.0, 1.0, 0.85, 0.1]
    config = ProductWeighting(factors=gates)
    found = weigh(config, student_entropy=GATE["student_entropy"], teacher_entropy=teacher_entropy)
    assert found.denominators.tolist() == [2.0, 0.0, 1.0]
    assert found.token_weights.tolist() == [1.0, 0.0, 9.0, 4.0, 0.0, 0.0]


def test_prefix_sums_by_hand():
    """The hand numbers of IW-OPD: p_S = .5 .9 .2 .6, p_T = .25 .9 .4 .06; tokens come in any order."""
    order, owner = torch.tensor([2, 0, 3, 1]), torch.zeros(4, dtype=torch.int64)
    student, teacher = numbers([0.5, 0.9, 0.2, 0.6]).log(), numbers([0.25, 0.9, 0.4, 0.06]).log()
    found = sample_weights(
        student[order], teacher[order], owner, 1, PrefixWeighting(), inputs={"position": torch.arange(4)[order]}
    )
    expected = numbers([1.5, 1.406049, 1.406049, 1.312098])
    torch.testing.assert_close(found.token_weights, expected[order], rtol=0, atol=5e-7)


# Nine sequences of one token each, with as many different weights: exp of the log ratios.
RATIOS = [0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2, 2.4]
RAW = [math.exp(ratio) for ratio in RATIOS]
NINE = torch.arange(9)
IDS = torch.tensor([14, 10, 18, 11, 17, 12, 16, 13, 15])


def permuted_weights(seed=5, step=1, order=NINE, **settings):
    """Weights of the nine, by their numbers, where they come in some order."""
    ratio, ids = numbers(RATIOS)[order].tolist(), IDS[order]
    config = PermutedWeighting(of=RenioWeighting(**settings))
    found = weigh(config, NINE, 9, ratio=ratio, sequence=ids, generator=seeded(seed, step))
    assert found.token_weights is None
    return dict(zip(ids.tolist(), found.weights.tolist(), strict=True))


def test_permuted_weights_are_the_same_weights_elsewhere():
    mean = sum(RAW) / 9
    for cap in (1.5, None):
        expected = [min(raw / mean, cap or raw) for raw in RAW]
        found = permuted_weights(cap=cap)
        assert sorted(found.values()) == pytest.approx(sorted(expected))
        own = dict(zip(IDS.tolist(), expected, strict=True))
        assert sum(abs(found[number] - own[number]) > 1e-6 for number in own) >= 3
    assert sorted(permuted_weights(normalize="none").values()) == pytest.approx(sorted(RAW))


@pytest.mark.parametrize("shuffle", range(4))
def test_a_permutation_follows_from_the_numbers_and_not_from_the_order(shuffle):
    order = torch.randperm(9, generator=torch.Generator().manual_seed(shuffle))
    assert permuted_weights(order=order) == pytest.approx(permuted_weights(), abs=1e-12)


def test_each_step_and_each_seed_has_its_permutation():
    found = [permuted_weights(seed, step) for seed in (5, 6) for step in (1, 2, 3)]
    assert all(found[a] != found[b] for a in range(6) for b in range(a))
    assert permuted_weights(5, 1) == found[0]


def test_sequences_without_numbers_have_those_of_their_places():
    config, ids = PermutedWeighting(of=RenioWeighting()), {"sequence": NINE}
    given, counted = (
        weigh(config, NINE, 9, ratio=RATIOS, generator=seeded(5, 1), **more).weights.tolist() for more in (ids, {})
    )
    assert given == counted


# Two sequences of seven tokens with different entropies, and one of one token.
LONG = torch.tensor([0] * 7 + [1] * 7 + [2])
PLACES = torch.cat((torch.arange(7), torch.arange(7), torch.tensor([0])))
LONG_ENTROPIES = numbers([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0] * 2 + [9.0])


def permuted_tokens(step=1, order=None, ids=(3, 4, 8), of=None, **more):
    """Weights of the tokens in their own order, where they come in another; of sequences with these numbers."""
    order = torch.arange(15) if order is None else order
    inputs = {"student_entropy": LONG_ENTROPIES, "position": PLACES, **more}
    found = weigh(
        PermutedWeighting(of=of or StudentEntropyWeighting()),
        LONG[order],
        3,
        sequence=torch.tensor(ids),
        generator=seeded(5, step),
        **{name: values[order] for name, values in inputs.items()},
    )
    assert found.weights.tolist() == [1.0] * 3
    return found.token_weights[torch.argsort(order)]


def test_weights_of_tokens_are_permuted_within_each_response():
    found = permuted_tokens()
    own = numbers([0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75])
    pieces = found.split([7, 7, 1])
    for piece in pieces[:2]:
        torch.testing.assert_close(piece.sort().values, own, rtol=0, atol=1e-12)
        assert not torch.equal(piece, own)
    assert pieces[2].tolist() == [1.0]
    assert not torch.equal(pieces[0], pieces[1])  # each has its own permutation


def test_a_permutation_of_tokens_follows_from_number_and_step():
    found = permuted_tokens()
    for seed in range(3):
        order = torch.randperm(15, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(permuted_tokens(order=order), found)
    assert not torch.equal(permuted_tokens(step=2)[:7], found[:7])
    other = permuted_tokens(ids=(4, 3, 8))  # the two have the same entropies
    assert torch.equal(other, torch.cat((found[7:14], found[:7], found[14:])))


def test_a_mask_is_permuted_with_its_weights():
    teacher_entropy = numbers([1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0] * 2 + [1.0])
    found = permuted_tokens(of=GateWeighting(), teacher_entropy=teacher_entropy)
    for piece in found[:14].split(7):
        assert sorted(piece.tolist()) == pytest.approx([0.0] * 4 + [0.5, 1.0, 1.5])
    assert found[:14].gt(0).tolist() != [True, True, True, False, False, False, False] * 2


def test_weights_that_follow_from_sums_can_be_permuted():
    of = ShareWeighting()
    own = weigh(of, LONG, 3, student_entropy=LONG_ENTROPIES).token_weights
    assert own.tolist() == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75] * 2 + [1.0])
    for piece in permuted_tokens(of=of)[:14].split(7):
        torch.testing.assert_close(piece.sort().values, own[:7], rtol=0, atol=1e-12)


# Sequences of 2, 1 and 3 tokens with raw weights e, 1 and e^2; entropies as above.
THREE_RATIOS = [1.0, 2.0, 0.0, 2.0, 0.0, 0.0]
THREE_RAW = [math.e, 1.0, math.e**2]


def mean_one(values, cap=None):
    mean = sum(values) / len(values)
    return [min(value / mean, cap or value / mean) for value in values]


def product_of(*factors):
    return weigh(ProductWeighting(factors=factors), ratio=THREE_RATIOS, student_entropy=ENTROPIES)


@pytest.mark.parametrize("cap", [1.2, None])
def test_weights_of_sequences_are_finished_alone_and_their_product_has_the_mean_one(cap):
    found = product_of(RenioWeighting(cap=cap), LengthWeighting())
    products = [a * b for a, b in zip(mean_one(THREE_RAW, cap), mean_one([2.0, 1.0, 3.0]), strict=True)]
    assert found.weights.tolist() == pytest.approx(mean_one(products))
    assert found.weights.mean().item() == pytest.approx(1.0)
    if cap:  # the cap bound one factor, not the product
        assert max(mean_one(products)) > cap
    assert found.token_weights is None


def test_one_factor_of_sequences_is_not_divided_again():
    found = product_of(RenioWeighting(cap=1.2), StudentEntropyWeighting())
    expected = mean_one(THREE_RAW, 1.2)
    assert found.weights.tolist() == pytest.approx(expected) and sum(expected) / 3 < 0.95
    assert found.token_weights.tolist() == pytest.approx([0.5, 1.0, 1.5, 1.0, 1.0, 1.0])
    assert found.batch_size.item() == 3
    none = product_of(UniformWeighting(), LengthWeighting(normalize="none"))
    assert none.weights.tolist() == [2.0, 1.0, 3.0]


def test_three_factors_and_weights_of_tokens_that_multiply():
    found = product_of(
        RenioWeighting(),
        StudentEntropyWeighting(normalize="batch"),
        LengthWeighting(normalize="none"),
        StudentEntropyWeighting(),
        UniformWeighting(),
    )
    products = [a * b for a, b in zip(mean_one(THREE_RAW), [2.0, 1.0, 3.0], strict=True)]
    assert found.weights.tolist() == pytest.approx(mean_one(products))
    assert found.token_weights.tolist() == pytest.approx([0.25, 0.0, 2.25, 0.0, 4.0, 0.0])


def test_a_product_of_one_is_that_one():
    found, alone = product_of(LengthWeighting(cap=1.2)), weigh(LengthWeighting(cap=1.2))
    assert torch.equal(found.weights, alone.weights) and alone.weights.tolist() == pytest.approx([1.0, 0.5, 1.2])
    uniform = product_of(UniformWeighting())
    assert uniform.weights.tolist() == [1.0] * 3 and uniform.batch_size.item() == 3


def test_each_moving_average_of_a_product_has_its_own_state():
    factors = (RenioWeighting(normalize="ema", ema_decay=0.5), RenioWeighting(normalize="ema", temperature=2.0))
    raw = [THREE_RAW, [math.sqrt(one) for one in THREE_RAW]]
    means = [sum(one) / 3 for one in raw]
    zeros, state = torch.zeros(6, dtype=torch.float64), numbers([4.0, 3.0])
    averages = [0.5 * 4.0 + 0.5 * means[0], 0.9 * 3.0 + 0.1 * means[1]]
    for before, divisors in ((None, means), (state, averages)):
        found = sample_weights(zeros, -numbers(THREE_RATIOS), OWNER, 3, ProductWeighting(factors=factors), state=before)
        products = [a * b / divisors[0] / divisors[1] for a, b in zip(*raw, strict=True)]
        assert found.state.tolist() == pytest.approx(divisors)
        assert found.weights.tolist() == pytest.approx(mean_one(products))


@pytest.mark.parametrize("name", ["verdict", "sampler_logp", "column level"])
def test_to_read_what_is_not_declared_is_refused_by_the_word_of_the_settings(name):
    with pytest.raises(AttributeError, match=f"{name.split()[-1]}.*does not declare it.*needs"):
        weigh(SeenWeighting(wants=("finished",), reads=(name,)), finished=[1.0, 0.0, 1.0])
    given = {name: [1.0, 2.0, 3.0]}
    weigh(SeenWeighting(wants=(name,), reads=(name,)), **given)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (WeightingConfig(name="student_entropy"), "'student_entropy' needs student_entropy.*inputs=.'student_entropy'"),
        (WeightingConfig(name="permuted"), "'permuted' needs generator, and `inputs` has no such thing"),
        (PermutedWeighting(of=StudentEntropyWeighting()), "needs generator, position, student_entropy"),
        (ProductWeighting(factors=(UniformWeighting(), GateWeighting())), "'gate' needs student_entropy, teacher"),
    ],
)
def test_what_a_strategy_needs_and_nobody_gives_is_named(config, words):
    with pytest.raises(ConfigError, match=words):
        weigh(config)


def test_counts_and_masks_are_weights():
    found = weigh(CountedWeighting(), verdict=[1.0, 0.0, 1.0])
    assert found.weights.tolist() == [1.5, 0.0, 1.5] and found.weights.dtype == torch.float64
    places = torch.tensor([0, 0, 1, 1, 0, 2])  # owners 0 2 0 2 1 2
    found = weigh(CountedWeighting(of="position", normalize="unit_mean"), position=places)
    assert found.token_weights.tolist() == pytest.approx([2 / 3, 0.5, 4 / 3, 1.0, 1.0, 1.5])


def test_weights_carry_no_gradient():
    leaf = torch.ones(6, dtype=torch.float64, requires_grad=True)
    found = sample_weights(leaf, leaf * 2, OWNER, 3, StudentEntropyWeighting(), inputs={"student_entropy": leaf * 3})
    assert not any(one.requires_grad for one in (found.weights, found.token_weights, found.denominators))


@pytest.mark.parametrize(
    ("of", "normalize", "what"), [("verdict", "unit_mean", "tokens"), ("position", "ema", "sequences")]
)
def test_a_mean_that_such_weights_do_not_have_is_refused(of, normalize, what):
    inputs = {"verdict": [1.0, 0.0, 1.0]} if of == "verdict" else {"position": torch.tensor([0, 0, 1, 1, 0, 2])}
    with pytest.raises(ConfigError, match=f"no mean called '{normalize}': that is one of {what} alone"):
        weigh(CountedWeighting(of=of, normalize=normalize), **inputs)


@pytest.mark.parametrize(("factors", "state"), [(1, [1.0, 2.0, 3.0]), (2, [1.0]), (2, [1.0, 2.0, 3.0]), (0, [1.0])])
def test_a_state_of_another_weighting_is_refused(factors, state):
    average = RenioWeighting(normalize="ema")
    config = [LengthWeighting(), average, ProductWeighting(factors=(average, average))][factors]
    zeros = torch.zeros(6, dtype=torch.float64)
    with pytest.raises(LayoutError, match=f"one number for each strategy that has one, {factors} here"):
        sample_weights(zeros, zeros, OWNER, 3, config, state=numbers(state))


def test_who_is_at_a_cap_is_told_of_every_strategy():
    lengths = LengthWeighting(cap=1.2)  # 1, 0.5 and 1.5
    for config in (lengths, ProductWeighting(factors=(lengths, UniformWeighting(), StudentEntropyWeighting()))):
        found = weigh(config, student_entropy=ENTROPIES)
        assert found.is_capped.tolist() == [False, False, True]
    permuted = weigh(PermutedWeighting(of=lengths), generator=seeded(5, 1))
    assert permuted.is_capped.sum() == 1 and permuted.weights[permuted.is_capped].tolist() == [1.2]
    assert not weigh(StudentEntropyWeighting(), student_entropy=ENTROPIES).is_capped.any()
