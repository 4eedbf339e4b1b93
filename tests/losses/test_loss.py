"""`distillation_loss` in one process: the reference vectors, random problems, edges of the domain."""

from __future__ import annotations

import math

import pytest
import torch

from renio_megatron import LossConfig, VocabShard, WeightingConfig, distillation_loss
from renio_megatron.errors import ConfigError
from renio_megatron.objective.reference import reference_objective
from tests.helpers.vectors import DTYPES, exempt_entries, limit, load_cases, worst

INF = float("inf")
UNIFORM = WeightingConfig(name="uniform")


def problem(seed, *, rows=12, columns=11, sequences=4, dtype=torch.float64):
    """Logits of two models that disagree enough for pivotal tokens, ids and owners; the last sequence is empty."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, rows, columns, generator=generator, dtype=torch.float64).mul_(1.5).to(dtype)
    token_ids = torch.randint(0, columns, (rows,), generator=generator)
    owner = torch.randint(0, sequences - 1, (rows,), generator=generator)
    return student, teacher, token_ids, owner, sequences


def value_and_gradient(student, *args, **kwargs):
    student = student.clone().requires_grad_()
    out = distillation_loss(student, *args, **kwargs)
    out.loss.backward()
    return out, student.grad


@pytest.mark.parametrize("overwrite", [False, True], ids=["keep", "overwrite"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", load_cases(), ids=lambda case: f"{case.number:02d}")
def test_reference_vectors(case, dtype, overwrite):
    out, gradient = value_and_gradient(
        case.student_logits.to(dtype),
        case.teacher_logits.to(dtype),
        case.token_ids,
        case.owner,
        case.batch,
        case.loss_config,
        case.weighting_config,
        overwrite_logits=overwrite,
    )
    assert torch.equal(out.is_pivotal, case.pivotal)
    for name, found, expected in (
        ("loss", out.loss[None], case.loss),
        ("weights", out.weights, case.weights),
        ("raw_weights", out.raw_weights, case.raw_weights),
        ("log_ratio", out.log_ratio, case.log_ratio),
        ("token_divergence", out.token_divergence, case.token_divergence),
    ):
        assert worst(found, expected) <= limit(expected, dtype), name
    expected = case.grad_student_logits
    assert worst(gradient, expected, exempt_entries(case, dtype)) <= limit(expected, dtype)


@pytest.mark.parametrize("seed", range(12))
def test_random_problems_against_the_reference(seed):
    student, teacher, token_ids, owner, sequences = problem(seed)
    settings = {
        "beta": (0.0, 0.3, 1.0, 0.8)[seed % 4],
        "temperature": (1.0, 1.1, 0.7)[seed % 3],
        "entry_clip": (None, 0.05, 0.2)[seed // 4],
        "entry_floor": (0.0, None)[seed % 2],
    }
    oracle = student.clone().requires_grad_()
    expected = reference_objective(oracle, teacher, token_ids, owner, sequences, **settings)
    expected["loss"].backward()
    out, gradient = value_and_gradient(student, teacher, token_ids, owner, sequences, LossConfig(**settings))
    for name in ("loss", "weights", "raw_weights", "log_ratio", "token_divergence"):
        torch.testing.assert_close(getattr(out, name), expected[name].detach(), rtol=0, atol=1e-12, msg=name)
    torch.testing.assert_close(gradient, oracle.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bounds", [(None, 0.0), (0.05, 0.0), (0.05, None)], ids=["free", "bounded", "bounded above"])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_gradcheck(beta, bounds):
    student, teacher, token_ids, owner, sequences = problem(21, rows=6, columns=7)
    loss = LossConfig(beta=beta, temperature=1.1, entry_clip=bounds[0], entry_floor=bounds[1])
    weights = torch.tensor([0.5, 1.7, 1.0, 3.0], dtype=torch.float64)  # given, as weights are constants of the gradient

    class Loss(torch.autograd.Function):
        """Keeps the gradient, because gradcheck runs backward twice and the loss hands its gradient over once."""

        @staticmethod
        def forward(ctx, logits):
            with torch.enable_grad():
                out, gradient = value_and_gradient(
                    logits.detach(), teacher, token_ids, owner, sequences, loss, weights=weights
                )
            ctx.save_for_backward(gradient)
            return out.loss.detach()

        @staticmethod
        def backward(ctx, upstream):
            return upstream * ctx.saved_tensors[0]

    assert torch.autograd.gradcheck(Loss.apply, (student.requires_grad_(),), atol=1e-7)


@pytest.mark.parametrize("name", ["renio", "uniform", "length"])
def test_weights_of_sequences_have_mean_one_over_the_batch(name):
    settings = {} if name == "uniform" else {"cap": None}
    out = distillation_loss(*problem(1), weighting=WeightingConfig(name=name, **settings))
    assert out.weights.mean().item() == pytest.approx(1.0)
    renio = distillation_loss(*problem(1))
    assert torch.equal(out.raw_weights, renio.raw_weights)  # ReNIO's, whatever the weighting
    assert torch.equal(out.is_pivotal, renio.is_pivotal) and out.is_pivotal.any()


def test_uniform_weights_are_one():
    out = distillation_loss(*problem(1), weighting=UNIFORM)
    assert out.weights.tolist() == [1.0] * 4
    assert float(out.raw_weights.max()) > 1.0


@pytest.mark.parametrize("settings", [{"normalize": "none"}, {"cap": 0.5}, {"threshold": 0.3}])
def test_settings_of_another_weighting_are_refused(settings):
    with pytest.raises(ConfigError, match=f"weighting.{next(iter(settings))} is no setting of name=uniform"):
        WeightingConfig(name="uniform", **settings)


@pytest.mark.parametrize("normalize", ["batch", "group"])
def test_one_sequence_weighs_one(normalize):
    student, teacher, token_ids, owner, _ = problem(1)
    out = distillation_loss(
        student,
        teacher,
        token_ids,
        owner * 0,
        1,
        weighting=WeightingConfig(normalize=normalize, group_size=3 if normalize == "group" else None),
    )
    assert out.raw_weights.item() > 2.0 and out.weights.tolist() == [1.0]


def test_cap_bounds_batch_and_group_only():
    raw = distillation_loss(*problem(1)).raw_weights
    assert raw.max() > 1.3 * raw.mean()

    def weights(**settings):
        return distillation_loss(*problem(1), weighting=WeightingConfig(cap=1.2, **settings)).weights

    torch.testing.assert_close(weights(), (raw / raw.mean()).clamp(max=1.2))
    pairs = torch.cat([pair / pair.mean() for pair in raw.split(2)])
    torch.testing.assert_close(weights(normalize="group", group_size=2), pairs.clamp(max=1.2))
    torch.testing.assert_close(weights(normalize="none"), raw)
    torch.testing.assert_close(weights(normalize="ema"), raw / raw.mean())


def test_moving_average_over_three_steps():
    weighting, state, average = WeightingConfig(normalize="ema"), None, None
    for seed in (1, 2, 3):
        out = distillation_loss(*problem(seed), weighting=weighting, state=state)
        mean = out.raw_weights.mean()
        average = mean if average is None else 0.1 * mean + 0.9 * average
        torch.testing.assert_close(out.weights, out.raw_weights / average)
        torch.testing.assert_close(out.state.to(average), average)
        state = out.state
    assert distillation_loss(*problem(1)).state is None


def test_given_weights_and_lengths_are_applied():
    student, teacher, token_ids, owner, sequences = problem(5)
    weights = torch.tensor([0.5, 2.0, 0.0, 1.0], dtype=torch.float64)
    lengths = torch.tensor([20, 30, 40, 7])
    out, gradient = value_and_gradient(
        student, teacher, token_ids, owner, sequences, weights=weights, sequence_lengths=lengths
    )
    assert torch.equal(out.weights, weights)
    assert torch.equal(out.raw_weights, distillation_loss(*problem(5)).raw_weights)
    scale = (weights / lengths / sequences)[owner]
    assert out.loss.item() == pytest.approx(float((scale * out.token_divergence).sum()), abs=1e-15)
    expected = scale[:, None] * (student.softmax(-1) - teacher.softmax(-1))
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-14)


def test_sequences_without_tokens_count_in_the_denominator():
    student, teacher, token_ids, owner, _ = problem(3)
    few, _ = value_and_gradient(student, teacher, token_ids, owner, 3, weighting=UNIFORM)
    many, _ = value_and_gradient(student, teacher, token_ids, owner, 6, weighting=UNIFORM)
    assert many.loss.item() == pytest.approx(few.loss.item() / 2)
    assert distillation_loss(student, teacher, token_ids, owner, 6).raw_weights[3:].tolist() == [1.0] * 3


@pytest.mark.parametrize("sequences", [0, 3])
@pytest.mark.parametrize("normalize", ["batch", "group", "ema", "none"])
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_no_tokens_at_all(beta, normalize, sequences):
    weighting = WeightingConfig(normalize=normalize, group_size=2 if normalize == "group" else None)
    nothing = torch.empty(0, dtype=torch.int64)
    out, gradient = value_and_gradient(
        torch.empty(0, 5), torch.empty(0, 5), nothing, nothing, sequences, LossConfig(beta=beta), weighting
    )
    assert out.loss.item() == 0.0 and gradient.shape == (0, 5)
    assert out.weights.tolist() == [1.0] * sequences
    assert (
        out.log_ratio.shape == out.is_pivotal.shape == out.token_divergence.shape == out.clipped_entries.shape == (0,)
    )


@pytest.mark.parametrize("overwrite", [False, True], ids=["keep", "overwrite"])
@pytest.mark.parametrize("entry_clip", [None, 0.05])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_logits_compute_in_fp32(dtype, beta, entry_clip, overwrite):
    student, teacher, token_ids, owner, sequences = problem(8, dtype=dtype)
    loss = LossConfig(beta=beta, entry_clip=entry_clip)
    exact, exact_gradient = value_and_gradient(student.double(), teacher.double(), token_ids, owner, sequences, loss)
    out, gradient = value_and_gradient(student, teacher, token_ids, owner, sequences, loss, overwrite_logits=overwrite)
    assert gradient.dtype == dtype and out.loss.dtype == out.weights.dtype == torch.float32
    assert out.loss.item() == pytest.approx(exact.loss.item(), rel=1e-5)
    torch.testing.assert_close(out.log_ratio.double(), exact.log_ratio, rtol=0, atol=1e-5)
    # Each entry is rounded once to the logits' dtype; fp16 below its normal range rounds to multiples of 2^-24.
    half_step = exact_gradient.abs() * torch.finfo(dtype).eps / 2 + torch.finfo(dtype).smallest_normal * 2**-10
    assert torch.all((gradient.double() - exact_gradient).abs() <= half_step + 1e-6 * exact_gradient.abs().max())


@pytest.mark.parametrize("entry_clip", [None, 0.05])
@pytest.mark.parametrize("both", [True, False], ids=["both", "teacher only"])
def test_forward_kl_where_a_column_is_impossible(both, entry_clip):
    student, teacher, token_ids, owner, sequences = problem(9)
    column = 4
    token_ids = torch.where(token_ids == column, 5, token_ids)
    teacher[:, column] = -INF
    if both:
        student[:, column] = -INF
    loss = LossConfig(entry_clip=entry_clip)
    out, gradient = value_and_gradient(student, teacher, token_ids, owner, sequences, loss)
    if both:  # as if the column did not exist
        kept = [j for j in range(11) if j != column]
        expected, expected_gradient = value_and_gradient(
            student[:, kept], teacher[:, kept], token_ids - (token_ids > column).long(), owner, sequences, loss
        )
        gradient, gone = gradient[:, kept], gradient[:, column]
        assert torch.all(gone == 0)
    else:  # as if the teacher's logit were very small
        teacher[:, column] = -600.0
        expected, expected_gradient = value_and_gradient(student, teacher, token_ids, owner, sequences, loss)
    for name in ("loss", "weights", "log_ratio", "token_divergence"):
        torch.testing.assert_close(getattr(out, name), getattr(expected, name), rtol=0, atol=1e-13, msg=name)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-13)


def test_a_token_that_the_teacher_excludes_is_pivotal_at_the_ceiling():
    student, teacher = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([[0.0, -INF]], dtype=torch.float64)
    index = torch.tensor([0])
    out = distillation_loss(student, teacher, index + 1, index, 1, weighting=WeightingConfig(normalize="none"))
    assert out.log_ratio.item() == INF and out.weights.item() == pytest.approx(math.exp(2.5))
    assert out.loss.item() == pytest.approx(math.exp(2.5) * math.log(2.0))


@pytest.mark.parametrize("padding", [float("nan"), INF, 1e9])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_padding_columns_are_never_read(beta, padding):
    student, teacher, token_ids, owner, sequences = problem(10)
    expected, expected_gradient = value_and_gradient(
        student, teacher, token_ids, owner, sequences, LossConfig(beta=beta)
    )
    wide = [torch.cat((logits, torch.full((12, 3), padding, dtype=logits.dtype)), 1) for logits in (student, teacher)]
    out, gradient = value_and_gradient(
        *wide, token_ids, owner, sequences, LossConfig(beta=beta), shard=VocabShard(0, 14, 11)
    )
    assert torch.equal(out.loss, expected.loss)
    assert torch.equal(gradient[:, :11], expected_gradient) and torch.all(gradient[:, 11:] == 0)


def test_clipped_entries_are_counted():
    student, teacher, token_ids, owner, sequences = problem(11)
    out = distillation_loss(student, teacher, token_ids, owner, sequences, LossConfig(entry_clip=0.05))
    entry = teacher.softmax(-1) * (teacher.log_softmax(-1) - student.log_softmax(-1))
    assert out.clipped_entries.tolist() == (entry > 0.05).sum(1).tolist() and out.clipped_entries.any()
    assert not distillation_loss(student, teacher, token_ids, owner, sequences).clipped_entries.any()


@pytest.mark.parametrize("loss", [LossConfig(), LossConfig(beta=0.5, entry_clip=0.05)], ids=["one pass", "two passes"])
def test_overwriting(loss):
    student, teacher, token_ids, owner, sequences = problem(12)
    copies = [x.clone() for x in (student, teacher, token_ids, owner)]
    seen = []

    def run(overwrite):
        logits = student.clone().requires_grad_() * 1.0  # what a head returns: not a leaf
        logits.register_hook(seen.append)
        out = distillation_loss(logits, teacher, token_ids, owner, sequences, loss, overwrite_logits=overwrite)
        out.loss.backward()
        return logits.detach()

    kept = run(False)
    assert all(torch.equal(x, copy) for x, copy in zip((kept, teacher, token_ids, owner), copies, strict=True))
    assert seen[0].untyped_storage().data_ptr() != kept.untyped_storage().data_ptr()
    overwritten = run(True)
    assert seen[1].untyped_storage().data_ptr() == overwritten.untyped_storage().data_ptr()
    assert torch.equal(seen[0], seen[1]) and torch.equal(overwritten, seen[0])
    assert all(torch.equal(x, copy) for x, copy in zip((teacher, token_ids, owner), copies[1:], strict=True))


def test_nothing_is_written_where_no_gradient_is_wanted():
    student, teacher, *rest = problem(12)
    before = student.clone()
    assert distillation_loss(student, teacher, *rest, overwrite_logits=True).loss.grad_fn is None
    with torch.no_grad():
        distillation_loss(student.requires_grad_(), teacher, *rest, overwrite_logits=True)
    assert torch.equal(student, before)


def test_backward_multiplies_by_the_upstream_and_runs_once():
    student, *rest = problem(13)
    _, gradient = value_and_gradient(student, *rest)
    logits = student.clone().requires_grad_()
    scaled = distillation_loss(logits, *rest).loss * 4.0
    scaled.backward(retain_graph=True)
    torch.testing.assert_close(logits.grad, gradient * 4.0)
    with pytest.raises(RuntimeError, match="ran twice"):
        scaled.backward()


def test_an_upstream_beyond_the_range_of_fp16_logits():
    student, *rest = problem(13, dtype=torch.float16)
    _, gradient = value_and_gradient(student, *rest)
    logits = student.clone().requires_grad_()
    (distillation_loss(logits, *rest).loss * 2.0**17).backward()  # a loss scale
    assert float(gradient.abs().max()) * 2.0**17 < 65504
    torch.testing.assert_close(logits.grad, gradient * 2.0**10 * 2.0**7)


def test_only_the_loss_carries_a_gradient():
    student, *rest = problem(13)
    out = distillation_loss(student.requires_grad_(), *rest)
    assert out.loss.requires_grad
    assert not any(value.requires_grad for name, value in vars(out).items() if name != "loss" and value is not None)
