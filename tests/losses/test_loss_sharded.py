"""`distillation_loss` over ranks: vocabulary shards, sequences over DP, tokens over CP, and what travels.

On 2, 3 and 4 ranks: a rank runs a group of `GROUPS[world_size]` and returns what it measured as
(label, measured, limit); nothing is asserted inside a rank, so that one failure cannot put the ranks out of step.
"""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist

from renio_megatron import LossConfig, VocabShard, WeightingConfig, distillation_loss
from tests.helpers.measured import within_limits
from tests.helpers.sharding import VOCABULARY_CUTS, CountingDispatch, columns, counting, vocabulary_edges
from tests.helpers.vectors import DTYPES, exempt_entries, limit, load_cases, worst


def measure(case, dtype, *, tensor=None, data=None, context=None, cut="uneven", counts=None, here=None, **options):
    """Runs a case on this rank's part of it and yields (label, error, limit) for every quantity.

    Args:
        tensor, data, context: groups of the three axes; None: not cut.
        cut: how the vocabulary is cut.
        counts: sequences of each rank of `data`, in order.
        here: which tokens this rank of `context` holds, bool [N].
    """
    first = sum(counts[: data.rank()]) if data else 0
    mine = slice(first, first + counts[data.rank()]) if data else slice(0, case.batch)
    rows = (case.owner >= mine.start) & (case.owner < mine.stop)
    rows &= True if here is None else here
    edges = vocabulary_edges(cut, tensor.size(), case.vocab) if tensor else [(0, case.vocab)]
    start, stop = edges[tensor.rank() if tensor else 0]
    student = columns(case.student_logits[rows].to(dtype), start, stop).requires_grad_()
    out = distillation_loss(
        student,
        columns(case.teacher_logits[rows].to(dtype), start, stop),
        case.token_ids[rows],
        case.owner[rows] - mine.start,
        mine.stop - mine.start,
        case.loss_config,
        case.weighting_config,
        VocabShard(start, stop, case.vocab, tensor),
        batch_group=data,
        sequence_group=context,
        **options,
    )
    out.loss.backward()

    loss, ranks = out.loss.detach().clone(), 1
    if data:  # the mean over the ranks is the batch's
        ranks = data.size()
        dist.all_reduce(loss, group=data)
    if context:  # the sum over the ranks is
        dist.all_reduce(loss, group=context)
    yield "loss", worst(loss[None] / ranks, case.loss), limit(case.loss, dtype)
    yield "pivotal", float((out.is_pivotal != case.pivotal[rows]).sum()), 0.0
    for name, expected, part in (
        ("weights", case.weights, mine),
        ("raw_weights", case.raw_weights, mine),
        ("log_ratio", case.log_ratio, rows),
        ("token_divergence", case.token_divergence, rows),
    ):
        yield name, worst(getattr(out, name), expected[part]), limit(expected, dtype)
    expected = columns(case.grad_student_logits[rows], start, stop).nan_to_num(0.0)  # 0 in padding columns
    exempt = columns(exempt_entries(case, dtype)[rows].double(), start, stop).nan_to_num(0.0) > 0
    bound = limit(case.grad_student_logits, dtype)
    yield "gradient", worst(student.grad / ranks, expected, exempt), bound
    yield "gradient of padding", float(student.grad[:, max(0, case.vocab - start) :].abs().sum()), 0.0
    if tensor:  # the same bits on every rank of the tensor group
        parts = [torch.empty_like(out.loss) for _ in range(tensor.size())]
        dist.all_gather(parts, out.loss.detach(), group=tensor)
        yield "equal bits", float(any(not torch.equal(part, parts[0]) for part in parts)), 0.0


def every_case(dtype, **layout):
    for case in load_cases():
        settings = {key: value(case) if callable(value) else value for key, value in layout.items()}
        for label, error, bound in measure(case, dtype, **settings):
            yield f"case {case.number:02d} {label}", error, bound


def uneven_counts(ranks, case):
    """Sequences of each rank, 1 : 2 : 3 ... as far as the batch goes, in falling order."""
    stops = [case.batch * (i + 1) * (i + 2) // (ranks * (ranks + 1)) for i in range(ranks)]
    return [b - a for a, b in zip([0, *stops[:-1]], stops, strict=True)][::-1]


def one_rank_has_none(ranks, case):
    counts = uneven_counts(ranks - 1, case)
    return [*counts[:1], 0, *counts[1:]] if ranks > 2 else [0, *counts]


def first_third(context, case):
    """A flat cut: a sequence in the middle of it is on both ranks."""
    place = torch.arange(len(case.owner)) < (len(case.owner) + 2) // 3
    return place if context.rank() == 0 else ~place


def whole_sequences(context, case):
    return case.owner % context.size() == context.rank()


def tokens_per_sequence(case):
    return torch.bincount(case.owner, minlength=case.batch)


def axes_of(shape):
    """Groups along the two axes of a mesh over all ranks, row-major: (outer, inner)."""
    outer, inner = shape
    mesh = torch.arange(outer * inner).view(outer, inner)
    lines = [[dist.new_group(line) for line in part.tolist()] for part in (mesh.T, mesh)]
    rank = dist.get_rank()
    return lines[0][rank % inner], lines[1][rank // inner]


def vocabulary_groups():
    return {
        f"TP: {cut}, {str(dtype)[6:]}": functools.partial(tensor_parallel, cut=cut, dtype=dtype)
        for cut in VOCABULARY_CUTS
        for dtype in DTYPES
    }


def tensor_parallel(cut, dtype):
    yield from every_case(dtype, tensor=dist.group.WORLD, cut=cut)


def data_parallel(counts, dtype):
    group = dist.group.WORLD
    yield from every_case(dtype, data=group, counts=lambda case: counts(group.size(), case))


def context_parallel(cut, dtype, known_lengths=False):
    group = dist.group.WORLD
    lengths = {"sequence_lengths": tokens_per_sequence} if known_lengths else {}
    yield from every_case(dtype, context=group, here=functools.partial(cut, group), **lengths)


def data_and_tensor_parallel(counts, dtype):
    data, tensor = axes_of((2, 2))
    yield from every_case(dtype, data=data, counts=functools.partial(counts, 2), tensor=tensor, cut="uneven")


def context_and_tensor_parallel(dtype):
    context, tensor = axes_of((2, 2))
    yield from every_case(dtype, context=context, here=functools.partial(first_third, context), tensor=tensor)


def data_and_context_parallel(dtype):
    data, context = axes_of((2, 2))
    counts, here = functools.partial(uneven_counts, 2), functools.partial(first_third, context)
    yield from every_case(dtype, data=data, counts=counts, context=context, here=here)


def part_of(case, counts):
    """Positional arguments of the loss for this rank's consecutive sequences, and where they are in the batch."""
    rank = dist.get_rank()
    mine = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    rows = (case.owner >= mine.start) & (case.owner < mine.stop)
    whole = (case.student_logits, case.teacher_logits, case.token_ids, case.owner - mine.start)
    return (*(x[rows] for x in whole), mine.stop - mine.start), mine


def group_normalization():
    """Groups of consecutive sequences of the global order, wherever the ranks' borders are."""
    case, ranks = load_cases()[24], dist.get_world_size()  # 64 sequences
    borders = [uneven_counts(ranks, case), one_rank_has_none(ranks, case), [1] * (ranks - 1) + [65 - ranks]]
    for counts in borders:
        for size in (1, 2, 3, 5, 7, 40, 64, 100):
            for cap in (None, 1.5):
                weighting = WeightingConfig(threshold=3.5, ceiling=4.0, normalize="group", group_size=size, cap=cap)
                arguments, mine = part_of(case, counts)
                out = distillation_loss(*arguments, weighting=weighting, batch_group=dist.group.WORLD)
                raw = case.raw_weights.tolist()
                expected = []
                for begin in range(0, 64, size):
                    neighbours = raw[begin : begin + size]
                    mean = sum(neighbours) / len(neighbours)
                    expected += [min(value / mean, cap or value / mean) for value in neighbours]
                yield f"{counts} in groups of {size}", worst(out.weights, case.loss.new_tensor(expected)[mine]), 1e-12
                yield "raw", worst(out.raw_weights, case.raw_weights[mine]), 1e-9


def moving_average_over_ranks():
    weighting, state, average = WeightingConfig(threshold=0.8, ceiling=2.0, normalize="ema"), None, None
    for number in (6, 7, 20):
        case = load_cases()[number]
        arguments, mine = part_of(case, one_rank_has_none(dist.get_world_size(), case))
        loss = LossConfig(temperature=case.settings["temperature"])
        out = distillation_loss(*arguments, loss=loss, weighting=weighting, batch_group=dist.group.WORLD, state=state)
        ratio, owner = case.log_ratio.clamp(max=2.0), case.owner
        raw = []
        for i in range(case.batch):
            pivotal = [value for value in ratio[owner == i].tolist() if value >= 0.8]
            raw.append(case.loss.new_tensor(sum(pivotal) / len(pivotal) if pivotal else 0.0).exp())
        raw = torch.stack(raw)
        average = raw.mean() if average is None else 0.1 * raw.mean() + 0.9 * average
        yield f"case {number} weights", worst(out.weights, (raw / average)[mine]), 1e-12
        yield f"case {number} state", worst(out.state, average), 1e-12
        state = out.state


def uniform_and_given_weights():
    """Weights that ask nothing of the other ranks; the denominator still counts their sequences."""
    case, ranks = load_cases()[25], dist.get_world_size()
    counts = uneven_counts(ranks, case)
    arguments, mine = part_of(case, counts)
    weights = torch.arange(1.0, case.batch + 1, dtype=torch.float64)
    for given in (None, weights[mine]):
        out = distillation_loss(
            *arguments,
            weighting=WeightingConfig(name="uniform"),
            batch_group=dist.group.WORLD,
            weights=given,
            loss=LossConfig(temperature=case.settings["temperature"]),
        )
        total = out.loss.clone()
        dist.all_reduce(total)
        applied = torch.ones(case.batch, dtype=torch.float64) if given is None else weights
        scale = (applied / tokens_per_sequence(case) / case.batch)[case.owner]
        yield "loss", worst(total / ranks, (scale * case.token_divergence).sum()), 1e-12
        yield "weights", worst(out.weights, applied[mine]), 0.0
        yield "raw", worst(out.raw_weights, case.raw_weights[mine]), 1e-9


def ranks_without_tokens():
    """N = 0 everywhere and on rank 0 only, with sequences that have no tokens and without any, on every axis."""
    case, group, rank = load_cases()[4], dist.group.WORLD, dist.get_rank()
    empty = (case.student_logits[:0], case.teacher_logits[:0], case.token_ids[:0], case.owner[:0])
    for normalize in ("batch", "group", "ema", "none"):
        for beta in (0.0, 0.5):
            for sequences in (0, 2):
                settings = {
                    "loss": LossConfig(beta=beta),
                    "weighting": WeightingConfig(normalize=normalize, group_size=2 if normalize == "group" else None),
                }
                for axis in ({"batch_group": group}, {"sequence_group": group}):
                    student = empty[0].clone().requires_grad_()
                    out = distillation_loss(student, *empty[1:], sequences, **settings, **axis)
                    out.loss.backward()
                    yield "all empty", float(out.loss != 0 or student.grad.shape != student.shape), 0.0
                    yield "weights", worst(out.weights, torch.ones(sequences)), 0.0
                start, stop = vocabulary_edges("uneven", group.size(), case.vocab)[rank]
                out = distillation_loss(
                    *(x[:, start:stop] for x in empty[:2]),
                    *empty[2:],
                    sequences,
                    shard=VocabShard(start, stop, case.vocab, group),
                    **settings,
                )
                yield "empty shards", float(out.loss != 0), 0.0

                # Rank 0 has `sequences` sequences without a token, the last rank has all of the case.
                tokens = (case.student_logits, case.teacher_logits, case.token_ids, case.owner)
                last = rank == group.size() - 1
                settings["weighting"] = WeightingConfig(name="uniform")
                arguments = (*tokens, case.batch) if last else (*empty, sequences if rank == 0 else 0)
                out = distillation_loss(*arguments, **settings, batch_group=group)
                total = out.loss.clone()
                dist.all_reduce(total)
                alone = distillation_loss(*tokens, case.batch, **settings).loss
                expected = alone * case.batch / (case.batch + sequences)
                yield "one empty rank", worst(total / group.size(), expected), 1e-12


def what_travels(shape):
    """Collectives of a forward and a backward on a mesh of (data or context, tensor)."""
    outer, tensor = axes_of(shape)
    case = load_cases()[20]
    start, stop = vocabulary_edges("uneven", tensor.size(), case.vocab)[tensor.rank()]
    for dtype in DTYPES:
        shards = [x.to(dtype)[:, start:stop].contiguous() for x in (case.student_logits, case.teacher_logits)]
        arguments = (*shards, case.token_ids, case.owner, case.batch)
        for beta in (0.0, 0.1, 1.0):
            for entry_clip in (None, 0.05):
                for normalize in ("batch", "group", "ema", "none"):
                    weighting = WeightingConfig(normalize=normalize, group_size=2 if normalize == "group" else None)
                    for axis in ("batch_group", "sequence_group"):
                        shards[0].requires_grad_().grad = None
                        with counting() as calls, CountingDispatch() as dispatch:
                            out = distillation_loss(
                                *arguments,
                                LossConfig(beta=beta, entry_clip=entry_clip),
                                weighting,
                                VocabShard(start, stop, case.vocab, tensor),
                                **{axis: outer},
                            )
                            forward = len(calls)
                            out.loss.backward()
                        label = f"{dtype} beta {beta} clip {entry_clip} {normalize} {axis}"
                        rounds = 1 if beta in (0.0, 1.0) and entry_clip is None else 2
                        on_tensor = [size for _, group, size in calls if group is tensor]
                        on_outer = sum(group is outer for _, group, _ in calls)
                        yield f"{label}: tensor group", abs(len(on_tensor) - rounds), 0.0
                        yield f"{label}: other group", on_outer, 1.0
                        yield f"{label}: elsewhere", len(calls) - len(on_tensor) - on_outer, 0.0
                        yield f"{label}: backward", len(calls) - forward, 0.0
                        yield f"{label}: not seen", abs(dispatch.count - len(calls)), 0.0
                        yield f"{label}: bytes a token", max(on_tensor) / len(case.owner), 64.0


def impossible_columns():
    """Forward KL where a shard, or a part of one, has logits of -inf: for both models, and for the teacher only."""
    case, tensor = load_cases()[1], dist.group.WORLD
    for first, last in ((0, 3), *vocabulary_edges("uneven", tensor.size(), case.vocab)):
        ids = torch.where((case.token_ids >= first) & (case.token_ids < last), last % case.vocab, case.token_ids)
        for both in (True, False):
            student, teacher = case.student_logits.clone(), case.teacher_logits.clone()
            teacher[:, first:last] = -torch.inf
            if both:
                student[:, first:last] = -torch.inf
            target = teacher.softmax(-1)
            mine, values = vocabulary_edges("uneven", tensor.size(), case.vocab)[tensor.rank()], []
            for (start, stop), group in (((0, case.vocab), None), (mine, tensor)):
                local = student[:, start:stop].clone().requires_grad_()
                shard = VocabShard(start, stop, case.vocab, group)
                arguments = (local, teacher[:, start:stop], ids, case.owner, case.batch)
                out = distillation_loss(*arguments, shard=shard)
                out.loss.backward()
                values.append(out.loss.detach())
                scale = (out.weights / tokens_per_sequence(case) / case.batch)[case.owner][:, None]
                expected = scale * (student.softmax(-1) - target)[:, start:stop]
                yield f"columns {first} to {last}, both: {both}", worst(local.grad, expected), 1e-12
            yield "loss", worst(values[1], values[0]), 1e-12


DATA_COUNTS = {"uneven": uneven_counts, "one rank without": one_rank_has_none}
ON_ANY = {
    "groups of sequences": group_normalization,
    "moving average": moving_average_over_ranks,
    "uniform and given weights": uniform_and_given_weights,
    "ranks without tokens": ranks_without_tokens,
    "impossible columns": impossible_columns,
}


def data_groups(function):
    return {
        f"{function.__name__}: {name}, {str(dtype)[6:]}": functools.partial(function, counts, dtype)
        for name, counts in DATA_COUNTS.items()
        for dtype in DTYPES
    }


GROUPS = {
    2: {
        **vocabulary_groups(),
        **data_groups(data_parallel),
        **{
            f"CP: {cut.__name__}, {str(dtype)[6:]}": functools.partial(context_parallel, cut, dtype)
            for cut in (first_third, whole_sequences)
            for dtype in DTYPES
        },
        "CP: lengths given": functools.partial(context_parallel, first_third, torch.float64, known_lengths=True),
        **ON_ANY,
    },
    3: {**vocabulary_groups(), **data_groups(data_parallel), **ON_ANY},
    4: {
        **vocabulary_groups(),
        **data_groups(data_and_tensor_parallel),
        "CP and TP": functools.partial(context_and_tensor_parallel, torch.float64),
        "DP and CP": functools.partial(data_and_context_parallel, torch.float64),
        "what travels": functools.partial(what_travels, (2, 2)),
        **ON_ANY,
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
