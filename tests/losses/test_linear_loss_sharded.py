"""`linear_distillation_loss` over ranks: heads cut at any edges, every axis, both gradients, and what travels.

As in test_loss_sharded: a rank returns (label, measured, limit), nothing is asserted inside it.
"""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist

from renio_megatron import LossConfig, VocabShard, linear_distillation_loss
from renio_megatron.errors import LayoutError
from renio_megatron.parallel.vocab import gather_sequence, reshard_rows
from tests.helpers.sharding import VOCABULARY_CUTS, CountingDispatch, columns, counting, vocabulary_edges
from tests.helpers.vectors import DTYPES, exempt_entries, limit, load_cases, worst
from tests.losses.test_loss_sharded import axes_of, first_third, one_rank_has_none, uneven_counts

CASES = (1, 4, 9, 13, 20, 24)
"""Of the vectors: clipped and not, each beta, many sequences and few."""


def head_of(case, start, stop, dtype):
    """Rows of the identity, so that hidden states are logits; padding rows are of no use to anybody."""
    return columns(torch.eye(case.vocab, dtype=dtype), start, stop).nan_to_num(7.0).T.contiguous()


def measure(case, dtype, *, tensor=None, data=None, context=None, cut="uneven", counts=None, here=None, **options):
    """As in test_loss_sharded, from hidden states that are the logits."""
    first = sum(counts[: data.rank()]) if data else 0
    mine = slice(first, first + counts[data.rank()]) if data else slice(0, case.batch)
    rows = (case.owner >= mine.start) & (case.owner < mine.stop)
    rows &= True if here is None else here
    edges = vocabulary_edges(cut, tensor.size(), case.vocab) if tensor else [(0, case.vocab)]
    start, stop = edges[tensor.rank() if tensor else 0]
    hidden = case.student_logits[rows].to(dtype).requires_grad_()
    head = head_of(case, start, stop, dtype).requires_grad_()
    out = linear_distillation_loss(
        hidden,
        head,
        case.teacher_logits[rows].to(dtype),
        head.detach(),
        case.token_ids[rows],
        case.owner[rows] - mine.start,
        mine.stop - mine.start,
        case.loss_config,
        case.weighting_config,
        VocabShard(start, stop, case.vocab, tensor),
        batch_group=data,
        sequence_group=context,
        chunk_size=5,
        **options,
    )
    out.loss.backward()
    loss, ranks = out.loss.detach().clone(), 1
    if data:
        ranks = data.size()
        dist.all_reduce(loss, group=data)
    if context:
        dist.all_reduce(loss, group=context)
    yield "loss", worst(loss[None] / ranks, case.loss), limit(case.loss, dtype)
    for name, expected, part in (
        ("weights", case.weights, mine),
        ("log_ratio", case.log_ratio, rows),
        ("token_divergence", case.token_divergence, rows),
    ):
        yield name, worst(getattr(out, name), expected[part]), limit(expected, dtype)
    # With the identity as head the hidden states' gradient, summed over the shards, is the logits' own.
    expected, exempt = case.grad_student_logits[rows], exempt_entries(case, dtype)[rows]
    bound = limit(case.grad_student_logits, dtype)
    yield "gradient of hidden states", worst(hidden.grad / ranks, expected, exempt), bound
    of_head = columns(expected, start, stop).nan_to_num(0.0).T @ case.student_logits[rows]
    jumps = columns(exempt.double(), start, stop).nan_to_num(0.0).sum(0) > 0
    scale = float(of_head.abs().max()) if of_head.numel() else 0.0
    head_bound = 1e-9 if dtype == torch.float64 else 1e-5 * max(scale, 1e-3)
    yield "gradient of the head", worst((head.grad / ranks)[~jumps], of_head[~jumps]), head_bound


def every_case(dtype, **layout):
    for number in CASES:
        case = load_cases()[number]
        settings = {key: value(case) if callable(value) else value for key, value in layout.items()}
        for label, error, bound in measure(case, dtype, **settings):
            yield f"case {number:02d} {label}", error, bound


def tensor_parallel(cut, dtype):
    yield from every_case(dtype, tensor=dist.group.WORLD, cut=cut)


def tensor_parallel_with_weights(dtype):
    """Given weights: one phase."""
    yield from every_case(dtype, tensor=dist.group.WORLD, weights=lambda case: case.weights)


def data_and_tensor_parallel(counts, dtype):
    data, tensor = axes_of((2, 2))
    yield from every_case(dtype, data=data, counts=functools.partial(counts, 2), tensor=tensor)


def context_and_tensor_parallel(dtype):
    context, tensor = axes_of((2, 2))
    yield from every_case(dtype, context=context, here=functools.partial(first_third, context), tensor=tensor)


def context_with_weights(dtype):
    group = dist.group.WORLD
    here = functools.partial(first_third, group)
    yield from every_case(dtype, context=group, here=here, weights=lambda case: case.weights)


def what_travels():
    """Collectives on the tensor group: one or two a chunk, one more a chunk without weights, one sum in backward."""
    case, group = load_cases()[20], dist.group.WORLD
    start, stop = vocabulary_edges("uneven", group.size(), case.vocab)[group.rank()]
    head = head_of(case, start, stop, torch.float64)
    rows = len(case.owner)
    for beta, entry_clip, rounds in ((0.0, None, 1), (1.0, None, 1), (0.5, None, 2), (0.0, 0.05, 2)):
        for chunk_size, chunks in ((None, 1), (7, -(-rows // 7))):
            for weights in (None, case.weights):
                hidden = case.student_logits.clone().requires_grad_()
                with counting() as calls, CountingDispatch() as dispatch:
                    out = linear_distillation_loss(
                        hidden,
                        head.clone().requires_grad_(),
                        case.teacher_logits,
                        head,
                        case.token_ids,
                        case.owner,
                        case.batch,
                        LossConfig(beta=beta, entry_clip=entry_clip),
                        shard=VocabShard(start, stop, case.vocab, group),
                        weights=weights,
                        chunk_size=chunk_size,
                    )
                    forward = len(calls)
                    out.loss.backward()
                label = f"beta {beta} clip {entry_clip} chunk {chunk_size} weights {weights is not None}"
                wanted = chunks * (rounds + (weights is None))
                yield f"{label}: forward", abs(forward - wanted), 0.0
                yield f"{label}: the sum of the hidden states' gradient", abs(len(calls) - forward - 1), 0.0
                yield f"{label}: not seen", abs(dispatch.count - len(calls)), 0.0


def pieces_of_a_sequence():
    """Sequence parallelism: gathered forward, summed and scattered backward."""
    case, group = load_cases()[20], dist.group.WORLD
    ranks, rank = group.size(), group.rank()
    start, stop = vocabulary_edges("uneven", ranks, case.vocab)[rank]
    share = -(-len(case.owner) // ranks)
    whole = torch.zeros(share * ranks, case.vocab, dtype=torch.float64)
    whole[: len(case.owner)] = case.student_logits
    piece = whole[rank * share : (rank + 1) * share].clone().requires_grad_()
    head = head_of(case, start, stop, torch.float64)
    out = linear_distillation_loss(
        gather_sequence(piece, group)[: len(case.owner)],
        head,
        case.teacher_logits,
        head,
        case.token_ids,
        case.owner,
        case.batch,
        case.loss_config,
        case.weighting_config,
        VocabShard(start, stop, case.vocab, group),
        sum_hidden_gradient=False,
    )
    out.loss.backward()
    expected = torch.zeros_like(whole)
    expected[: len(case.owner)] = case.grad_student_logits
    yield "gradient of the piece", worst(piece.grad, expected[rank * share : (rank + 1) * share]), 1e-9


def heads_cut_anew():
    """Every row arrives at whoever wants it; rows of padding are 0."""
    group, vocab = dist.group.WORLD, 23
    table = torch.arange(vocab * 3.0).view(vocab, 3)
    for have_cut in VOCABULARY_CUTS:
        for want_cut in VOCABULARY_CUTS:
            (a, b), (c, d) = (vocabulary_edges(cut, group.size(), vocab)[group.rank()] for cut in (have_cut, want_cut))
            rows = columns(table.T, a, b).T
            want = VocabShard(c, d, vocab, group)
            found = reshard_rows(rows, VocabShard(a, b, vocab, group), want)
            expected = columns(table.T, c, d).nan_to_num(0.0).T
            yield f"{have_cut} to {want_cut}", worst(found, expected), 0.0
    # A teacher of a larger vocabulary: what the student lacks is dropped.
    more = torch.arange(31 * 3.0).view(31, 3)
    (a, b), (c, d) = (
        vocabulary_edges(cut, group.size(), v)[group.rank()] for cut, v in (("uneven", 31), ("uneven", 23))
    )
    found = reshard_rows(more[a:b], VocabShard(a, b, 31, group), VocabShard(c, d, 23, group))
    yield "a larger vocabulary", worst(found, more[c:d]), 0.0


def same_bits_on_every_rank():
    case, group = load_cases()[13], dist.group.WORLD
    start, stop = vocabulary_edges("uneven", group.size(), case.vocab)[group.rank()]
    head = head_of(case, start, stop, torch.float32)
    found = []
    for _ in range(2):
        hidden = case.student_logits.float().requires_grad_()
        out = linear_distillation_loss(
            hidden, head, case.teacher_logits.float(), head, case.token_ids, case.owner, case.batch, case.loss_config,
            case.weighting_config, VocabShard(start, stop, case.vocab, group), chunk_size=7,
        )  # fmt: skip
        out.loss.backward()
        found.append(torch.cat((out.loss.detach()[None], out.weights, out.log_ratio, hidden.grad.flatten())))
    yield "run to run", float(not torch.equal(*found)), 0.0
    parts = [torch.empty_like(found[0]) for _ in range(group.size())]
    dist.all_gather(parts, found[0])
    yield "rank to rank", float(not all(torch.equal(part, parts[0]) for part in parts)), 0.0


def shards_that_are_not_the_vocabulary():
    group, rank = dist.group.WORLD, dist.get_rank()
    ones = torch.ones(2, 8)
    token = torch.zeros(2, dtype=torch.int64)
    edges = {
        "a gap": [(0, 4), (5, 9)],
        "twice": [(0, 5), (4, 9)],
        "an end": [(0, 4), (4, 8)],
        "a gap, after a loss without": [(0, 4), (5, 9)],  # the first rank's shard is one that was right
    }
    whole = VocabShard(*[(0, 4), (4, 9)][rank], 9, group)
    words = {"a gap": "[4, 5) are in no shard", "twice": "[4, 5) are in more than one", "an end": "[8, 9) are in no"}
    words["a gap, after a loss without"] = words["a gap"]
    for name, cut in edges.items():
        if "after" in name:
            head = torch.ones(whole.width, 8)
            linear_distillation_loss(ones, head, ones, head, token, token, 1, shard=whole)
        shard = VocabShard(*cut[rank], 9, group)
        head = torch.ones(shard.width, 8)
        try:
            linear_distillation_loss(ones, head, ones, head, token, token, 1, shard=shard)
        except LayoutError as error:
            yield name, float(words[name] not in str(error)), 0.0
        else:
            yield name, 1.0, 0.0


def tokens_that_differ():
    group, rank = dist.group.WORLD, dist.get_rank()
    shard, ones = VocabShard(*[(0, 4), (4, 9)][rank], 9, group), torch.ones(3, 8)
    head, owner = torch.ones(shard.width, 8), torch.zeros(3, dtype=torch.int64)
    ids = {"one token": [[0, 1, 2], [0, 1, 3]], "the order": [[0, 1, 2], [2, 1, 0]], "none": [[8, 1, 2], [8, 1, 2]]}
    for name, each in ids.items():
        try:
            linear_distillation_loss(ones, head, ones, head, torch.tensor(each[rank]), owner, 1, shard=shard)
        except LayoutError as error:
            yield name, float(name == "none" or "have different token_ids" not in str(error)), 0.0
        else:
            yield name, float(name != "none"), 0.0


GROUPS = {
    2: {
        **{
            f"TP: {cut}, {str(dtype)[6:]}": functools.partial(tensor_parallel, cut, dtype)
            for cut in VOCABULARY_CUTS
            for dtype in DTYPES
        },
        "TP, weights given": functools.partial(tensor_parallel_with_weights, torch.float64),
        "CP, weights given": functools.partial(context_with_weights, torch.float64),
        "what travels": what_travels,
        "pieces of a sequence": pieces_of_a_sequence,
        "heads cut anew": heads_cut_anew,
        "same bits": same_bits_on_every_rank,
        "other tokens": tokens_that_differ,
        "not the vocabulary": shards_that_are_not_the_vocabulary,
    },
    4: {
        "TP: uneven, float64": functools.partial(tensor_parallel, "uneven", torch.float64),
        "DP x TP, float64": functools.partial(data_and_tensor_parallel, uneven_counts, torch.float64),
        "DP x TP, one rank without": functools.partial(data_and_tensor_parallel, one_rank_has_none, torch.float32),
        "CP x TP": functools.partial(context_and_tensor_parallel, torch.float64),
        "heads cut anew": heads_cut_anew,
        "pieces of a sequence": pieces_of_a_sequence,
    },
}


def run_group(name):
    """On a rank: a group's measurements."""
    return list(GROUPS[dist.get_world_size()][name]())


@pytest.mark.matrix(3)
@pytest.mark.parametrize(("ranks", "name"), [(ranks, name) for ranks, groups in GROUPS.items() for name in groups])
def test_group(ranks, name, two_ranks, four_ranks):
    for rank, found in enumerate({2: two_ranks, 4: four_ranks}[ranks](run_group, name)):
        assert found
        bad = [(label, error, bound) for label, error, bound in found if not error <= bound]
        assert not bad, f"rank {rank}: {bad[:5]}"
