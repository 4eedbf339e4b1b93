"""Weights of sequences and tokens from the log-probabilities of sampled tokens, before any gradient.

The path of a log ratio: two log-probabilities are subtracted and clipped, the token is tested for being pivotal, the
result is summed over the sequence, normalized over the batch, and becomes the weight of the sequence. A single strategy
is `weigh.py`; this file combines several of them, and reports on the weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from renio_megatron.config import WeightingConfig
from renio_megatron.config.sections.weighting import RenioWeighting, renio_in
from renio_megatron.errors import LayoutError
from renio_megatron.losses.weigh import Finished, Groups, Weigher
from renio_megatron.objective.normalize import divide_and_cap
from renio_megatron.objective.reduce import tokens_per_sequence
from renio_megatron.objective.weightings.renio import is_pivotal
from renio_megatron.objective.weightings.strategy import WeightingInputs
from renio_megatron.parallel.reductions import batch_mean, gather_shares, sum_over_group


@dataclass(frozen=True)
class RenioReport:
    """ReNIO's quantities for a rank's sequences, whatever strategy weights them.

    Attributes:
        raw_weights: weights before normalization [B].
        log_ratio: log p_S - log p_T of each sampled token, unclipped, nats [N].
        is_pivotal: bool [N].
    """

    raw_weights: torch.Tensor
    log_ratio: torch.Tensor
    is_pivotal: torch.Tensor


@dataclass(frozen=True)
class SampleWeights:
    """Weights of a rank's sequences, or of its context-parallel pieces of them.

    Attributes:
        weights: factor of each sequence in the loss [B].
        token_weights: factor of each token's divergence [N], 0 where a token does not count; None: 1.
        denominators: tokens that the mean over each whole sequence is over [B].
        is_capped: whether a strategy's cap bounds the sequence's weight, bool [B].
        lengths: completion tokens of each whole sequence [B].
        batch_size: sequences of the optimizer step over the batch group, fp64 scalar.
        state: input of the next optimizer step's call; None where nothing is averaged over steps.
        renio: see `RenioReport`; None where no report is requested.
    """

    weights: torch.Tensor
    token_weights: torch.Tensor | None
    denominators: torch.Tensor
    is_capped: torch.Tensor
    lengths: torch.Tensor
    batch_size: torch.Tensor
    state: torch.Tensor | None
    renio: RenioReport | None


def sample_weights(
    student_logp: torch.Tensor,
    teacher_logp: torch.Tensor,
    owner: torch.Tensor,
    num_sequences: int,
    config: WeightingConfig,
    *,
    batch_group: dist.ProcessGroup | None = None,
    sequence_group: dist.ProcessGroup | None = None,
    weights: torch.Tensor | None = None,
    sequence_lengths: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    inputs: Mapping[str, Any] | None = None,
    report: RenioWeighting | None = None,
) -> SampleWeights:
    """Weights of an optimizer step's sequences, on every rank.

    One strategy whose weights of sequences follow from sums takes at most one collective on `sequence_group` and one on
    `batch_group`; a product takes one more than its strategies together, and means of tokens, whole sequences
    and permutations one or two each.

    Args:
        student_logp, teacher_logp: log-probability of each sampled token at one temperature, nats [N].
        owner: sequence of each token, int64 [N] in [0, num_sequences), any order.
        num_sequences: B of this rank; sequences without tokens count.
        config: the weighting.
        batch_group: data-parallel group of the batch; never holds context-parallel ranks. None: this rank has the whole
            batch.
        sequence_group: context-parallel group whose ranks hold pieces of the same sequences.
        weights: finished weights [B], which skip the weighting.
        sequence_lengths: tokens of each whole sequence [B]; None: counted.
        state: the `state` of the previous step's result (`ema`).
        inputs: other inputs of the weighting, by name; see `WeightingInputs`.
        report: the bounds of `RenioReport`; None: those of the weighting where ReNIO is a part of it, else no report.

    Raises:
        ConfigError: an input that the weighting needs is missing.
    Gradient: none flows.
    """
    values = {"student_logp": student_logp.detach(), "teacher_logp": teacher_logp.detach(), **(inputs or {})}
    groups = Groups(batch_group, sequence_group)
    lengths = tokens_per_sequence(owner, num_sequences).to(values["student_logp"].dtype)
    if weights is None and "sequence" in config.needs and "sequence" not in values:
        first = gather_shares(lengths, batch_group)[1].start
        values["sequence"] = torch.arange(num_sequences, device=owner.device) + first
    given = WeightingInputs(owner, num_sequences, values)
    weighers = [] if weights is not None else [Weigher(part, given) for part in config.parts]
    reporter = _reporter(report or renio_in(config), weighers, given)
    sums = _sums(lengths, [*weighers, *filter(None, [reporter])], groups)
    whole = sums[None]["lengths"] if sequence_lengths is None else sequence_lengths.to(lengths)

    found = [
        weigher.finished(whole, sums.get(weigher, {}), groups, average)
        for weigher, average in zip(weighers, _split(state, weighers), strict=True)
    ]
    product, token_weights, batch_size = _product(found, lengths, groups)
    return SampleWeights(
        weights=product if weights is None else weights.detach().to(lengths),
        token_weights=token_weights,
        denominators=_denominators(found, given, whole, groups),
        is_capped=_is_capped(weighers, found, lengths),
        lengths=whole,
        batch_size=batch_size,
        state=_joined([one.state for one in found]) if weights is None else state,
        renio=None if reporter is None else _report(reporter, sums[reporter]),
    )


def _reporter(report: RenioWeighting | None, weighers: Sequence[Weigher], given: WeightingInputs) -> Weigher | None:
    """The weigher that makes the report: a part of the weighting where it has the same bounds."""
    if report is None:
        return None
    return next((one for one in weighers if one.config == report), None) or Weigher(report, given)


def _sums(
    lengths: torch.Tensor, weighers: Sequence[Weigher], groups: Groups
) -> dict[Weigher | None, dict[str, torch.Tensor]]:
    """Sums over whole sequences by strategy and name, and under None their `lengths`; one collective."""
    named: dict[tuple[Weigher | None, str], torch.Tensor] = {(None, "lengths"): lengths}
    for one in dict.fromkeys(weighers):
        if one.strategy.is_additive:
            named |= {(one, name): values for name, values in one.strategy.sums(one.inputs).items()}
    table = sum_over_group(torch.stack(list(named.values()), dim=1), groups.sequence)
    found: dict[Weigher | None, dict[str, torch.Tensor]] = {}
    for (whose, name), values in zip(named, table.unbind(1), strict=True):
        found.setdefault(whose, {})[name] = values
    return found


def _product(
    found: Sequence[Finished], lengths: torch.Tensor, groups: Groups
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """(weights [B], weights of tokens, sequences of the batch); products of several strategies are normalized to mean 1
    again."""
    sequences = [one.sequences for one in found if one.sequences is not None]
    tokens = [one.tokens for one in found if one.tokens is not None]
    tokens += [one.kept.to(lengths.dtype) for one in found if one.kept is not None]
    sizes = [one.batch_size for one in found if one.batch_size is not None]
    product = torch.ones_like(lengths)
    for weights in sequences:
        product = product * weights
    if len(sequences) != 1:
        mean, size = batch_mean(product, groups.batch)
        sizes.append(size)
        product = divide_and_cap(product, mean, None) if sequences else product
    token_product = None
    for weights in tokens:
        token_product = weights if token_product is None else token_product * weights
    return product, token_product, sizes[0]


def _denominators(
    found: Sequence[Finished], given: WeightingInputs, lengths: torch.Tensor, groups: Groups
) -> torch.Tensor:
    """Tokens that each sequence's mean is over: all, or those that every strategy keeps."""
    masks = [one.kept for one in found if one.kept is not None]
    if not masks:
        return lengths
    kept = torch.stack(masks).all(0).to(lengths.dtype)
    return sum_over_group(given.sum_of(kept), groups.sequence)


def _is_capped(weighers: Sequence[Weigher], found: Sequence[Finished], lengths: torch.Tensor) -> torch.Tensor:
    """Whether the weight that any strategy gives a sequence is its cap [B]."""
    capped = torch.zeros_like(lengths, dtype=torch.bool)
    for weigher, one in zip(weighers, found, strict=True):
        if one.sequences is not None and weigher.config.bound is not None:
            capped |= one.sequences >= weigher.config.bound
    return capped


def _split(state: torch.Tensor | None, weighers: Sequence[Weigher]) -> Iterator[torch.Tensor | None]:
    """Each strategy's moving average from a state; None for those that have none, and where there is no state."""
    count = sum(weigher.config.divisor == "ema" for weigher in weighers)
    if state is not None and weighers and state.numel() != count:
        raise LayoutError(
            f"the state of a moving average is one number for each strategy that has one, {count} here; got a tensor "
            f"of shape {tuple(state.shape)}. Pass the state that the step before returned, under the same weighting."
        )
    averages = iter([] if state is None else state.reshape(-1).unbind(0))
    return (next(averages, None) if weigher.config.divisor == "ema" else None for weigher in weighers)


def _joined(states: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """The state of a step: the average itself where there is one."""
    kept = [state for state in states if state is not None]
    return None if not kept else kept[0] if len(kept) == 1 else torch.stack(kept)


def _report(reporter: Weigher, sums: Mapping[str, torch.Tensor]) -> RenioReport:
    settings, inputs = reporter.config, reporter.inputs
    assert isinstance(settings, RenioWeighting)
    log_ratio = inputs.student_logp - inputs.teacher_logp
    raw = reporter.strategy.weights(inputs, sums).sequences
    assert raw is not None
    return RenioReport(raw, log_ratio, is_pivotal(log_ratio, threshold=settings.threshold, ceiling=settings.ceiling))
