"""Answers of teachers that are no hidden states fit without touching the algorithm; places chosen evenly."""

from __future__ import annotations

import pytest
import torch

from renio_megatron.training.targets import LossInputs, MicroBatchLoss, TeacherTargets, evenly_chosen
from renio_megatron.types import MicroBatch
from tests.training.roles import CAP, PROMPTS, RATIOS, TOKENS, WEIGHTS, Roles

LENGTHS = [len(tokens) for tokens in TOKENS]


class TopK(TeacherTargets):
    """The k most likely tokens of each position and their logarithms, as a server gives them; renormalized."""

    def __init__(self, logp: torch.Tensor, teacher_rows: torch.Tensor, k: int) -> None:
        self.logp = logp
        self._values, self._ids = teacher_rows.log_softmax(-1).topk(k)

    def micro_batch_loss(self, index: int, micro_batch: MicroBatch, inputs: LossInputs) -> MicroBatchLoss:
        tokens = micro_batch.token_index
        teacher = self._values[tokens].log_softmax(-1)
        student = (inputs.hidden @ inputs.head.weight.T).log_softmax(-1).gather(1, self._ids[tokens]).log_softmax(-1)
        divergence = (teacher.exp() * (teacher - student)).sum(-1)
        return MicroBatchLoss.of((inputs.token_scale * divergence).sum(), divergence.detach())


class SampledTokens(TeacherTargets):
    """Only log p_T of the sampled tokens, and not of all: the policy gradient of the log ratio, by importance."""

    def __init__(self, logp: torch.Tensor, has_logp: torch.Tensor) -> None:
        self.logp, self.has_logp = logp, has_logp
        self.seen: list[torch.Tensor] = []

    def micro_batch_loss(self, index: int, micro_batch: MicroBatch, inputs: LossInputs) -> MicroBatchLoss:
        assert inputs.sampler_logp is not None
        self.seen.append(inputs.sampler_logp)
        tokens = micro_batch.token_index
        logits = inputs.hidden @ inputs.head.weight.T
        student = logits.log_softmax(-1).gather(1, micro_batch.target_ids[:, None])[:, 0]
        advantage = torch.where(self.has_logp[tokens], self.logp[tokens] - student.detach(), 0.0)
        surrogate = -(student - inputs.sampler_logp).exp() * advantage
        return MicroBatchLoss.of((inputs.token_scale * surrogate).sum(), -advantage)


def scales(weights: list[float]) -> torch.Tensor:
    """Weight over tokens of the sequence, of each token; the step has 4 sequences."""
    pairs = zip(weights, LENGTHS, strict=True)
    return torch.tensor([weight / length / 4 for weight, length in pairs for _ in range(length)], dtype=torch.float64)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_most_likely_tokens_of_a_server(size):
    roles = Roles(size)
    algorithm = roles.distillation()
    algorithm.teacher.score = lambda rollouts, batches: TopK(roles.teacher_logp, roles.teacher_rows, 2)
    metrics = algorithm.step(PROMPTS, 1)

    leaf = roles.student.detach().clone().requires_grad_()
    rows, ids = roles.teacher_rows.topk(2)
    teacher, student = rows.softmax(-1), leaf.gather(1, ids).log_softmax(-1)
    divergence = torch.nn.functional.kl_div(student, teacher, reduction="none").sum(-1)
    (scales(WEIGHTS) * divergence).sum().backward()
    assert torch.allclose(roles.student.grad, leaf.grad, rtol=1e-5, atol=1e-8)
    assert metrics["loss"] == pytest.approx(float((scales(WEIGHTS) * divergence).sum()), rel=1e-5)
    assert metrics["loss/kl"] == pytest.approx(float(divergence.mean()), rel=1e-5)
    assert metrics["weight/max"] == pytest.approx(CAP)
    assert "loss/entry_clip_frac" not in metrics


def test_sampled_tokens_of_which_some_are_not_known():
    roles = Roles(2)
    has_logp = torch.ones(8, dtype=torch.bool)
    has_logp[[0, 1]] = False  # the first sequence, one of whose ratios is pivotal
    targets = SampledTokens(roles.teacher_logp.double(), has_logp)
    algorithm = roles.distillation()
    algorithm.teacher.score = lambda rollouts, batches: targets
    metrics = algorithm.step(PROMPTS, 1)
    assert torch.equal(torch.cat(targets.seen), torch.full((8,), roles.sampled_logp))

    # Without its ratios the first sequence has no pivotal token, and a raw weight of 1.
    raw = [1.0, *(raw_weight(ratios) for ratios in RATIOS[1:])]
    mean = sum(raw) / 4
    weights = [min(CAP, one / mean) for one in raw]
    assert metrics["renio/raw_weight_mean"] == pytest.approx(mean)
    leaf = roles.student.detach().clone().requires_grad_()
    student = leaf.log_softmax(-1).gather(1, torch.tensor([token for row in TOKENS for token in row])[:, None])[:, 0]
    advantage = torch.where(has_logp, roles.teacher_logp.double() - student.detach(), 0.0)
    loss = (scales(weights) * -(student - roles.sampled_logp).exp() * advantage).sum()
    loss.backward()
    assert torch.allclose(roles.student.grad, leaf.grad, rtol=1e-5, atol=1e-8)
    assert metrics["loss"] == pytest.approx(float(loss), rel=1e-5)


def raw_weight(ratios: tuple[float, ...]) -> float:
    """exp of the mean of those of at least .8, cut at 2.5; 1 without one."""
    pivotal = [min(ratio, 2.5) for ratio in ratios if min(ratio, 2.5) >= 0.8]
    return float(torch.tensor(sum(pivotal) / len(pivotal)).exp()) if pivotal else 1.0


@pytest.mark.parametrize("count", [0, 1, 2, 3, 5, 8])
@pytest.mark.parametrize("most", [1, 2, 3, 8, 20])
def test_places_are_chosen_evenly(count, most):
    mask = torch.zeros(12, dtype=torch.bool)
    mask[torch.randperm(12, generator=torch.Generator().manual_seed(count))[:count]] = True
    places, is_one = evenly_chosen(mask, most)
    all_of_them = mask.nonzero()[:, 0]
    assert places[is_one].tolist() == all_of_them[:: -(-count // most) or 1].tolist()
    assert len(places) == min(most, 12) and len(set(places.tolist())) == len(places)
