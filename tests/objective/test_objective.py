"""The pure mathematics: tables of divergences and weightings line by line, normalisations and reductions by hand."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from renio_megatron.config import WeightingConfig
from renio_megatron.config.sections.weighting import WEIGHTINGS
from renio_megatron.losses.kernels import statistics
from renio_megatron.losses.weigh import strategy_of
from renio_megatron.objective.divergences import DIVERGENCES, divergence_of
from renio_megatron.objective.normalize import divide_and_cap, moving_average
from renio_megatron.objective.reduce import token_scale, tokens_per_sequence
from renio_megatron.objective.weightings import INPUTS
from renio_megatron.objective.weightings.renio import is_pivotal, pivotal_sums, sequence_weight
from renio_megatron.objective.weightings.strategy import WeightingInputs
from renio_megatron.parallel.reductions import batch_mean, group_means, sum_over_group
from renio_megatron.parallel.vocab import VocabShard, gather_columns, merge_statistics

BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)
BOUNDS = {"threshold": 0.8, "ceiling": 2.5}


def logps(seed, rows=5, columns=17):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, rows, columns, generator=generator, dtype=torch.float64) * 2
    return logits.log_softmax(-1).unbind(0)


def betas_of(name):
    """The betas that select a divergence; 0.3 for one that no beta selects."""
    return [beta for beta in BETAS if divergence_of(beta) is DIVERGENCES[name]] or [0.3]


ENTRIES = [(name, beta) for name in DIVERGENCES for beta in betas_of(name)]


@pytest.mark.parametrize(("name", "beta"), ENTRIES)
def test_slope_is_the_derivative_of_the_entry(name, beta):
    terms = DIVERGENCES[name].terms
    student, teacher = logps(0)
    _, slope = terms(student.clone(), teacher.clone(), beta)
    # Forward mode, because the entries are computed in place.
    _, derivative = torch.func.jvp(
        lambda logp: terms(logp, teacher.clone(), beta)[0], (student.clone(),), (torch.ones_like(student),)
    )
    torch.testing.assert_close(slope, derivative, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "beta"), ENTRIES)
def test_gradient_formula_is_autograd_of_the_entries_sum(name, beta):
    terms = DIVERGENCES[name].terms
    student, teacher = logps(1)
    logits = student + 0.7  # any constant
    _, slope = terms(student.clone(), teacher.clone(), beta)
    formula = slope - student.exp() * slope.sum(-1, keepdim=True)
    for column in range(logits.shape[1]):
        direction = torch.zeros_like(logits)
        direction[:, column] = 1.0
        _, derivative = torch.func.jvp(
            lambda z: terms(z.log_softmax(-1), teacher.clone(), beta)[0].sum(-1), (logits,), (direction,)
        )
        torch.testing.assert_close(formula[:, column], derivative, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "beta"), ENTRIES)
def test_a_divergence_is_elementwise_and_leaves_its_arguments(name, beta):
    terms = DIVERGENCES[name].terms
    student, teacher = logps(2)
    before = student.clone(), teacher.clone()
    whole = terms(student, teacher, beta)
    assert torch.equal(student, before[0]) and torch.equal(teacher, before[1])
    for term, left, right in zip(
        whole, terms(student[:, :5], teacher[:, :5], beta), terms(student[:, 5:], teacher[:, 5:], beta), strict=True
    ):
        assert torch.equal(term, torch.cat((left, right), 1))
    assert torch.all(whole[0].sum(-1) > 0)
    assert float(terms(student, student.clone(), beta)[0].sum(-1).abs().max()) < 1e-12  # equal models diverge nowhere
    nowhere = torch.full((1, 1), -torch.inf, dtype=torch.float64)
    for entry in terms(nowhere.clone(), nowhere.clone(), beta):
        assert entry.item() == 0.0  # probability 0 contributes 0


@pytest.mark.parametrize(("name", "beta"), [pair for pair in ENTRIES if DIVERGENCES[pair[0]].mean_under])
@pytest.mark.parametrize("cut", [0, 1, 9, 17])
def test_one_pass_form_is_the_sum_of_the_entries(name, beta, cut):
    divergence = DIVERGENCES[name]
    student, teacher = logps(3)
    entry, slope = divergence.terms(student.clone(), teacher.clone(), beta)
    sign = {"teacher": 1, "student": -1}[divergence.mean_under]
    targets = torch.full((5,), 3)
    edges = (0, cut, 17)
    parts = [
        statistics(
            (student + 11.0)[:, a:b],
            (teacher - 5.0)[:, a:b],
            torch.where((targets >= a) & (targets < b), targets - a, -1),
            num_valid=b - a,
            temperature=1.0,
            cross_term_sign=sign,
        )
        for a, b in itertools.pairwise(edges)
    ]
    merged = merge_statistics(torch.stack(parts), sign)
    torch.testing.assert_close(merged.cross, entry.sum(-1), rtol=0, atol=1e-12)
    torch.testing.assert_close(divergence.total_slope(merged.cross), slope.sum(-1), rtol=0, atol=1e-12)
    torch.testing.assert_close(merged.student_logp, student[:, 3], rtol=0, atol=1e-12)
    torch.testing.assert_close(merged.teacher_logp, teacher[:, 3], rtol=0, atol=1e-12)


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_an_entry_that_the_teacher_excludes_has_its_limit(beta):
    entry, slope = divergence_of(beta).terms(torch.tensor([math.log(0.5)]), torch.tensor([-torch.inf]), beta)
    # Forward KL: 0. JSD at 1/2: 1/2 p_S (log p_S - log(p_S / 2)) = 1/4 ln 2, also its slope.
    assert entry.item() == pytest.approx(beta * 0.5 * math.log(2.0))
    assert slope.item() == pytest.approx(beta * 0.5 * math.log(2.0))


def test_beta_selects_the_divergence():
    assert [divergence_of(beta) for beta in (0, 0.3, 1)] == [
        DIVERGENCES["forward_kl"],
        DIVERGENCES["jsd"],
        DIVERGENCES["reverse_kl"],
    ]


@pytest.mark.parametrize("name", [name for name in WEIGHTINGS if name != "product"])
def test_a_weighting_is_additive_over_pieces_and_positive(name):
    strategy = strategy_of(WeightingConfig(name=name))
    generator = torch.Generator().manual_seed(4)
    scores = {key: torch.rand(40, generator=generator, dtype=torch.float64) * 4 for key in INPUTS[:6]}
    owner = torch.randint(0, 6, (40,), generator=generator)
    owner[owner == 2] = 3  # sequence 2 has no token

    def inputs(part):
        found = WeightingInputs(owner[part], 6, {key: values[part] for key, values in scores.items()})
        found.lengths = tokens_per_sequence(owner, 6).double()
        return found

    whole = strategy.sums(inputs(slice(None)))
    pieces = [strategy.sums(inputs(part)) for part in (slice(0, 13), slice(13, 40))]
    for key, values in whole.items():
        torch.testing.assert_close(values, pieces[0][key] + pieces[1][key])
    raw = strategy.weights(inputs(slice(None)), whole)
    for found, shape in ((raw.sequences, (6,)), (raw.tokens, (40,))):
        assert found is None or (found.shape == shape and found.dtype == torch.float64 and bool((found >= 0).all()))
    parts = [strategy.weights(inputs(part), whole) for part in (slice(0, 13), slice(13, 40))]
    assert raw.tokens is None or torch.equal(raw.tokens, torch.cat([part.tokens for part in parts]))
    assert raw.sequences is None or all(torch.equal(raw.sequences, part.sequences) for part in parts)
    assert strategy.sums(inputs(slice(0, 0))).keys() == whole.keys()


def test_what_a_strategy_does_not_declare_is_not_there():
    inputs = WeightingInputs(torch.tensor([0]), 1, {"student_logp": torch.zeros(1)})
    for name in INPUTS[1:]:
        with pytest.raises(AttributeError, match=f"reads {name} and does not declare it"):
            getattr(inputs, name)
    with pytest.raises(AttributeError, match="reads the column 'level' and does not declare it"):
        inputs.column("level")


def test_pivotal_tokens_by_hand():
    ratio = torch.tensor([-9.0, 0.7, 0.8, 2.0, 7.0], dtype=torch.float64)
    assert is_pivotal(ratio, **BOUNDS).tolist() == [False, False, True, True, True]  # the threshold is inside
    assert not is_pivotal(ratio, threshold=2.6, ceiling=2.5).any()  # compared after the ceiling
    owner = torch.tensor([1, 1, 0, 1, 1])
    sums = pivotal_sums(ratio, owner, 3, **BOUNDS)
    assert sums["log_ratio"].tolist() == [0.8, 4.5, 0.0] and sums["pivotal_tokens"].tolist() == [1.0, 2.0, 0.0]
    assert sequence_weight(sums, temperature=0.5).tolist() == pytest.approx([math.exp(1.6), math.exp(4.5), 1.0])


def test_an_infinite_log_ratio_counts_as_the_ceiling_above_and_not_at_all_below():
    ratio = torch.tensor([torch.inf, -torch.inf])
    sums = pivotal_sums(ratio, torch.tensor([0, 1]), 2, **BOUNDS)
    assert sums["log_ratio"].tolist() == [2.5, 0.0] and sums["pivotal_tokens"].tolist() == [1.0, 0.0]


def test_normalisations_by_hand():
    raw = torch.tensor([1.0, 3.0, 8.0])
    assert divide_and_cap(raw, torch.tensor(4.0), cap=None).tolist() == [0.25, 0.75, 2.0]
    assert divide_and_cap(raw, torch.tensor([1.0, 1.0, 4.0]), cap=2.5).tolist() == [1.0, 2.5, 2.0]
    first = moving_average(torch.tensor(2.0), None, decay=0.9)
    assert first.item() == 2.0
    assert moving_average(torch.tensor(4.0), first, decay=0.9).item() == pytest.approx(0.9 * 2.0 + 0.1 * 4.0)


def test_means_on_one_rank_by_hand():
    raw = torch.tensor([1.0, 3.0, 8.0, 2.0, 6.0])
    mean, count = batch_mean(raw, None)
    assert (mean.item(), count.item()) == (4.0, 5.0)
    mean, count = batch_mean(raw[:0], None)
    assert (mean.item(), count.item()) == (1.0, 0.0)
    means, count = group_means(raw, 2, None)
    assert (means.tolist(), count.item()) == ([2.0, 2.0, 5.0, 5.0, 6.0], 5.0)  # the last group is short
    assert group_means(raw, 9, None)[0].tolist() == [4.0] * 5
    assert group_means(raw[:0], 2, None)[0].shape == (0,)
    assert sum_over_group(raw, None) is raw


def test_reductions_by_hand():
    owner = torch.tensor([2, 0, 2])
    assert tokens_per_sequence(owner, 4).tolist() == [1, 0, 2, 0]
    assert tokens_per_sequence(owner[:0], 2).tolist() == [0, 0]
    scale = token_scale(torch.tensor([3.0, 5.0, 4.0]), torch.tensor([1, 0, 2]), owner, denominator=8.0)
    assert scale.tolist() == [0.25, 0.375, 0.25]


def test_columns_of_a_shard():
    shard = VocabShard(3, 9, 7, group=SimpleNamespace(size=lambda: 2))
    assert (shard.width, shard.num_valid) == (6, 4)
    assert shard.local_columns(torch.tensor([2, 3, 6])).tolist() == [-1, 0, 3]
    assert VocabShard(9, 12, 7, group=SimpleNamespace(size=lambda: 2)).num_valid == 0
    assert gather_columns(torch.arange(6.0).view(2, 3), VocabShard(0, 3, 2)).tolist() == [[0.0, 1.0], [3.0, 4.0]]
