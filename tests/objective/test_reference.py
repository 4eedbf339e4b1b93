"""objective/reference.py, the oracle of the other tests: against the reference vectors and against hand calculation."""

from __future__ import annotations

import math

import pytest
import torch

from renio_megatron.objective.reference import reference_objective
from tests.helpers.vectors import entries, exempt_entries, load_cases, worst

LN3 = math.log(3.0)


@pytest.mark.parametrize("case", load_cases(), ids=lambda case: f"{case.number:02d}")
def test_reference_agrees_with_the_vectors(case):
    student = case.student_logits.clone().requires_grad_()
    loss, weighting, renio = case.loss_config, case.weighting_config, case.renio_config
    out = reference_objective(
        student,
        case.teacher_logits,
        case.token_ids,
        case.owner,
        case.batch,
        beta=loss.beta,
        temperature=loss.temperature,
        entry_clip=loss.entry_clip,
        threshold=renio.threshold,
        ceiling=renio.ceiling,
        weight_temperature=renio.temperature,
        normalize=renio.normalize == "batch",
        uniform=weighting.name == "uniform",
    )
    out["loss"].backward()
    assert torch.equal(out["is_pivotal"], case.pivotal)
    pairs = {
        "loss": (out["loss"][None], case.loss),
        "weights": (out["weights"], case.weights),
        "raw_weights": (out["raw_weights"], case.raw_weights),
        "log_ratio": (out["log_ratio"], case.log_ratio),
        "token_divergence": (out["token_divergence"], case.token_divergence),
        "gradient": (student.grad, case.grad_student_logits),
    }
    for name, (found, expected) in pairs.items():
        assert worst(found, expected) <= 1e-12, name


def test_the_vectors_hold_what_the_tests_rely_on():
    cases = load_cases()
    assert len(cases) == 27
    assert float(cases[24].weights.max()) == 10.0  # the cap binds
    few = 0
    for case in cases:
        exempt = exempt_entries(case, torch.float32)
        assert exempt.sum() <= 0.05 * exempt.numel(), f"case {case.number}: {int(exempt.sum())} entries near a bound"
        few += int(exempt.sum())
        if case.settings["entry_clip"] is None:
            assert worst(entries(case).sum(-1), case.token_divergence) <= 1e-12  # what exempt_entries is built on
    assert few <= 0.01 * sum(case.student_logits.numel() for case in cases)
    # No token is so near the threshold that fp32 could take it for the other side.
    assert all(float((case.log_ratio - case.settings["threshold"]).abs().min()) > 1e-4 for case in cases)


def swapped_pair(**settings):
    """Two sequences of one token: (3/4, 1/4) against (1/4, 3/4), and two equal models; token 0 both times."""
    student = torch.tensor([[LN3, 0.0], [0.0, 0.0]], dtype=torch.float64)
    teacher = torch.tensor([[0.0, LN3], [0.0, 0.0]], dtype=torch.float64)
    return reference_objective(student, teacher, torch.tensor([0, 0]), torch.tensor([0, 1]), 2, **settings)


@pytest.mark.parametrize(
    ("settings", "divergence"),
    [
        ({"beta": 0.0}, 0.5 * LN3),  # 1/4 ln(1/3) + 3/4 ln 3
        ({"beta": 1.0}, 0.5 * LN3),  # the same, as the pair is symmetric
        ({"beta": 0.5}, math.log(2.0) + 0.25 * math.log(0.25) + 0.75 * math.log(0.75)),  # ln 2 - entropy
        ({"beta": 0.0, "entry_clip": 0.05}, 0.05),  # -0.27 becomes 0, 0.82 becomes 0.05
        ({"beta": 0.0, "entry_clip": 0.05, "entry_floor": None}, 0.05 - 0.25 * LN3),
    ],
    ids=["forward", "reverse", "jsd", "bounded", "bounded above"],
)
def test_loss_by_hand(settings, divergence):
    out = swapped_pair(**settings)
    assert out["is_pivotal"].tolist() == [True, False]  # ln 3 = 1.0986 and 0, against 0.8
    torch.testing.assert_close(out["raw_weights"], torch.tensor([3.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(out["weights"], torch.tensor([1.5, 0.5], dtype=torch.float64))
    torch.testing.assert_close(out["token_divergence"], torch.tensor([divergence, 0.0], dtype=torch.float64))
    assert out["loss"].item() == pytest.approx(1.5 * divergence / 2)


def test_settings_of_the_weight_by_hand():
    def raw(**settings):
        return swapped_pair(**settings)["raw_weights"][0].item()

    assert raw(ceiling=1.0) == pytest.approx(math.e)
    assert raw(weight_temperature=0.5) == pytest.approx(9.0)
    assert raw(threshold=1.2) == 1.0
    assert raw(temperature=2.0) == 1.0  # ratio ln 3 / 2 = 0.55
    assert swapped_pair(cap=1.2)["weights"].tolist() == pytest.approx([1.2, 0.5])
    assert swapped_pair(normalize=False, cap=1.2)["weights"].tolist() == pytest.approx([3.0, 1.0])
    assert swapped_pair(uniform=True)["weights"].tolist() == [1.0, 1.0]


def test_a_sequence_is_the_mean_of_its_tokens_and_the_batch_the_mean_of_its_sequences():
    student = torch.tensor([[LN3, 0.0], [0.0, 0.0], [LN3, 0.0]], dtype=torch.float64)
    teacher = torch.tensor([[0.0, LN3], [0.0, 0.0], [0.0, LN3]], dtype=torch.float64)
    owner = torch.tensor([0, 0, 2])  # sequence 1 has no token
    out = reference_objective(student, teacher, torch.tensor([1, 1, 1]), owner, 3, uniform=True)
    assert out["loss"].item() == pytest.approx((0.25 * LN3 + 0.0 + 0.5 * LN3) / 3)
