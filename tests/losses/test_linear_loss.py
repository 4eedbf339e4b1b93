"""`linear_distillation_loss` in one process: vectors, random models against the reference, edges, errors."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

from renio_megatron import LossConfig, VocabShard, WeightingConfig, linear_distillation_loss
from renio_megatron.errors import LayoutError
from renio_megatron.losses.chunk_size import chunk_size_for
from renio_megatron.losses.linear_distillation import buffer_bytes
from renio_megatron.objective.reference import reference_objective
from tests.helpers.vectors import DTYPES, exempt_entries, limit, load_cases, worst

LONG = torch.tensor([0, 1])


def problem(seed, *, rows=13, vocab=11, sizes=(5, 7), sequences=4, dtype=torch.float64):
    """Hidden states and heads of two models, ids and owners; the last sequence has no token."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    hidden, head = normal(rows, sizes[0]), normal(vocab, sizes[0])
    teacher_hidden, teacher_head = normal(rows, sizes[1]), normal(vocab, sizes[1])
    token_ids = torch.randint(0, vocab, (rows,), generator=generator)
    owner = torch.randint(0, sequences - 1, (rows,), generator=generator)
    return (hidden, head, teacher_hidden, teacher_head), (token_ids, owner, sequences)


def run(models, tokens, *args, trains=(True, True), **options):
    """(output, gradient of the hidden states, gradient of the head)."""
    hidden, head = (tensor.clone().requires_grad_(flag) for tensor, flag in zip(models, trains, strict=False))
    out = linear_distillation_loss(hidden, head, *models[2:], *tokens, *args, **options)
    out.loss.backward()
    return out, hidden.grad, head.grad


def expected_of(models, tokens, weights=None, **settings):
    """The same by autograd through the dense reference, from fp64 copies."""
    hidden, head, *of_teacher = (tensor.double().clone() for tensor in models)
    hidden.requires_grad_(), head.requires_grad_()
    logits, teacher_logits, (token_ids, owner, sequences) = linear(hidden, head), linear(*of_teacher), tokens
    found = reference_objective(logits, teacher_logits, *tokens, **settings)
    loss = found["loss"]
    if weights is not None:  # each sequence on its own, unweighted
        alone = [owner == i for i in range(sequences)]
        losses = [
            reference_objective(
                logits[i], teacher_logits[i], token_ids[i], torch.zeros_like(owner[i]), 1, uniform=True, **settings
            )["loss"]
            for i in alone
        ]
        loss = (torch.stack(losses) * weights).sum() / sequences
    loss.backward()
    return {**found, "loss": loss}, hidden.grad, head.grad


@pytest.mark.parametrize("chunk_size", [None, 7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", load_cases(), ids=lambda case: f"{case.number:02d}")
def test_reference_vectors(case, dtype, chunk_size):
    """Logits as hidden states under heads that are the identity: products with it are exact."""
    one = torch.eye(case.vocab, dtype=dtype)
    models = (case.student_logits.to(dtype), one, case.teacher_logits.to(dtype), one)
    tokens = (case.token_ids, case.owner, case.batch)
    out, gradient, _ = run(models, tokens, case.loss_config, case.weighting_config, chunk_size=chunk_size)
    assert torch.equal(out.is_pivotal, case.pivotal)
    for name in ("weights", "raw_weights", "log_ratio", "token_divergence"):
        assert worst(getattr(out, name), getattr(case, name)) <= limit(getattr(case, name), dtype), name
    assert worst(out.loss[None], case.loss) <= limit(case.loss, dtype)
    expected = case.grad_student_logits
    assert worst(gradient, expected, exempt_entries(case, dtype)) <= limit(expected, dtype)


@pytest.mark.parametrize("given", [False, True], ids=["computed", "given"])
@pytest.mark.parametrize("chunk_size", [1, 5, 13, 99, None])
@pytest.mark.parametrize("seed", range(6))
def test_random_models_against_the_reference(seed, chunk_size, given):
    models, tokens = problem(seed)
    settings = {
        "beta": (0.0, 0.3, 1.0)[seed % 3],
        "temperature": (1.0, 1.1)[seed % 2],
        "entry_clip": (None, 0.05)[seed // 3],
    }
    weights = torch.tensor([3.0, 0.0, 0.5, 2.0], dtype=torch.float64) if given else None
    expected, of_hidden, of_head = expected_of(models, tokens, weights, **settings)
    out, hidden, head = run(models, tokens, LossConfig(**settings), chunk_size=chunk_size, weights=weights)
    names = ("loss", "raw_weights", "log_ratio", "token_divergence", *(() if given else ("weights",)))
    for name in names:
        torch.testing.assert_close(getattr(out, name), expected[name].detach(), rtol=0, atol=1e-12, msg=name)
    torch.testing.assert_close(hidden, of_hidden, rtol=0, atol=1e-12)
    torch.testing.assert_close(head, of_head, rtol=0, atol=1e-12)


@pytest.mark.parametrize("trains", [(True, False), (False, True), (False, False)])
def test_what_is_frozen_gets_no_gradient(trains):
    models, tokens = problem(1)
    _, *expected = expected_of(models, tokens)
    if not any(trains):
        assert not linear_distillation_loss(*models, *tokens).loss.requires_grad
        return
    _, *found = run(models, tokens, trains=trains)
    for flag, mine, theirs in zip(trains, found, expected, strict=True):
        assert (mine is not None) == flag
        if flag:
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_no_gradient_is_made_without_grad_mode():
    models, tokens = problem(1)
    models[0].requires_grad_()
    with torch.no_grad():
        out = linear_distillation_loss(*models, *tokens)
    assert not out.loss.requires_grad
    torch.testing.assert_close(out.loss, expected_of([m.detach() for m in models], tokens)[0]["loss"].detach())


@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_megatrons_gradient_buffer_gets_the_heads_gradient_once(factor):
    models, tokens = problem(2)
    _, _, of_head = expected_of(models, tokens)
    head = models[1].clone().requires_grad_()
    main_grad = torch.full(head.shape, 2.0, dtype=torch.float64)
    hook_ran = []
    head.register_post_accumulate_grad_hook(lambda parameter: hook_ran.append(parameter.grad.clone()))
    out = linear_distillation_loss(models[0], head, *models[2:], *tokens, main_grad=main_grad)
    (out.loss * factor).backward()
    torch.testing.assert_close(main_grad, 2.0 + factor * of_head, rtol=0, atol=1e-12)
    assert len(hook_ran) == 1
    assert not hook_ran[0].any(), "what autograd adds to the buffer afterwards is zero"


def test_a_tied_embedding_gets_both_gradients():
    models, tokens = problem(3, sizes=(5, 7))
    table = models[1].clone().requires_grad_()
    ids = torch.arange(13) % 11
    linear_distillation_loss(table[ids].tanh(), table, *models[2:], *tokens).loss.backward()
    oracle = models[1].clone().requires_grad_()
    logits = linear(oracle[ids].tanh(), oracle)
    reference_objective(logits, linear(*models[2:]), *tokens)["loss"].backward()
    torch.testing.assert_close(table.grad, oracle.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("student", "teacher"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_student_and_teacher_may_have_different_dtypes(student, teacher):
    models, tokens = problem(9, rows=40, vocab=53, sizes=(24, 40), dtype=torch.float32)
    dtypes = [getattr(torch, name) for name in (student, student, teacher, teacher)]
    models = [(0.4 * tensor).to(dtype) for tensor, dtype in zip(models, dtypes, strict=True)]
    settings = {"beta": 0.0, "entry_clip": None}
    out, *gradients = run(models, tokens, LossConfig(**settings), chunk_size=7)
    expected, *others = expected_of(models, tokens, **settings)
    assert out.loss.item() == pytest.approx(expected["loss"].item(), rel=2e-6)
    for mine, other in zip(gradients, others, strict=True):
        assert mine.dtype == dtypes[0]
        limit = 1e-5 if dtypes[0] == torch.float32 else 2**-7
        assert float((mine - other).abs().max()) <= limit * float(other.abs().max())


def test_bf16_models_with_fp32_logits_are_exact_to_the_gradients_rounding():
    models, tokens = problem(4, rows=64, vocab=101, sizes=(24, 40), dtype=torch.bfloat16)
    models = tuple(0.4 * tensor for tensor in models)
    settings = {"beta": 0.0, "entry_clip": None}
    expected, of_hidden, of_head = expected_of(models, tokens, **settings)
    out, hidden, head = run(models, tokens, LossConfig(**settings), chunk_size=20)
    torch.testing.assert_close(out.loss.double(), expected["loss"].detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(out.log_ratio.double(), expected["log_ratio"].detach(), rtol=0, atol=1e-5)
    for mine, theirs in ((hidden, of_hidden), (head, of_head)):
        assert mine.dtype == torch.bfloat16
        assert float((mine.double() - theirs).abs().max() / theirs.abs().max()) < 2.0**-7
    narrow, *_ = run(models, tokens, LossConfig(**settings), logits_dtype=torch.bfloat16)
    torch.testing.assert_close(narrow.loss.double(), expected["loss"].detach(), rtol=2e-2, atol=0)


def test_a_bf16_heads_gradient_is_summed_in_fp32():
    """Many equal contributions, each below the rounding of their sum: bf16 sums would stop growing."""
    rows = 4096
    hidden = torch.full((rows, 1), 1.0, dtype=torch.bfloat16)
    head = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    teacher_head = torch.tensor([[0.0], [1.0]], dtype=torch.bfloat16)
    main_grad = torch.zeros(2, 1)
    token = torch.zeros(rows, dtype=torch.int64)
    out = linear_distillation_loss(
        hidden, head, hidden, teacher_head, token, torch.arange(rows), rows, chunk_size=8, main_grad=main_grad,
        weighting=WeightingConfig(name="uniform"),
    )  # fmt: skip
    (out.loss * rows).backward()
    each = torch.tensor(0.5 - 1 / (1 + torch.e)).to(torch.bfloat16).item()
    assert float(main_grad[0]) == pytest.approx(rows * each, rel=1e-5)


def test_no_tokens_at_all():
    models, (token_ids, owner, sequences) = problem(5)
    hidden, head, teacher_hidden, teacher_head = models
    out, of_hidden, of_head = run(
        (hidden[:0], head, teacher_hidden[:0], teacher_head), (token_ids[:0], owner[:0], sequences)
    )
    assert float(out.loss.detach()) == 0.0
    assert of_hidden.shape == (0, 5)
    assert not of_head.any()


def test_padding_columns_count_for_nothing():
    models, tokens = problem(6)
    hidden, head, teacher_hidden, teacher_head = models
    padded = (hidden, torch.cat((head, 9 * head[:3])), teacher_hidden, torch.cat((teacher_head, teacher_head[:3])))
    _, of_hidden, of_head = expected_of(models, tokens)
    _, found_hidden, found_head = run(padded, tokens, LossConfig(), WeightingConfig(), VocabShard(0, 14, 11))
    torch.testing.assert_close(found_hidden, of_hidden, rtol=0, atol=1e-12)
    torch.testing.assert_close(found_head[:11], of_head, rtol=0, atol=1e-12)
    assert not found_head[11:].any()


def test_the_same_bits_run_to_run():
    models, tokens = problem(7, rows=300, vocab=157, sizes=(32, 48), dtype=torch.float32)
    first, second = (run(models, tokens, LossConfig(beta=0.5, entry_clip=0.05), chunk_size=64) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[1:], second[1:], strict=True))
    assert torch.equal(first[0].loss, second[0].loss)


def test_inputs_are_never_changed():
    models, tokens = problem(8)
    before = [tensor.clone() for tensor in models]
    run(models, tokens, chunk_size=4)
    assert all(torch.equal(a, b) for a, b in zip(models, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_follows_the_chunk_not_the_batch(dtype):
    """Beyond the results and inputs: the declared buffers, and what the passes work with at a time."""
    measure = pytest.importorskip("loss_bench.measure", reason="needs the source tree")
    vocab, size, chunk = 8192, 16, 256
    extra = []
    for rows in (512, 1024):
        models, (token_ids, owner, sequences) = problem(9, rows=rows, vocab=vocab, sizes=(size, size), dtype=dtype)
        hidden, head = models[0].requires_grad_(), models[1].requires_grad_()
        weights = torch.ones(sequences)

        def forward(hidden=hidden, head=head, models=models, token_ids=token_ids, owner=owner, weights=weights):
            return linear_distillation_loss(
                hidden, head, *models[2:], token_ids, owner, 4, LossConfig(beta=0.5, entry_clip=0.05), chunk_size=chunk,
                weights=weights,
            )  # fmt: skip

        results = rows * size * dtype.itemsize + vocab * size * 4
        extra.append(measure.peak_bytes(forward, torch.device("cpu")) - results)
    declared = buffer_bytes(1024, vocab, dtype, None, chunk)
    assert declared == chunk * vocab * (8 if dtype == torch.float32 else 10)
    assert extra[0] > declared
    vectors = 512 * 200  # a few dozen numbers a token
    assert abs(extra[1] - extra[0]) < vectors
    assert extra[1] < 2 * declared * 1.05 + vectors + WORKING_BYTES


WORKING_BYTES = 48 << 20  # of the PyTorch passes over a few rows; the Triton passes have none


@pytest.mark.parametrize(
    ("num_tokens", "token_bytes", "chunk_size", "expected"),
    [(0, 8, None, 1), (1, 8, None, 1), (10_000, 1 << 20, None, 2000), (4096, 1 << 20, None, 2048), (9, 8, 4, 4)],
)
def test_chunks_are_even_and_no_shorter_than_worth_while(num_tokens, token_bytes, chunk_size, expected):
    assert chunk_size_for(num_tokens, token_bytes, chunk_size) == expected


GOOD = {
    "student_hidden": torch.zeros(2, 3),
    "student_head": torch.zeros(4, 3),
    "teacher_hidden": torch.zeros(2, 5),
    "teacher_head": torch.zeros(4, 5),
    "token_ids": LONG,
    "owner": LONG,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student_hidden": torch.zeros(2, 2)}, "student_hidden has hidden size 2, student_head 3"),
        ({"teacher_head": torch.zeros(4, 3)}, "teacher_hidden has hidden size 5, teacher_head 3"),
        ({"student_hidden": torch.zeros(1, 2, 3)}, r"student_hidden must be \[N, H\]"),
        ({"teacher_head": torch.zeros(5, 5)}, r"teacher_head has 5 rows, the shard \[0, 4\) has 4"),
        ({"shard": VocabShard(0, 6, 6)}, "student_head has 4 rows"),
        ({"teacher_hidden": torch.zeros(3, 5)}, "student_hidden has 2 tokens, teacher_hidden 3"),
        ({"student_head": torch.zeros(4, 3).bfloat16()}, "student_hidden is torch.float32, student_head torch.bfloat"),
        ({"teacher_hidden": torch.zeros(2, 5).double(), "teacher_head": torch.zeros(4, 5).double()}, "fp64 wants both"),
        ({"teacher_head": torch.zeros(4, 5, device="meta")}, "student_hidden are on cpu, teacher_head on meta"),
        ({"student_hidden": torch.zeros(2, 3).int(), "student_head": torch.zeros(4, 3).int()}, "floating dtype"),
        ({"token_ids": LONG + 3}, r"token_ids must lie in \[0, 4\)"),
        ({"owner": LONG[:1]}, r"owner must be int64 \[2\]"),
        ({"weights": torch.ones(3)}, r"weights must be \[2\]"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
        ({"logits_dtype": torch.float16}, "logits_dtype must be torch.float32 or"),
        ({"main_grad": torch.zeros(4, 2)}, r"main_grad must be like student_head, \(4, 3\)"),
    ],
)
def test_arguments_that_do_not_fit(change, message):
    with pytest.raises(LayoutError, match=message):
        linear_distillation_loss(**{**GOOD, "num_sequences": 2, **change})


def test_a_second_backward_says_why_not():
    models, tokens = problem(10)
    models[0].requires_grad_()
    loss = linear_distillation_loss(*models, *tokens).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="ran twice"):
        loss.backward()
