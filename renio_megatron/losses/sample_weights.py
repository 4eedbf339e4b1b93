"""From the log-probabilities of sampled tokens to sample weights, before any logit is differentiated.

This is walk "I am a log-ratio": born as two log-probabilities, subtracted, clipped, asked whether it is pivotal, summed
over its sequence, averaged over the batch, and finished as the weight of its sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from renio_megatron.config import WeightingConfig
from renio_megatron.errors import ConfigError
from renio_megatron.objective.normalize import divide_and_cap, moving_average
from renio_megatron.objective.reduce import tokens_per_sequence
from renio_megatron.objective.weightings import WEIGHTINGS
from renio_megatron.objective.weightings.renio import is_pivotal, pivotal_evidence, raw_weight
from renio_megatron.parallel.reductions import batch_mean, group_means, sum_pieces


def applied_cap(config: WeightingConfig) -> float | None:
    """The bound that is in force: a cap applies after `batch` and `group` only, and not to uniform weights."""
    normalized = config.name in WEIGHTINGS and WEIGHTINGS[config.name].is_normalized
    return config.cap if normalized and config.normalize in ("batch", "group") else None


@dataclass(frozen=True)
class SampleWeights:
    """Weights of a rank's sequences and what they came from.

    Attributes:
        weights: what the loss multiplies each sequence by [B].
        raw_weights: ReNIO's weights before normalisation, whatever the weighting [B].
        log_ratio: log p_S - log p_T of each sampled token, unclipped, nats [N].
        is_pivotal: bool [N].
        lengths: completion tokens of each whole sequence [B].
        batch_size: sequences of the optimiser step over the batch group, fp64 scalar.
        state: what the next optimiser step's call wants; None unless the normalisation is `ema`.
    """

    weights: torch.Tensor
    raw_weights: torch.Tensor
    log_ratio: torch.Tensor
    is_pivotal: torch.Tensor
    lengths: torch.Tensor
    batch_size: torch.Tensor
    state: torch.Tensor | None


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
) -> SampleWeights:
    """Weights of an optimiser step's sequences, on every rank.

    At most one collective on `sequence_group` and one on `batch_group`.

    Args:
        student_logp, teacher_logp: log-probability of each sampled token at one temperature, nats [N].
        owner: sequence of each token, int64 [N] in [0, num_sequences), any order.
        num_sequences: B of this rank; sequences without tokens count.
        config: the weighting.
        batch_group: data-parallel group of the batch; never holds context-parallel ranks. None: the batch is here.
        sequence_group: context-parallel group whose ranks hold pieces of the same sequences.
        weights: finished weights [B]; the weighting then only diagnoses.
        sequence_lengths: tokens of each whole sequence [B]; None: counted.
        state: the `state` of the previous step's result (`ema`).

    Raises:
        ConfigError: an unknown weighting.
    Gradient: none flows.
    """
    if config.name not in WEIGHTINGS:
        raise ConfigError(f"weighting.name must be one of {', '.join(WEIGHTINGS)}; got {config.name!r}.")
    strategy = WEIGHTINGS[config.name]
    log_ratio = (student_logp - teacher_logp).detach()
    bounds = {"threshold": config.threshold, "ceiling": config.ceiling}
    lengths = tokens_per_sequence(owner, num_sequences).to(log_ratio.dtype)
    pivots = pivotal_evidence(log_ratio, owner, num_sequences, **bounds)
    evidence = strategy.evidence(log_ratio, owner, num_sequences, **bounds)
    table = sum_pieces(torch.cat((lengths[:, None], pivots, evidence), dim=1), sequence_group)
    if sequence_lengths is None:
        sequence_lengths = table[:, 0]
    raw = raw_weight(table[:, 1:3], temperature=config.temperature)
    unnormalized = strategy.raw_weight(table[:, 3:], temperature=config.temperature)

    normalize = config.normalize if strategy.is_normalized and weights is None else "none"
    cap = applied_cap(config)
    if normalize == "group":
        assert config.group_size is not None  # the settings see to it
        means, batch_size = group_means(unnormalized, config.group_size, batch_group)
        finished = divide_and_cap(unnormalized, means, cap)
    else:
        mean, batch_size = batch_mean(unnormalized, batch_group)
        if normalize == "ema":
            state = moving_average(mean, state, config.ema_decay)
            finished = divide_and_cap(unnormalized, state, None)
        elif normalize == "batch":
            finished = divide_and_cap(unnormalized, mean, cap)
        else:
            finished = unnormalized
    return SampleWeights(
        weights=finished if weights is None else weights.detach().to(raw),
        raw_weights=raw,
        log_ratio=log_ratio,
        is_pivotal=is_pivotal(log_ratio, **bounds),
        lengths=sequence_lengths.to(raw),
        batch_size=batch_size,
        state=state,
    )
