"""Checks for settings without the intended effect: a line on weight normalization, warnings from step metrics."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from renio_megatron.config import LossConfig, WeightingConfig
from renio_megatron.config.sections.weighting import RenioWeighting, UniformWeighting, renio_in
from renio_megatron.objective.weightings import LOGIT_INPUTS, OF_STUDENT

logger = logging.getLogger(__name__)

STEADY_STEPS = 5
"""Consecutive steps that must all meet a condition that is exact in each step. One small batch without a pivotal token
is chance; five in a row are due to a setting, or to a student that already agrees with its teacher."""

WINDOW_STEPS = 20
"""Steps whose mean is used where single steps are noisy."""

CAP_SHARE = 0.2
"""Fraction of the largest possible share of capped weights above which a warning is given. Of weights with mean 1 at
most one in `cap` can reach the cap, so the default cap of 10 warns at 2 % of the sequences."""

PIVOT_GRADIENT_SHARE = 0.5
"""Fraction of the gradient's norm at pivotal tokens below which the entry bounds have removed most of it."""

CUT_SHARE, CUT_STEPS = 0.95, 3
"""Share of completions that are cut off, and the number of consecutive steps in which it must be reached. A limit that
is too short, or a student that never ends, shows in all of them."""

_Row = tuple[int, Mapping[str, float]]


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
        largest = f", at most {_largest(settings):.4g}" if isinstance(settings, RenioWeighting) else ""
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


class SettingWarnings:
    """An observer of a run's metrics that warns where a setting has no effect, or cancels another; once for each cause.

    A warning contains the observation, why it matters and which setting changes it.
    """

    def __init__(
        self,
        weighting: WeightingConfig,
        loss: LossConfig,
        report: Callable[[str], None] = logger.warning,
        *,
        prefix: bool = False,
    ) -> None:
        """`weighting` and `loss` are the run's; `report` receives each warning; `prefix`: completions are cut off on
        purpose."""
        self._weighting, self._loss, self._report = weighting, loss, report
        self._recent: deque[_Row] = deque(maxlen=WINDOW_STEPS)
        self._waiting = [check for check in _CHECKS if not (prefix and check is _nearly_all_cut)]

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes a step's metrics; step 0 (the evaluation before training) and skipped steps are ignored."""
        if step == 0 or metrics.get("train/skipped_frac"):
            return
        self._recent.append((step, metrics))
        for check in list(self._waiting):
            text = check(self._recent, self._weighting, self._loss)
            if text is not None:
                self._waiting.remove(check)
                self._report(text)


def _nothing_pivotal(recent: Sequence[_Row], weighting: WeightingConfig, loss: LossConfig) -> str | None:
    rows = _last(recent, STEADY_STEPS, "renio/unit_weight_frac")
    renio = renio_in(weighting)
    if renio is None or not rows or any(row["renio/unit_weight_frac"] != 1.0 for _, row in rows):
        return None
    return (
        f"no token was pivotal in {_steps(rows)}: every raw weight was 1, and the weights change nothing against "
        f"plain distillation. No log ratio reached weighting.threshold={renio.threshold:g} nats{_divergence(rows)}"
        ". Lower weighting.threshold; where the divergence is close to 0, teacher and student agree: check "
        "teacher.model and data.teacher_template, or stop, if the student has learned what the teacher knows."
    )


def _all_at_ceiling(recent: Sequence[_Row], weighting: WeightingConfig, loss: LossConfig) -> str | None:
    rows = _last(recent, STEADY_STEPS, "renio/ceiling_frac")
    renio = renio_in(weighting)
    if renio is None or not rows or any(row["renio/ceiling_frac"] != 1.0 for _, row in rows):
        return None
    largest = _largest(renio)
    effect = (
        f"every sequence weighs {largest:.4g}, which is a larger learning rate and nothing else"
        if renio.normalize == "none"
        else "equal weights become 1 when they are divided by their mean, as in plain distillation"
    )
    return (
        f"every raw weight was at the ceiling in {_steps(rows)}: exp({renio.ceiling:g} / "
        f"{renio.temperature:g}) = {largest:.4g}. So {effect}{_divergence(rows)}. Raise weighting.ceiling, and "
        "check that teacher and student belong together: one tokenizer, one chat template, loss.temperature."
    )


def _all_zero(recent: Sequence[_Row], weighting: WeightingConfig, loss: LossConfig) -> str | None:
    step, row = recent[-1]
    if row.get("weight/max") != 0.0:
        return None
    return (
        f"every sequence of step {step} weighs 0: weighting={weighting.name} found nothing in it that counts, and the "
        "step taught nothing (weight/max shows it for every step). Choose another weighting, or a larger "
        "train.global_batch_size."
    )


def _cap_binds(recent: Sequence[_Row], weighting: WeightingConfig, loss: LossConfig) -> str | None:
    rows, cap = _last(recent, WINDOW_STEPS, "weight/cap_frac"), weighting.bound
    if cap is None or not rows:
        return None
    share, possible = _mean(rows, "weight/cap_frac"), 1.0 / max(1.0, cap)
    if share <= CAP_SHARE * possible:
        return None
    others = ", lower weighting.ceiling, or raise weighting.temperature" if renio_in(weighting) is not None else ""
    return (
        f"the cap cut {share:.1%} of the weights in {_steps(rows)} and left a mean weight of "
        f"{_mean(rows, 'weight/mean'):.3g}; at most {possible:.1%} of weights with mean 1 can reach a cap of "
        f"{cap:g}. The sequences that stand out most are held back, and the mean weight below 1 makes every step "
        f"smaller. Raise weighting.cap or set it to null{others}."
    )


def _pivotal_clipped(recent: Sequence[_Row], weighting: WeightingConfig, loss: LossConfig) -> str | None:
    name = "renio/pivot_gradient_frac"
    rows = _last([row for row in recent if name in row[1]], STEADY_STEPS, name)  # absent where no token was pivotal
    if loss.entry_clip is None or not rows or (share := _mean(rows, name)) >= PIVOT_GRADIENT_SHARE:
        return None
    floor = "" if loss.entry_floor is None else f" and loss.entry_floor={loss.entry_floor:g}"
    return (
        f"loss.entry_clip={loss.entry_clip:g}{floor} left {share:.1%} of the gradient's norm at pivotal tokens in "
        f"{_steps(rows)}: the tokens that give a sequence its weight hardly teach the student. Raise loss.entry_clip, "
        "or set it to null, which removes both bounds."
    )


def _grader_fails(recent: Sequence[_Row], weighting: WeightingConfig, loss: LossConfig) -> str | None:
    step, row = recent[-1]
    share = row.get("rollout/grader_error_frac", 0.0)
    if share == 0.0:
        return None
    return (
        f"the grader failed on {share:.1%} of the completions of step {step}; they count as wrong, so rollout/accuracy "
        "is too low by up to as much (rollout/grader_error_frac shows it for every step). "
        "data.grader_errors=raise stops at the first one instead."
    )


def _nearly_all_cut(recent: Sequence[_Row], weighting: WeightingConfig, loss: LossConfig) -> str | None:
    rows = _last(recent, CUT_STEPS, "rollout/truncated_frac")
    if not rows or any(row["rollout/truncated_frac"] < CUT_SHARE for _, row in rows):
        return None
    return (
        f"{_mean(rows, 'rollout/truncated_frac'):.1%} of the completions were cut in {_steps(rows)}, at "
        f"{_mean(rows, 'rollout/length'):.0f} tokens on average: the student hardly ever comes to an end, and answers "
        "that are cut count as wrong. Raise rollout.max_completion_length; look at the ends that the run named at its "
        "start (`renio preview`), and set rollout.stop_token_ids or rollout.stop_strings; or say rollout.prefix=true, "
        "where the run trains on prefixes."
    )


_CHECKS = (_nearly_all_cut, _nothing_pivotal, _all_at_ceiling, _all_zero, _cap_binds, _pivotal_clipped, _grader_fails)


def _largest(weighting: RenioWeighting) -> float:
    """The raw weight at the ceiling."""
    exponent = weighting.ceiling / weighting.temperature
    return math.exp(exponent) if exponent < 700.0 else math.inf


def _last(rows: Sequence[_Row], count: int, name: str) -> list[_Row]:
    """The last `count` rows; none where there are fewer, or one of them lacks the metric."""
    chosen = list(rows)[-count:]
    return chosen if len(chosen) == count and all(name in row for _, row in chosen) else []


def _mean(rows: Sequence[_Row], name: str) -> float:
    return math.fsum(row[name] for _, row in rows) / len(rows)


def _steps(rows: Sequence[_Row]) -> str:
    return f"steps {rows[0][0]} to {rows[-1][0]}"


def _divergence(rows: Sequence[_Row]) -> str:
    """The last step's divergence in brackets, where it is known: it separates agreement from too high a threshold."""
    kl = rows[-1][1].get("loss/kl")
    return "" if kl is None else f" (divergence in step {rows[-1][0]}: {kl:.3g} nats/token)"
