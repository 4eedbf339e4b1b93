"""Judgement of a run's first step: what is as it should be, what may not be intended, and what cannot be meant."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

_MIN_TOKENS = 8
_FALL, _CLEAR_FALL, _STANDARD_ERRORS = 0.3, 0.9, 6.0
"""Shares of the divergence by which it falls where rows are shifted back, and standard errors that the smaller one
has to be away from none."""
_BOUNDARY_NATS, _ABOVE_REST = 5.0, 3.0
_WARN = 0.1
"""Share of a bound from which on a value is worth a warning."""


class Level(Enum):
    """How serious a finding is."""

    OK = "ok"
    WARNING = "warning"
    """It may be intended."""
    FAULT = "fault"
    """The run learns something else than it should; nothing can be meant by it."""


@dataclass(frozen=True)
class Finding:
    """One of a first step's canaries: its name, what was seen, and how serious it is."""

    name: str
    level: Level
    text: str


@dataclass(frozen=True)
class Bounds:
    """Largest differences that rounding explains, nats a token.

    Attributes:
        same: mean divergence of a model from itself.
        logp: of a log-probability that is computed twice from the same hidden states.
        gap: mean difference between the sampler's and the trainer's log-probabilities.
    """

    same: float
    logp: float
    gap: float


BOUNDS = {
    "fp32": Bounds(same=1e-5, logp=0.01, gap=0.01),
    "bf16": Bounds(same=0.01, logp=0.5, gap=0.5),
    "fp8": Bounds(same=0.1, logp=0.5, gap=1.5),
}
"""By the coarser of the two models' precisions."""


@dataclass(frozen=True)
class Expected:
    """What is known of a run before its first step.

    Attributes:
        precision: a key of `BOUNDS`.
        is_same_model: whether the teacher is the student's weights at the start, without an adapter on either.
        boundary_remedy: what to do where the teacher expects something else than a completion's first token.
        ends: the student's ends in words.
        teacher_ends: ends of the teachers' own completions that are not the student's, in words; empty: none.
    """

    precision: str
    is_same_model: bool
    boundary_remedy: str
    ends: str
    teacher_ends: str = ""


@dataclass(frozen=True)
class Measured:
    """What the first step of a run shows, over the whole batch; nats are means over tokens.

    Attributes:
        sequences, tokens: completions, and their tokens.
        gap: absolute difference between the sampler's and the trainer's log-probabilities; None: not both are known.
        compared: tokens at which the two models' distributions were compared; 0: they cannot be.
        other_tokens: of these, tokens at which the teacher's score is not that of the student's token.
        divergence: at these.
        earlier, later: with each of the student's rows against the teacher's row before it, and after it.
        fall: standard errors by which the smaller of `earlier` and `later` is below `divergence`.
        is_same_prompt: whether both models read the same prompts.
        first_student, first_teacher: log-probabilities of the completions' first tokens.
        rest: log ratio student to teacher at all other tokens.
        ended, inside: completions that ended by themselves; those with an end of the teacher's own before their end.
    """

    sequences: int
    tokens: int
    gap: float | None
    compared: int
    other_tokens: int
    divergence: float
    earlier: float
    later: float
    fall: float
    is_same_prompt: bool
    first_student: float
    first_teacher: float
    rest: float
    ended: int
    inside: int


def findings(measured: Measured, expected: Expected) -> list[Finding]:
    """The findings of a first step, in the order in which a token passes: sampler, teacher, rows, prompt, end."""
    bounds = BOUNDS[expected.precision]
    found = [_sampler(measured, bounds)]
    if measured.compared:
        found += [_tokens(measured), _rows(measured)]
        if expected.is_same_model and measured.is_same_prompt:
            found.append(_same(measured, bounds))
    return [*found, _boundary(measured, expected), _ends(measured, expected)]


def _sampler(measured: Measured, bounds: Bounds) -> Finding:
    if measured.gap is None:
        return Finding("sampler", Level.OK, "its log-probabilities are not used: the trainer computes them again")
    text = f"{measured.gap:.2g} nats a token between the sampler's log-probabilities and the trainer's"
    if measured.gap > bounds.gap:
        text += (
            f", where rounding explains {bounds.gap:g}: completions are drawn with other weights than those that are "
            "trained. If the sampler is one of your own, hand it the student's weights before each step"
        )
        return Finding("sampler", Level.FAULT, text)
    if measured.gap > _WARN * bounds.gap:
        return Finding("sampler", Level.WARNING, f"{text}; rounding explains {bounds.gap:g} at the most")
    return Finding("sampler", Level.OK, text)


def _tokens(measured: Measured) -> Finding:
    if measured.other_tokens:
        text = (
            f"at {measured.other_tokens} of {measured.compared} tokens the teacher's log-probability is not that of "
            "the student's token: it scored other ids, or other completions. A teacher must read the student's token "
            "ids as they are, not a text that is tokenized again"
        )
        return Finding("tokens", Level.FAULT, text)
    return Finding("tokens", Level.OK, f"the teacher scored the student's own, each of {measured.compared} looked at")


def _rows(measured: Measured) -> Finding:
    shifted = min(measured.earlier, measured.later)
    text = (
        f"the divergence is {measured.divergence:.3g} nats a token; with the teacher's rows shifted by one "
        f"{measured.earlier:.3g} and {measured.later:.3g}"
    )
    lost = measured.divergence - shifted
    is_clear = lost > _CLEAR_FALL * measured.divergence
    is_likely = lost > _FALL * measured.divergence and measured.fall > _STANDARD_ERRORS
    if measured.compared >= _MIN_TOKENS and measured.divergence > 0 and (is_clear or is_likely):
        side = "one earlier" if measured.later < measured.earlier else "one later"
        text += (
            f": the teacher's rows belong to the tokens {side}. The row that predicts a token is the one of the token "
            "before it; a teacher of your own returns the rows at `MicroBatch.row_index`"
        )
        return Finding("rows", Level.FAULT, text)
    return Finding("rows", Level.OK, text)


def _same(measured: Measured, bounds: Bounds) -> Finding:
    text = f"the teacher is the student, and reads the same prompts: {measured.divergence:.2g} nats a token"
    if measured.divergence > bounds.same:
        text += (
            f", where rounding explains {bounds.same:g}: the two differ in precision, in weights or in layers. See "
            "that both are read from the same files, in the same dtype"
        )
        return Finding("same model", Level.WARNING, text)
    return Finding("same model", Level.OK, text)


def _boundary(measured: Measured, expected: Expected) -> Finding:
    text = (
        f"a completion's first token has {measured.first_student:.3g} nats of the student and "
        f"{measured.first_teacher:.3g} of the teacher"
    )
    ratio = measured.first_student - measured.first_teacher
    if ratio > _BOUNDARY_NATS and ratio > measured.rest + _ABOVE_REST:
        text += f", which expects something else there. {expected.boundary_remedy}"
        return Finding("boundary", Level.WARNING, text)
    return Finding("boundary", Level.OK, text)


def _ends(measured: Measured, expected: Expected) -> Finding:
    text = f"{measured.ended} of {measured.sequences} completions ended by themselves, at {expected.ends}"
    if measured.inside:
        text += (
            f"; {measured.inside} went on behind {expected.teacher_ends}, where the teacher ends its own. Give that to "
            "rollout.stop_token_ids"
        )
        return Finding("ends", Level.WARNING, text)
    return Finding("ends", Level.OK, text)
