"""Kernels are tuned before the first step: for what the step asks for, for nothing else, and only where they are timed.

The CPU's cases are `tuning_cases`, on two ranks, in one launch.
"""

from __future__ import annotations

import functools

import pytest
import torch

from renio_megatron import VocabShard
from renio_megatron.config import HeadConfig, LossConfig
from renio_megatron.losses import kernels, tune_kernels
from tests.helpers.multiprocess import run_ranks
from tests.helpers.training_cases import save_models
from tests.losses import tuning_cases

pytest.importorskip("triton", reason="triton is not installed")

CPU = torch.device("cpu")
no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
LOSS_KEYS = {"statistics", "weighted_gradient", "scale_rows_", "token_statistics"}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuning")
    save_models(folder)
    return run_ranks(tuning_cases.run_all, 2, folder, timeout=280)


def names(keys):
    return {key.split("'")[1] for key in keys}


def test_a_step_asks_for_what_was_tuned_and_tunes_nothing(results):
    assert len(results[0]) > 15
    for rank, found in enumerate(results):
        for name, case in found.items():
            where = f"{name}, rank {rank}"
            assert case["asked"] <= case["tuned"], where
            assert case["after"] == case["tuned"] == case["again"], where
            assert case["random state is unchanged"], where
            if name != "routes":  # of which not every rank has sequences of every teacher
                assert case["asked"] == case["tuned"], where


def test_the_kernels_that_are_tuned(results):
    for name, case in results[1].items():
        expected = LOSS_KEYS
        if "fine-tuning" in name:
            expected = {"token_statistics", "scale_rows_"}
        elif "0.05" in name or "JSD" in name or name in ("packed", "TP2", "PP2"):
            expected = LOSS_KEYS | {"clamped_sums"}
        assert names(case["tuned"]) == expected, name
        count = len(case["tuned"])
        (line,) = case["lines"]
        assert line.startswith(f"tuned {count} kernels in ") and f" s, {6 * count} cuts" in line


def test_a_stage_without_a_head_has_nothing_to_tune(results):
    first = results[0]["PP2"]
    assert not first["has head"] and not first["tuned"] and not first["lines"]
    assert results[1]["PP2"]["has head"]


def test_a_narrow_gradient_is_a_kind_of_its_own(results):
    (wide,) = [key for key in results[0]["forward KL, clip None"]["tuned"] if "weighted" in key]
    (narrow,) = [key for key in results[0]["bf16, forward KL, clip None"]["tuned"] if "weighted" in key]
    assert wide.count("float32") == 3
    assert narrow.count("float32") == 2 and narrow.count("bfloat16") == 1


def tune_everything(**changes):
    shared = {"hidden_dtype": torch.bfloat16, "num_tokens": 64, "device": CPU, **changes}
    shard, head = VocabShard(0, 20, 17), HeadConfig()
    with tune_kernels.tuning_reported(CPU):
        tune_kernels.tune_scores(shard, head, 1.0, **shared)
        tune_kernels.tune_cross_entropy(shard, **shared)
        tune_kernels.tune_loss(shard, LossConfig(), head, hidden_size=24, **shared)


def test_calls_that_are_never_large_are_left_out():
    """20 columns and 24 hidden numbers of up to 64 tokens, beside what is worth timing."""
    for least, count in ((20 * 64, 6), (20 * 64 + 1, 1), (24 * 64, 1), (24 * 64 + 1, 0)):
        with tuning_cases.played_gpu(least) as asked:
            tune_everything()
        assert len(asked.table) == count, least
    with tuning_cases.played_gpu(20 * 3 + 1) as asked:
        tune_kernels.tune_scores(
            VocabShard(0, 20, 17), HeadConfig(chunk_size=3), 1.0, hidden_dtype=torch.float32, num_tokens=64, device=CPU
        )
    assert not asked.table


def test_nothing_is_tuned_where_nothing_is_timed(monkeypatch):
    cuda = torch.device("cuda", 0)
    monkeypatch.delenv("RENIO_KERNELS", raising=False)
    assert kernels.tunes(cuda) and not kernels.tunes(CPU)
    monkeypatch.setenv("RENIO_KERNELS", "torch")
    assert not kernels.tunes(cuda)
    monkeypatch.setenv("RENIO_KERNELS", "triton")
    assert kernels.tunes(cuda)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert not kernels.tunes(cuda)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    monkeypatch.setattr(kernels, "_triton_ops", lambda: None)
    assert not kernels.tunes(cuda)
    monkeypatch.setattr(tune_kernels, "_random", None)  # would be called
    tune_everything()


def gpu_step(loss, dtype, logits):
    """A step's calls on a GPU, large enough to be timed: scores, the loss, its gradients."""
    from renio_megatron import linear_distillation_loss
    from renio_megatron.losses.token_logp import linear_token_logp
    from renio_megatron.parallel.vocab import LmHead

    tokens, vocab, size = 4096, 32768, 64
    device = torch.device("cuda", torch.cuda.current_device())
    draw = functools.partial(torch.randn, device=device, dtype=dtype)
    hidden, head = draw(tokens, size).requires_grad_(), draw(vocab, size).requires_grad_()
    shard, config = VocabShard(0, vocab, vocab - 100), HeadConfig(logits_dtype=logits)
    shared = {"hidden_dtype": dtype, "num_tokens": tokens, "device": device}

    def prepare():
        tune_kernels.tune_scores(shard, config, 1.0, **shared)
        tune_kernels.tune_loss(shard, loss, config, hidden_size=size, **shared)

    def step():
        ids, owner = torch.zeros(2, tokens, device=device, dtype=torch.int64)
        linear_token_logp(hidden, LmHead(head, shard), ids, config)
        out = linear_distillation_loss(
            *(hidden, head, draw(tokens, size), draw(vocab, size), ids, owner, 1, loss),
            shard=shard,
            weights=torch.ones(1, device=device),
            logits_dtype=torch.float32 if logits == "fp32" else dtype,
        )
        (0.5 * out.loss).backward()
        assert torch.isfinite(hidden.grad).all()

    return prepare, step


@pytest.mark.gpu
@no_gpu
@pytest.mark.parametrize("logits", ["fp32", "bf16"])
@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_a_step_on_a_gpu_tunes_nothing(beta, clip, logits, monkeypatch):
    from renio_megatron.losses.kernels import tuning

    monkeypatch.delenv("RENIO_KERNELS", raising=False)
    monkeypatch.setattr(tuning, "_fastest", {})
    prepare, step = gpu_step(LossConfig(beta=beta, entry_clip=clip), torch.bfloat16, logits)
    state, lines = torch.cuda.get_rng_state(), []
    with tune_kernels.tuning_reported(torch.device("cuda"), lines.append):
        prepare()
    assert torch.equal(state, torch.cuda.get_rng_state())
    before = dict(tuning._fastest)
    assert len(before) >= 3 and len(lines) == 1
    step()
    assert tuning._fastest == before
