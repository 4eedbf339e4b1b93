"""Notices about weights: a strategy that has no effect, and bounds that take it away."""

from __future__ import annotations

from collections.abc import Sequence

from renio_megatron.config.sections.weighting import UniformWeighting, renio_in
from renio_megatron.training.largest_weight import largest_weight
from renio_megatron.training.notices.rows import (
    STEADY_STEPS,
    WINDOW_STEPS,
    Notice,
    Row,
    Watched,
    always,
    divergence,
    last,
    mean,
    steps,
)

CAP_SHARE = 0.2
"""Fraction of the largest possible share of capped weights above which a notice is given. Of weights with mean 1 at
most one in `cap` can reach the cap, so the default cap of 10 gives it at 2 % of the sequences."""

PIVOT_GRADIENT_SHARE = 0.5
"""Fraction of the gradient's norm at pivotal tokens below which the entry bounds have removed most of it."""

EQUAL = 1e-6
"""How far the largest weight of a step may be from their mean, relative to it, where all are equal."""


def _nothing_pivotal(recent: Sequence[Row], watched: Watched) -> str | None:
    rows, renio = always(recent, STEADY_STEPS, "renio/unit_weight_frac", 1.0), renio_in(watched.weighting)
    if renio is None or not rows:
        return None
    return (
        f"no token was pivotal in {steps(rows)}: every raw weight was 1, and the weights change nothing against "
        f"plain distillation. No log ratio reached weighting.threshold={renio.threshold:g} nats{divergence(rows)}"
        ". Lower weighting.threshold; where the divergence is close to 0, teacher and student agree: check "
        "teacher.model and data.teacher_template, or stop, if the student has learned what the teacher knows."
    )


def _all_at_ceiling(recent: Sequence[Row], watched: Watched) -> str | None:
    rows, renio = always(recent, STEADY_STEPS, "renio/ceiling_frac", 1.0), renio_in(watched.weighting)
    if renio is None or not rows:
        return None
    largest = largest_weight(renio)
    effect = (
        f"every sequence weighs {largest:.4g}, which is a larger learning rate and nothing else"
        if renio.normalize == "none"
        else "equal weights become 1 when they are divided by their mean, as in plain distillation"
    )
    return (
        f"every raw weight was at the ceiling in {steps(rows)}: exp({renio.ceiling:g} / "
        f"{renio.temperature:g}) = {largest:.4g}. So {effect}{divergence(rows)}. Raise weighting.ceiling, and "
        "check that teacher and student belong together: one tokenizer, one chat template, loss.temperature."
    )


def _all_zero(recent: Sequence[Row], watched: Watched) -> str | None:
    step, row = recent[-1]
    if row.get("weight/max") != 0.0:
        return None
    return (
        f"every sequence of step {step} weighs 0: weighting={watched.weighting.name} found nothing in it that counts, "
        "and the step taught nothing (weight/max shows it for every step). Choose another weighting, or a larger "
        "train.global_batch_size."
    )


def _cap_binds(recent: Sequence[Row], watched: Watched) -> str | None:
    weighting = watched.weighting
    rows, cap = last(recent, WINDOW_STEPS, "weight/cap_frac"), weighting.bound
    if cap is None or not rows:
        return None
    share, possible = mean(rows, "weight/cap_frac"), 1.0 / max(1.0, cap)
    if share <= CAP_SHARE * possible:
        return None
    others = ", lower weighting.ceiling, or raise weighting.temperature" if renio_in(weighting) is not None else ""
    return (
        f"the cap cut {share:.1%} of the weights in {steps(rows)} and left a mean weight of "
        f"{mean(rows, 'weight/mean'):.3g}; at most {possible:.1%} of weights with mean 1 can reach a cap of "
        f"{cap:g}. The sequences that stand out most are held back, and the mean weight below 1 makes every step "
        f"smaller. Raise weighting.cap or set it to null{others}."
    )


def _pivotal_clipped(recent: Sequence[Row], watched: Watched) -> str | None:
    name, loss = "renio/pivot_gradient_frac", watched.loss
    rows = last([row for row in recent if name in row[1]], STEADY_STEPS, name)  # absent where no token was pivotal
    if loss.entry_clip is None or not rows or (share := mean(rows, name)) >= PIVOT_GRADIENT_SHARE:
        return None
    floor = "" if loss.entry_floor is None else f" and loss.entry_floor={loss.entry_floor:g}"
    return (
        f"loss.entry_clip={loss.entry_clip:g}{floor} left {share:.1%} of the gradient's norm at pivotal tokens in "
        f"{steps(rows)}: the tokens that give a sequence its weight hardly teach the student. Raise loss.entry_clip, "
        "or set it to null, which removes both bounds."
    )


def _all_equal(recent: Sequence[Row], watched: Watched) -> str | None:
    rows = [row for row in last(recent, STEADY_STEPS, "weight/max") if "weight/mean" in row[1]]
    strategies = [
        part.name for part in watched.weighting.parts if not (isinstance(part, UniformWeighting) or part.weighs_tokens)
    ]
    is_said_better = any(always(rows, STEADY_STEPS, f"renio/{name}_frac", 1.0) for name in ("unit_weight", "ceiling"))
    if not strategies or len(rows) < STEADY_STEPS or is_said_better:
        return None
    if any(not 0.0 < row["weight/max"] <= (1.0 + EQUAL) * row["weight/mean"] for _, row in rows):
        return None
    return (
        f"all sequences had the same weight in {steps(rows)}, so weighting={' x '.join(strategies)} changes nothing "
        "against plain distillation. A group of one sequence (weighting.group_size, train.global_batch_size) always "
        "has it; so have sequences in which the strategy finds the same: rollout.log=true shows them."
    )


OF_WEIGHTS = (
    Notice("no token is pivotal", f"in each of {STEADY_STEPS} steps", _nothing_pivotal),
    Notice("every raw weight is at the ceiling", f"in each of {STEADY_STEPS} steps", _all_at_ceiling),
    Notice("every sequence weighs 0", "in one step", _all_zero),
    Notice(
        "all sequences have the same weight, under a strategy that is not uniform",
        f"in each of {STEADY_STEPS} steps, within {EQUAL:g} of their mean",
        _all_equal,
    ),
    Notice(
        "the cap cuts weights",
        f"more than {CAP_SHARE:g} / cap of them ({CAP_SHARE / 10:.0%} at the default), mean of {WINDOW_STEPS} steps",
        _cap_binds,
    ),
    Notice(
        "an entry clip takes the gradient from pivotal tokens",
        f"it leaves less than {PIVOT_GRADIENT_SHARE:.0%} of its norm, mean of {STEADY_STEPS} steps",
        _pivotal_clipped,
    ),
)
