"""Weights over ranks: entropies over vocabulary shards, sequences in pieces, batches in shares.

As in test_loss_sharded: a rank returns (label, measured, limit), nothing is asserted inside it. What is expected is the
plain formula of test_weigh; of permutations, which have none, what one process finds.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import linear

from renio_megatron import VocabShard, distillation_loss, linear_distillation_loss
from renio_megatron.config import HeadConfig
from renio_megatron.config.sections.combined_weighting import PermutedWeighting, ProductWeighting
from renio_megatron.config.sections.weighting import LengthWeighting, RenioWeighting, StudentEntropyWeighting
from renio_megatron.errors import LayoutError
from renio_megatron.losses.sample_weights import sample_weights
from renio_megatron.losses.token_logp import linear_token_scores
from renio_megatron.objective.weightings.strategy import seeded
from renio_megatron.parallel.vocab import LmHead
from tests.fakes.strategies import GateWeighting, PrefixWeighting, Seen, SeenWeighting, shown
from tests.helpers.measured import within_limits
from tests.helpers.sharding import VOCABULARY_CUTS, columns, vocabulary_edges
from tests.helpers.vectors import worst
from tests.losses.test_loss_sharded import axes_of
from tests.losses.test_weigh import LOSSES, RECIPES, SEQUENCES, TOKENS, expected_of, problem

LIMIT = 1e-12
VOCAB, NUM_SEQUENCES = 23, 7
IDS = torch.tensor([30, 12, 17, 11, 26, 19, 14])
PERMUTED = {
    "renio": PermutedWeighting(of=RenioWeighting(cap=1.2)),
    "length": PermutedWeighting(of=LengthWeighting()),
    "entropy of sequences": PermutedWeighting(of=SEQUENCES),
    "entropy of tokens": PermutedWeighting(of=TOKENS),
    "entropy of the batch's tokens": PermutedWeighting(of=StudentEntropyWeighting(normalize="batch")),
    "all of them": ProductWeighting(
        factors=(RenioWeighting(), PermutedWeighting(of=LengthWeighting()), PermutedWeighting(of=TOKENS))
    ),
}


def whole_problem(seed=0):
    """Some 30 tokens of six sequences, in any order; the seventh has none."""
    return problem(seed, rows=31, vocab=VOCAB, sequences=NUM_SEQUENCES)


def inputs_of(tokens, rows=slice(None), mine=slice(None)):
    return {"position": tokens.position[rows], "sequence": IDS[mine], "generator": seeded(5, 1)}


def one_process(models, tokens, loss, weighting):
    """What the loss without groups finds for the whole batch."""
    student = linear(*models[:2]).requires_grad_()
    arguments = (tokens.ids, tokens.owner, tokens.num_sequences, loss, weighting)
    out = distillation_loss(student, linear(*models[2:]), *arguments, inputs=inputs_of(tokens))
    out.loss.backward()
    token_weights = torch.ones(len(tokens.ids)).double() if out.token_weights is None else out.token_weights
    found = {"weights": out.weights, "token_weights": token_weights, "of_logits": student.grad}
    return SimpleNamespace(loss=out.loss.detach(), **found)


def measure(name, *, tensor=None, data=None, context=None, cut="uneven", counts=None, here=None):
    """Yields (label, error, limit) of a weighting on this rank's part of a problem, over logits and hidden states.

    Args:
        name: of RECIPES, or "permuted" and one of PERMUTED.
        tensor, data, context: groups of the three axes; None: not cut.
        counts: sequences of each rank of `data`.
        here: tokens -> which of them this rank of `context` holds, bool [N].
    """
    models, tokens = whole_problem()
    loss, permuted = LOSSES["bounded"], name.removeprefix("permuted ")
    weighting = RECIPES[name][0] if name in RECIPES else PERMUTED[permuted]
    by, what = (expected_of, name) if name in RECIPES else (one_process, weighting)
    expected = by(models, tokens, loss, what)
    first = sum(counts[: data.rank()]) if data else 0
    mine = slice(first, first + counts[data.rank()]) if data else slice(0, NUM_SEQUENCES)
    rows = (tokens.owner >= mine.start) & (tokens.owner < mine.stop) & (True if here is None else here(tokens))
    start, stop = vocabulary_edges(cut, tensor.size(), VOCAB)[tensor.rank()] if tensor else (0, VOCAB)
    ranks = data.size() if data else 1
    arguments = (
        tokens.ids[rows],
        tokens.owner[rows] - mine.start,
        mine.stop - mine.start,
        loss,
        weighting,
        VocabShard(start, stop, VOCAB, tensor),
    )
    options = {"batch_group": data, "sequence_group": context, "inputs": inputs_of(tokens, rows, mine)}
    of_logits = columns(expected.of_logits[rows], start, stop).nan_to_num(0.0)
    student, teacher = (columns(linear(*pair)[rows], start, stop) for pair in (models[:2], models[2:]))
    student.requires_grad_()
    out = distillation_loss(student, teacher, *arguments, **options)
    out.loss.backward()
    yield from compared(f"{name}: logits", out, expected, rows, mine, (data, context))
    yield f"{name}: gradient", worst(student.grad / ranks, of_logits), LIMIT

    head, teacher_head = (columns(one.T, start, stop).nan_to_num(7.0).T.contiguous() for one in (models[1], models[3]))
    hidden, head = models[0][rows].clone().requires_grad_(), head.requires_grad_()
    pairs = (hidden, head, models[2][rows], teacher_head)
    out = linear_distillation_loss(*pairs, *arguments, **options, chunk_size=5)
    out.loss.backward()
    yield from compared(f"{name}: hidden", out, expected, rows, mine, (data, context))
    yield f"{name}: of hidden", worst(hidden.grad / ranks, expected.of_logits[rows] @ models[1]), LIMIT
    yield f"{name}: of head", worst(head.grad / ranks, of_logits.T @ models[0][rows]), LIMIT


def compared(label, out, expected, rows, mine, groups):
    """Loss, which is a mean over `data` and a sum over `context`, and the weights that are here."""
    total = out.loss.detach().clone()
    for group in filter(None, groups):
        dist.all_reduce(total, group=group)
    yield f"{label} loss", worst(total / (groups[0].size() if groups[0] else 1), expected.loss), LIMIT
    yield f"{label} weights", worst(out.weights, expected.weights[mine]), LIMIT
    found = torch.ones(int(rows.sum())).double() if out.token_weights is None else out.token_weights
    yield f"{label} token weights", worst(found, expected.token_weights[rows]), LIMIT


# Shards of the vocabulary.


def inputs_over_shards(cut):
    """What follows from logits, at each temperature and bound, and the same bits on every rank."""
    group = dist.group.WORLD
    start, stop = vocabulary_edges(cut, group.size(), VOCAB)[group.rank()]
    shard = VocabShard(start, stop, VOCAB, group)
    names = ("student_entropy", "teacher_entropy", "divergence", "student_logp", "teacher_logp")
    for loss in LOSSES:
        models, tokens = whole_problem(1)
        facts = expected_of(models, tokens, LOSSES[loss], "uniform").facts
        student, teacher = (columns(linear(*pair), start, stop) for pair in (models[:2], models[2:]))
        heads = [columns(one.T, start, stop).nan_to_num(7.0).T.contiguous() for one in (models[1], models[3])]
        rest = (tokens.ids, tokens.owner, tokens.num_sequences, LOSSES[loss])
        runs = {
            "logits": lambda weighting: distillation_loss(student, teacher, *rest, weighting, shard),  # noqa: B023
            "hidden": lambda weighting: linear_distillation_loss(
                models[0], heads[0], models[2], heads[1], *rest, weighting, shard, chunk_size=7  # noqa: B023
            ),
        }  # fmt: skip
        for form, run in runs.items():
            seen = shown(names, run)
            for name in names:
                yield f"{loss} {form} {name}", worst(getattr(seen, name), getattr(facts, name)), LIMIT
            parts = [torch.empty_like(seen.student_entropy) for _ in range(group.size())]
            dist.all_gather(parts, seen.student_entropy)
            yield f"{loss} {form} equal bits", float(any(not torch.equal(part, parts[0]) for part in parts)), 0.0
        head = LmHead(heads[0], shard)
        scores = linear_token_scores(
            models[0], head, tokens.ids, HeadConfig(chunk_size=7), LOSSES[loss].temperature, with_entropy=True
        )
        yield f"{loss} scores", worst(scores.entropy, facts.student_entropy), LIMIT


def losses_over_shards(cut):
    for name in ("entropy of tokens", "renio x length x entropy", "gate", "length"):
        yield from measure(name, tensor=dist.group.WORLD, cut=cut)
    yield from measure("permuted entropy of tokens", tensor=dist.group.WORLD, cut=cut)


# Sequences in pieces.


def by_places(context, tokens):
    """A piece of every sequence; the first rank has the ends, as zigzag cuts do, and the last none of sequence 2."""
    share = (tokens.position + 1) // 2 % context.size()
    return torch.where(tokens.owner == 2, 0, share) == context.rank()


def by_thirds(context, tokens):
    """A flat cut at a third: the other ranks but one have nothing."""
    first = torch.arange(len(tokens.owner)) < len(tokens.owner) // 3
    return {0: first, 1: ~first}.get(context.rank(), torch.zeros_like(first))


def pieces(cut, *names):
    group = dist.group.WORLD
    for name in names:
        yield from measure(name, context=group, here=functools.partial(cut, group))


SUMMED = tuple(name for name in RECIPES if name not in ("place", "prefix"))
WHOLE = (
    "place",
    "prefix",
    "permuted entropy of tokens",
    "permuted entropy of the batch's tokens",
    "permuted all of them",
)
OF_SEQUENCES = ("permuted renio", "permuted length", "permuted entropy of sequences")


def prefix_by_hand():
    """One response of four tokens, those at even places on the first rank: the hand numbers of IW-OPD."""
    rank = dist.get_rank()
    mine = [torch.tensor([2, 0]), torch.tensor([1, 3])][rank] if rank < 2 else torch.tensor([], dtype=torch.int64)
    student, teacher = (
        torch.tensor(p, dtype=torch.float64).log() for p in ([0.5, 0.9, 0.2, 0.6], [0.25, 0.9, 0.4, 0.06])
    )
    found = sample_weights(
        student[mine], teacher[mine], torch.zeros_like(mine), 1, PrefixWeighting(),
        sequence_group=dist.group.WORLD, inputs={"position": mine},
    )  # fmt: skip
    expected = torch.tensor([1.5, 1.406049, 1.406049, 1.312098], dtype=torch.float64)
    yield "prefix sums", worst(found.token_weights, expected[mine]), 5e-7
    yield "lengths", float(found.lengths.tolist() != [4.0]), 0.0


def whole_sequences_are_shown():
    """A strategy that is not additive sees every token of its sequences, with all that it declares."""
    group, (models, tokens) = dist.group.WORLD, whole_problem(2)
    facts = expected_of(models, tokens, LOSSES["plain"], "uniform").facts
    rows = by_places(group, tokens)
    wants = ("student_logp", "teacher_logp", "student_entropy", "position", "finished", "column level")
    given = {
        "student_entropy": facts.student_entropy[rows],
        "position": tokens.position[rows],
        "finished": torch.arange(NUM_SEQUENCES) % 2 == 0,
        "column level": torch.arange(NUM_SEQUENCES).double(),
    }
    Seen.shown.clear()
    sample_weights(
        facts.student_logp[rows], facts.teacher_logp[rows], tokens.owner[rows], NUM_SEQUENCES,
        SeenWeighting(wants=wants, is_additive=False), sequence_group=group, inputs=given,
    )  # fmt: skip
    seen = Seen.shown[0]
    whole, found = ((one.owner * 100 + one.position).argsort() for one in (tokens, seen))
    yield "tokens", float(seen.owner[found].tolist() != tokens.owner[whole].tolist()), 0.0
    yield "places", float(seen.position[found].tolist() != tokens.position[whole].tolist()), 0.0
    for name in wants[:3]:
        yield name, worst(getattr(seen, name)[found], getattr(facts, name)[whole]), 0.0
    yield "lengths", worst(seen.lengths, torch.tensor([len(mine) for mine in facts.of])), 0.0
    yield "sequences", float(not torch.equal(seen.finished, given["finished"])), 0.0
    yield "a column", worst(seen.column("level"), given["column level"]), 0.0


def pieces_without_places():
    group, (_, tokens) = dist.group.WORLD, whole_problem(2)
    rows = by_places(group, tokens)
    logp = torch.zeros(int(rows.sum()), dtype=torch.float64)
    arguments = (logp, logp, tokens.owner[rows], NUM_SEQUENCES, SeenWeighting(is_additive=False))
    try:
        sample_weights(*arguments, sequence_group=group)
    except LayoutError as error:
        words = ("whole sequences", "in pieces", "inputs={'position'")
        yield "the message", float(not all(word in str(error) for word in words)), 0.0
    else:
        yield "nothing was raised", 1.0, 0.0


# Shares of the batch.


def counts_of(kind, ranks):
    """Sequences of each rank, seven together."""
    if kind == "one rank without":
        return {2: [0, 7], 3: [3, 0, 4]}[ranks]
    return {2: [5, 2], 3: [1, 4, 2]}[ranks]


def shares(kind, *names):
    for name in names:
        yield from measure(name, data=dist.group.WORLD, counts=counts_of(kind, dist.get_world_size()))


def sequences_that_changed_places():
    """Balancing hands sequences to other ranks; by its number each has the weights that it had."""
    group, (models, tokens) = dist.group.WORLD, whole_problem(3)
    facts = expected_of(models, tokens, LOSSES["plain"], "uniform").facts
    order = torch.randperm(NUM_SEQUENCES, generator=torch.Generator().manual_seed(1))
    counts = counts_of("uneven", group.size())
    chosen = order[sum(counts[: group.rank()]) : sum(counts[: group.rank() + 1])]
    number = torch.full((NUM_SEQUENCES,), -1)
    number[chosen] = torch.arange(len(chosen))
    rows = torch.nonzero(number[tokens.owner] >= 0)[:, 0].flip(0)

    def weigh(weighting, rows, owner, ids, batch_group=None):
        entropies = {name: getattr(facts, name)[rows] for name in ("student_entropy", "teacher_entropy")}
        inputs = {**entropies, "position": tokens.position[rows], "sequence": ids, "generator": seeded(5, 1)}
        logp = (facts.student_logp[rows], facts.teacher_logp[rows])
        return sample_weights(*logp, owner, len(ids), weighting, batch_group=batch_group, inputs=inputs)

    everywhere = {**PERMUTED, **{name: RECIPES[name][0] for name in SUMMED}}
    for name, weighting in everywhere.items():
        whole = weigh(weighting, torch.arange(len(tokens.owner)), tokens.owner, IDS)
        found = weigh(weighting, rows, number[tokens.owner[rows]], IDS[chosen], group)
        yield f"{name}: weights", worst(found.weights, whole.weights[chosen]), LIMIT
        if whole.token_weights is not None:
            yield f"{name}: tokens", worst(found.token_weights, whole.token_weights[rows]), LIMIT
        yield f"{name}: size", float(found.batch_size != NUM_SEQUENCES), 0.0


def by_hand_over_ranks():
    """Rank r has r + 1 sequences of 1, 2, ... tokens: weights, and one mean of all tokens, by arithmetic."""
    group, rank, ranks = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    lengths = [count + 1 for each in range(ranks) for count in range(each + 1)]
    owner = torch.repeat_interleave(torch.tensor(lengths[rank * (rank + 1) // 2 :][: rank + 1]))
    zeros, entropies = torch.zeros(len(owner), dtype=torch.float64), torch.full((len(owner),), 2.0**rank).double()
    factors = (LengthWeighting(), StudentEntropyWeighting(normalize="batch"), GateWeighting(normalize="batch"))
    # The gate keeps tokens of the odd ranks only.
    inputs = {"student_entropy": entropies, "teacher_entropy": torch.full_like(entropies, float(rank % 2))}
    found = sample_weights(
        zeros, zeros, owner, rank + 1, ProductWeighting(factors=factors), batch_group=group, inputs=inputs
    )
    mean = sum(lengths) / len(lengths)
    yield (
        "length",
        worst(found.weights, torch.tensor([(i + 1) / mean for i in range(rank + 1)], dtype=torch.float64)),
        LIMIT,
    )
    tokens = [(each + 1) * (each + 2) // 2 for each in range(ranks)]
    of_all = sum(2.0**each * count for each, count in enumerate(tokens)) / sum(tokens)
    kept = [each for each in range(ranks) if each % 2]
    of_kept = sum(2.0**each * tokens[each] for each in kept) / sum(tokens[each] for each in kept)
    expected = 2.0**rank / of_all * 2.0**rank / of_kept if rank % 2 else 0.0
    yield "entropy and gate", worst(found.token_weights, torch.full_like(entropies, expected)), LIMIT
    yield "kept", float(found.denominators.sum() != (tokens[rank] if rank % 2 else 0)), 0.0
    yield "number", float(found.batch_size != len(lengths)), 0.0


def sequences_without_numbers():
    """They are counted rank after rank."""
    counts = counts_of("one rank without", dist.get_world_size())
    first = sum(counts[: dist.get_rank()])
    mine = slice(first, first + counts[dist.get_rank()])

    def weigh(ratios, group=None):
        arguments = (ratios, torch.zeros_like(ratios), torch.arange(len(ratios)), len(ratios), PERMUTED["renio"])
        return sample_weights(*arguments, batch_group=group, inputs={"generator": seeded(5, 1)}).weights

    ratios = torch.linspace(0.8, 2.4, NUM_SEQUENCES, dtype=torch.float64)
    yield "weights", worst(weigh(ratios[mine], dist.group.WORLD), weigh(ratios)[mine]), LIMIT


def shares_in_pieces(*names):
    """Two by two: sequences over the first axis, their tokens over the second."""
    data, context = axes_of((2, 2))
    for name in names:
        yield from measure(name, data=data, counts=[5, 2], context=context, here=functools.partial(by_places, context))


def pieces_over_shards():
    context, tensor = axes_of((2, 2))
    for name in ("entropy of tokens", "renio x length x entropy", "permuted entropy of sequences"):
        yield from measure(name, tensor=tensor, context=context, here=functools.partial(by_places, context))


ON_TWO_OR_THREE = {
    **{f"TP, what is shown: {cut}": functools.partial(inputs_over_shards, cut) for cut in VOCABULARY_CUTS},
    **{f"TP, loss: {cut}": functools.partial(losses_over_shards, cut) for cut in VOCABULARY_CUTS},
    **{
        f"CP, {kind}: {cut.__name__}": functools.partial(pieces, cut, *names)
        for cut in (by_places, by_thirds)
        for kind, names in (("sums", SUMMED), ("permuted sequences", OF_SEQUENCES), ("whole sequences", WHOLE))
    },
    "CP, prefix by hand": prefix_by_hand,
    "CP, what is shown": whole_sequences_are_shown,
    "CP, no places": pieces_without_places,
    **{
        f"DP: {kind}": functools.partial(shares, kind, *RECIPES, *(f"permuted {name}" for name in PERMUTED))
        for kind in ("uneven", "one rank without")
    },
    "DP, other places": sequences_that_changed_places,
    "DP, no numbers": sequences_without_numbers,
    "DP, by hand": by_hand_over_ranks,
}
GROUPS = {
    2: ON_TWO_OR_THREE,
    3: ON_TWO_OR_THREE,
    4: {
        "DP and CP, sums": functools.partial(shares_in_pieces, *SUMMED, *OF_SEQUENCES),
        "DP and CP, whole sequences": functools.partial(shares_in_pieces, *WHOLE),
        "CP and TP": pieces_over_shards,
    },
}


def run_group(name):
    """On a rank: a group's measurements."""
    return list(GROUPS[dist.get_world_size()][name]())


@pytest.mark.matrix(3)
@pytest.mark.parametrize(("world_size", "name"), [(size, name) for size, groups in GROUPS.items() for name in groups])
def test_ranks_agree_with_one_process(world_size, name, ranks_by_number):
    for rank, measured in enumerate(ranks_by_number[world_size](run_group, name)):
        within_limits(measured, f"rank {rank}, ")
