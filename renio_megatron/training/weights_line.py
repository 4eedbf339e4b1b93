"""What a run says about its weights at its start: what they are divided by, and what they cost."""

from __future__ import annotations

from typing import Any

from renio_megatron.config import WeightingConfig
from renio_megatron.config.sections.weighting import RenioWeighting, UniformWeighting
from renio_megatron.objective.weightings import LOGIT_INPUTS, OF_STUDENT
from renio_megatron.training.largest_weight import largest_weight


def weights_line(config: WeightingConfig, num_sequences: int, data_ranks: int) -> str:
    """One line: the mean that a raw weight is divided by, its number of sequences, and the bound afterwards.

    >>> weights_line(WeightingConfig(normalize="group", group_size=8, cap=None), num_sequences=32, data_ranks=1)
    'weights: renio, divided by the mean of each group of 8 consecutive sequences (4 groups a step), not capped'

    Args:
        config: the weighting.
        num_sequences: sequences of an optimizer step over all ranks.
        data_ranks: data-parallel size.
    """
    parts = [part for part in config.parts if not isinstance(part, UniformWeighting)]
    if not parts:
        return "weights: all 1 (uniform): plain distillation"
    line = "; times ".join(_weights_of(part, num_sequences, data_ranks) for part in parts)
    several = sum(not part.weighs_tokens for part in parts) > 1
    return f"weights: {line}{'; their product divided by its mean once more' if several else ''}"


def _weights_of(config: WeightingConfig, num_sequences: int, data_ranks: int) -> str:
    """Normalization of one strategy's weights, and their bound, as text."""
    settings: Any = config.normalized
    name = config.name if config.inner is None else f"{config.name} {config.inner.name}"
    what = " of each token" if config.weighs_tokens else ""
    if settings.divisor == "none":
        largest = f", at most {largest_weight(settings):.4g}" if isinstance(settings, RenioWeighting) else ""
        return f"{name}{what}, raw: not divided by any mean, not capped{largest}"
    sequences = f"{num_sequences} sequences"
    if settings.divisor == "group":
        groups = -(-num_sequences // settings.group)
        mean = (
            f"the mean of each group of {settings.group} consecutive sequences ({groups} "
            f"{'group' if groups == 1 else 'groups'} a step)"
        )
        if settings.group == 1:
            mean += ", so every weight is 1: plain distillation"
    elif settings.divisor == "ema":
        mean = f"the moving average, decay {settings.ema_decay:g}, of batch means of {sequences}"
    elif settings.divisor == "unit_mean":
        return f"{name}{what}, divided by the mean over its sequence"
    else:
        mean = f"the mean of all {'tokens of ' if config.weighs_tokens else ''}{sequences} of the step"
        if data_ranks > 1:
            mean += f" ({data_ranks} data-parallel ranks x {num_sequences // data_ranks})"
    bound = (
        "" if config.weighs_tokens else ", not capped" if settings.bound is None else f", capped at {settings.bound:g}"
    )
    return f"{name}{what}, divided by {mean}{bound}"


def weights_price(weighting: WeightingConfig, *, teacher_reads_again: bool = False) -> str | None:
    """One line about the extra passes that the weighting needs in a step; None where it needs none.

    `teacher_reads_again`: the teacher's hidden states are not stored, but recomputed where they are needed.
    """
    wanted = sorted(weighting.needs & LOGIT_INPUTS)
    if not wanted:
        return None
    is_alone = set(wanted) <= OF_STUDENT
    who = "the student reads" if is_alone or not teacher_reads_again else "student and teacher read"
    return (
        f"weights: {' and '.join(wanted)} of each token: {who} every step's completions once more before the update, "
        f"with {'the LM head' if is_alone else 'both LM heads'} (time/score_s)"
    )
