"""token_logp and cross_entropy against torch.nn.functional, whole and over uneven, padded and empty shards."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from renio_megatron.losses.token_logp import cross_entropy, token_logp
from renio_megatron.parallel.vocab import VocabShard
from tests.helpers.multiprocess import run_ranks
from tests.helpers.sharding import VOCABULARY_CUTS, columns, counting, vocabulary_edges
from tests.helpers.vectors import worst

ROWS, VOCAB, RANKS = 19, 37, 3
LIMITS = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 5e-6}


def problem(rows=ROWS):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, VOCAB, generator=generator, dtype=torch.float64) * 5
    return logits, torch.randint(0, VOCAB, (rows,), generator=generator)


def expected_of(logits, token_ids, temperature=1.0):
    """Value and gradient of the summed cross-entropy, and the log-probabilities, in fp64 by torch.nn.functional."""
    logits = logits.detach().double().clone().requires_grad_()
    value = torch.nn.functional.cross_entropy(logits, token_ids, reduction="sum")
    value.backward()
    logp = (logits.detach() / temperature).log_softmax(-1)[torch.arange(len(token_ids)), token_ids]
    return value.detach(), logits.grad, logp


def measure(dtype, shard, *, rows=ROWS, overwrite=False):
    """Yields (label, error, limit) on this rank's shard."""
    logits, token_ids = problem(rows)
    logits = logits.to(dtype)
    value, gradient, logp = expected_of(logits, token_ids, temperature=1.3)
    leaf = columns(logits, shard.start, shard.stop).requires_grad_()
    local = leaf * 1
    before = local.detach().clone()
    seen = []
    local.register_hook(seen.append)
    with counting() as calls:
        logp_found = token_logp(local, token_ids, shard, temperature=1.3)
        scoring = len(calls)
        loss = cross_entropy(local, token_ids, shard, overwrite_logits=overwrite)
        forward = len(calls)
        (loss * 3.0).backward()
    expected = columns(gradient * 3.0, shard.start, shard.stop).nan_to_num(0.0)
    step = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0.0  # the gradient is stored in the logits' dtype
    yield "logp", worst(logp_found, logp), LIMITS[dtype] * 10
    yield "no gradient", float(logp_found.requires_grad), 0.0
    yield "value", worst(loss, value), LIMITS[dtype] * max(1.0, float(value))
    yield "gradient", worst(seen[0], expected), 3 * (LIMITS[dtype] + step)
    yield "padding", float(seen[0][:, shard.num_valid :].abs().sum()), 0.0
    rounds = 0 if shard.group is None else 1
    yield "collectives", abs(scoring - rounds) + abs(forward - scoring - rounds) + len(calls) - forward, 0.0
    same = seen[0].untyped_storage().data_ptr() == local.untyped_storage().data_ptr()
    yield "storage", float(same != overwrite and rows > 0 and shard.width > 0), 0.0
    if not overwrite:
        yield "input", float(not torch.equal(local.detach().nan_to_num(7.0), before.nan_to_num(7.0))), 0.0


def check(measured):
    wrong = [f"{label}: {found:.3g} > {bound:.3g}" for label, found, bound in measured if not found <= bound]
    assert measured and not wrong, "; ".join(wrong)


@pytest.mark.parametrize("overwrite", [False, True], ids=["keep", "overwrite"])
@pytest.mark.parametrize("rows", [ROWS, 0])
@pytest.mark.parametrize("width", [VOCAB, VOCAB + 4], ids=["exact", "padded"])
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_whole_vocabulary(dtype, width, rows, overwrite):
    check(list(measure(dtype, VocabShard(0, width, VOCAB), rows=rows, overwrite=overwrite)))


def test_impossible_columns_have_no_share():
    logits, token_ids = problem()
    token_ids = torch.where(token_ids == 5, 6, token_ids)
    logits[:, 5] = -torch.inf
    shard, leaf = VocabShard(0, VOCAB, VOCAB), logits.clone().requires_grad_()
    value, gradient, logp = expected_of(logits, token_ids)
    loss = cross_entropy(leaf, token_ids, shard)
    loss.backward()
    check([("value", worst(loss, value), 1e-11), ("gradient", worst(leaf.grad, gradient), 1e-12)])
    assert worst(token_logp(logits, token_ids, shard), logp) <= 1e-12


def test_without_gradient_there_is_only_a_value():
    logits, token_ids = problem()
    before = logits.clone()
    assert cross_entropy(logits, token_ids, VocabShard(0, VOCAB, VOCAB), overwrite_logits=True).grad_fn is None
    assert torch.equal(logits, before)


def sharded():
    """On a rank: measurements of every cut, dtype and number of rows."""
    group, results = dist.group.WORLD, {}
    for cut in VOCABULARY_CUTS:
        start, stop = vocabulary_edges(cut, group.size(), VOCAB)[group.rank()]
        for dtype in LIMITS:
            for rows, overwrite in ((ROWS, False), (ROWS, True), (0, False)):
                shard = VocabShard(start, stop, VOCAB, group)
                results.setdefault(cut, []).extend(measure(dtype, shard, rows=rows, overwrite=overwrite))
    return results


@pytest.fixture(scope="module")
def measurements():
    return run_ranks(sharded, RANKS)


@pytest.mark.parametrize("cut", VOCABULARY_CUTS)
def test_shards(cut, measurements):
    for measured in measurements:
        check(measured[cut])
