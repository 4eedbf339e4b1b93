"""Weights of tokens and sequences in the loss on one rank: value and gradients, and what a weighting is shown.

The oracle is plain torch in fp64: softmax over the whole vocabulary, sequence after sequence, autograd's gradient.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import linear

from renio_megatron import LossConfig, distillation_loss, linear_distillation_loss
from renio_megatron.config import HeadConfig
from renio_megatron.config.sections.combined_weighting import ProductWeighting
from renio_megatron.config.sections.weighting import (
    LengthWeighting,
    RenioWeighting,
    StudentEntropyWeighting,
    UniformWeighting,
)
from renio_megatron.data.batching.collate import BatchLayout, collate
from renio_megatron.losses.sample_weights import sample_weights
from renio_megatron.training.algorithms.weighted_loss import WeightedLoss
from renio_megatron.training.targets import MicroBatchLoss, TeacherTargets
from renio_megatron.types import Prompt, Rollout
from tests.fakes.strategies import GateWeighting, PlaceWeighting, PrefixWeighting, ShareWeighting
from tests.helpers.vectors import worst

LOSSES = {
    "plain": LossConfig(),
    "bounded": LossConfig(temperature=1.3, entry_clip=0.05, entry_floor=0.0),
    "reverse": LossConfig(beta=1.0, temperature=0.7),
    "between": LossConfig(beta=0.3, entry_clip=0.2, entry_floor=None),
}
LOGITS_WANTED = ("student_entropy", "teacher_entropy", "divergence")


def problem(seed=0, *, rows=19, vocab=11, sequences=5):
    """Hidden states and heads of two models, and a dict of ids, owners and places; the last sequence is empty."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((rows, 6), (vocab, 6), (rows, 4), (vocab, 4))
    models = tuple(torch.randn(*size, generator=generator, dtype=torch.float64) for size in sizes)
    owner = torch.randint(0, sequences - 1, (rows,), generator=generator)
    position = torch.empty_like(owner)
    for number in range(sequences):  # tokens of a sequence come in any order
        mine = torch.nonzero(owner == number)[:, 0]
        position[mine] = torch.randperm(len(mine), generator=generator)
    ids = torch.randint(0, vocab, (rows,), generator=generator)
    return models, SimpleNamespace(ids=ids, owner=owner, position=position, num_sequences=sequences)


def facts_of(student_logits, teacher_logits, tokens, loss):
    """What a weighting may look at, and the divergence, which is differentiable by the student's logits."""
    student_logp, teacher_logp = ((x / loss.temperature).log_softmax(-1) for x in (student_logits, teacher_logits))
    student, teacher = student_logp.exp(), teacher_logp.exp()
    if loss.beta == 0:
        entries = teacher * (teacher_logp - student_logp)
    elif loss.beta == 1:
        entries = student * (student_logp - teacher_logp)
    else:
        mixture = ((1 - loss.beta) * student + loss.beta * teacher).log()
        entries = loss.beta * teacher * (teacher_logp - mixture) + (1 - loss.beta) * student * (student_logp - mixture)
    if loss.entry_clip is not None:
        entries = entries.clamp(min=loss.entry_floor, max=loss.entry_clip)
    rows = torch.arange(len(tokens.ids))
    return SimpleNamespace(
        divergence=entries.sum(-1),
        student_logp=student_logp[rows, tokens.ids].detach(),
        teacher_logp=teacher_logp[rows, tokens.ids].detach(),
        student_entropy=torch.special.entr(student.detach()).sum(-1),
        teacher_entropy=torch.special.entr(teacher).sum(-1),
        position=tokens.position,
        of=[torch.nonzero(tokens.owner == number)[:, 0] for number in range(tokens.num_sequences)],
    )


def finished(raw, cap=10.0):
    return (raw / raw.mean()).clamp(max=cap)


def renio(facts, cap=10.0):
    raw = []
    for mine in facts.of:
        ratios = (facts.student_logp - facts.teacher_logp)[mine].clamp(max=2.5)
        pivotal = ratios[ratios >= 0.8]
        raw.append(pivotal.mean().exp() if len(pivotal) else torch.ones((), dtype=torch.float64))
    return finished(torch.stack(raw), cap)


def length(facts):
    return finished(torch.tensor([len(mine) for mine in facts.of], dtype=torch.float64))


def mean_entropies(facts):
    means = [facts.student_entropy[mine].sum() / max(1, len(mine)) for mine in facts.of]
    return finished(torch.stack(means), 1.5)


def of_mean_one(facts, values, kept=None):
    found = torch.zeros_like(values)
    for mine in facts.of:
        counted = mine if kept is None else mine[kept[mine]]
        found[counted] = values[counted] / values[counted].mean()
    return found


def places(facts):
    found = torch.zeros_like(facts.student_logp)
    for mine in facts.of:
        found[mine] = (facts.position[mine].double() + 0.5) / len(mine)
    return found


def prefix(facts):
    found = torch.zeros_like(facts.student_logp)
    sizes = (facts.teacher_logp - facts.student_logp).abs()
    for mine in facts.of:
        total, before = float(sizes[mine].sum()), 0.0
        for place in range(len(mine)):
            token = mine[facts.position[mine] == place]
            found[token] = 1 + 0.5 * (1 - before / total)
            before += float(sizes[token])
    return found


# Name -> (weighting, facts -> (weights of sequences, of tokens, which are kept); None: 1, or all).
RENIO = RenioWeighting(cap=1.2)
TOKENS, SEQUENCES = StudentEntropyWeighting(), StudentEntropyWeighting(per="sequence", normalize="batch", cap=1.5)
RECIPES = {
    "uniform": (UniformWeighting(), lambda facts: (None, None, None)),
    "renio": (RENIO, lambda facts: (renio(facts, 1.2), None, None)),
    "length": (LengthWeighting(), lambda facts: (length(facts), None, None)),
    "entropy of tokens": (TOKENS, lambda facts: (None, of_mean_one(facts, facts.student_entropy), None)),
    "entropy of the batch's tokens": (
        StudentEntropyWeighting(normalize="batch"),
        lambda facts: (None, facts.student_entropy / facts.student_entropy.mean(), None),
    ),
    "entropy of sequences": (SEQUENCES, lambda facts: (mean_entropies(facts), None, None)),
    "renio x entropy of tokens": (
        ProductWeighting(factors=(RENIO, TOKENS)),
        lambda facts: (renio(facts, 1.2), of_mean_one(facts, facts.student_entropy), None),
    ),
    "renio x length x entropy": (
        ProductWeighting(factors=(RENIO, LengthWeighting(), SEQUENCES, TOKENS)),
        lambda facts: (
            finished(renio(facts, 1.2) * length(facts) * mean_entropies(facts), torch.inf),
            of_mean_one(facts, facts.student_entropy),
            None,
        ),
    ),
    "share": (ShareWeighting(), lambda facts: (None, of_mean_one(facts, facts.student_entropy), None)),
    "gate": (
        ProductWeighting(factors=(GateWeighting(above=1.4), RENIO)),
        lambda facts: (
            renio(facts, 1.2),
            of_mean_one(facts, facts.student_entropy, facts.teacher_entropy > 1.4),
            facts.teacher_entropy > 1.4,
        ),
    ),
    "prefix": (PrefixWeighting(), lambda facts: (None, prefix(facts), None)),
    "place": (PlaceWeighting(), lambda facts: (None, places(facts), None)),
}


def expected_of(models, tokens, loss, recipe):
    """L = (1/B) sum_i W_i (1/N_i) sum_t w_t D_t over the kept tokens, with its gradients by autograd."""
    hidden, head = (tensor.detach().clone().requires_grad_() for tensor in models[:2])
    logits = linear(hidden, head)
    logits.retain_grad()
    facts = facts_of(logits, linear(*models[2:]), tokens, loss)
    weights, token_weights, kept = RECIPES[recipe][1](facts)
    count = len(tokens.ids)
    weights = torch.ones(tokens.num_sequences, dtype=torch.float64) if weights is None else weights
    token_weights = torch.ones(count, dtype=torch.float64) if token_weights is None else token_weights
    kept = torch.ones(count, dtype=torch.bool) if kept is None else kept
    total = torch.zeros((), dtype=torch.float64)
    scale = torch.zeros(count, dtype=torch.float64)
    for weight, mine in zip(weights, facts.of, strict=True):
        counted = mine[kept[mine]]
        scale[counted] = weight * token_weights[counted] / len(counted) / tokens.num_sequences
        if len(counted):
            total = total + weight * (token_weights * facts.divergence)[counted].mean() / tokens.num_sequences
    total.backward()
    return SimpleNamespace(
        loss=total.detach(),
        weights=weights,
        token_weights=token_weights,
        scale=scale,
        facts=facts,
        kept=kept,
        logits=logits.detach(),
        of_logits=logits.grad,
        of_hidden=hidden.grad,
        of_head=head.grad,
    )


def check(out, expected, bound=1e-12):
    assert worst(out.loss, expected.loss) <= bound
    assert worst(out.weights, expected.weights) <= bound
    found = torch.ones_like(expected.token_weights) if out.token_weights is None else out.token_weights
    assert worst(found, expected.token_weights) <= bound


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_value_and_gradient_over_logits(recipe, loss):
    models, tokens = problem()
    expected = expected_of(models, tokens, LOSSES[loss], recipe)
    student = expected.logits.clone().requires_grad_()
    arguments = (tokens.ids, tokens.owner, tokens.num_sequences, LOSSES[loss], RECIPES[recipe][0])
    out = distillation_loss(student, linear(*models[2:]), *arguments, inputs={"position": tokens.position})
    (out.loss * 3.0).backward()
    check(out, expected)
    assert worst(student.grad / 3.0, expected.of_logits) <= 1e-12


@pytest.mark.parametrize("chunk_size", [None, 5])
@pytest.mark.parametrize("loss", ["plain", "bounded"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_value_and_gradients_from_hidden_states(recipe, loss, chunk_size):
    models, tokens = problem(1)
    expected = expected_of(models, tokens, LOSSES[loss], recipe)
    hidden, head = (tensor.clone().requires_grad_() for tensor in models[:2])
    arguments = (tokens.ids, tokens.owner, tokens.num_sequences, LOSSES[loss], RECIPES[recipe][0])
    options = {"inputs": {"position": tokens.position}, "chunk_size": chunk_size}
    out = linear_distillation_loss(hidden, head, *models[2:], *arguments, **options)
    out.loss.backward()
    check(out, expected)
    assert worst(hidden.grad, expected.of_hidden) <= 1e-12
    assert worst(head.grad, expected.of_head) <= 1e-12


@pytest.mark.parametrize("recipe", ["renio x length x entropy", "gate", "prefix"])
def test_in_fp32_it_is_the_same_within_rounding(recipe):
    models, tokens = problem(2)
    models = tuple(tensor.float() for tensor in models)
    expected = expected_of([tensor.double() for tensor in models], tokens, LOSSES["bounded"], recipe)
    hidden, head = (tensor.clone().requires_grad_() for tensor in models[:2])
    arguments = (tokens.ids, tokens.owner, tokens.num_sequences, LOSSES["bounded"], RECIPES[recipe][0])
    out = linear_distillation_loss(hidden, head, *models[2:], *arguments, inputs={"position": tokens.position})
    out.loss.backward()
    assert out.token_weights.dtype == torch.float32
    check(out, expected, 2e-5)
    assert worst(hidden.grad, expected.of_hidden) <= 2e-5 and worst(head.grad, expected.of_head) <= 2e-5


class Keeping(TeacherTargets):
    """Targets that keep what each token is multiplied by."""

    def __init__(self, count):
        self.scale = torch.full((count,), torch.nan, dtype=torch.float64)

    def micro_batch_loss(self, index, micro_batch, inputs):
        self.scale[micro_batch.token_index] = inputs.token_scale
        return MicroBatchLoss.of(inputs.token_scale.sum(), inputs.token_scale)


@pytest.mark.parametrize("recipe", ["length", "renio x length x entropy", "gate", "prefix"])
def test_what_multiplies_a_token_of_a_micro_batch(recipe):
    """W_i w_t / (N_i B), whatever micro-batch it is in; the learner divides by B."""
    models, tokens = problem(3)
    order = torch.argsort(tokens.owner, stable=True)
    models = tuple(x[order] if number % 2 == 0 else x for number, x in enumerate(models))
    tokens = SimpleNamespace(
        ids=tokens.ids[order], owner=tokens.owner[order], position=tokens.position[order], num_sequences=4
    )
    expected = expected_of(models, tokens, LOSSES["plain"], recipe)
    facts = vars(expected.facts)
    inputs = {name: facts[name] for name in ("student_entropy", "teacher_entropy", "position")}
    config = RECIPES[recipe][0]
    sample = sample_weights(
        facts["student_logp"], facts["teacher_logp"], tokens.owner, 4, config, inputs=inputs, report=None
    )
    rollouts = [Rollout(Prompt(i, (1,), (1,)), (2,) * len(mine)) for i, mine in enumerate(facts["of"])]
    targets = Keeping(len(tokens.ids))
    loss = WeightedLoss(targets, sample, LOSSES["plain"], HeadConfig())
    for index, batch in enumerate(collate(rollouts, audience="student", batch_layout=BatchLayout(0, 3))):
        loss(index, batch, torch.zeros(len(batch.target_ids), 2, dtype=torch.float64), None)
    assert worst(targets.scale / 4, expected.scale) <= 1e-15
    kept = torch.stack([expected.kept[mine].sum() for mine in facts["of"]])
    assert sample.denominators.tolist() == kept.tolist()
