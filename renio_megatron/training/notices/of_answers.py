"""Notices about completions and what graders read in them."""

from __future__ import annotations

from collections.abc import Sequence

from renio_megatron.training.metrics.registry import family_of
from renio_megatron.training.notices.rows import LONG, STEADY_STEPS, Notice, Row, Watched, always, last, mean, steps

_OF_A_GROUP = "teacher/*/no_answer_frac"
CUT_SHARE, CUT_STEPS = 0.95, 3
"""Share of completions that are cut off, and the number of consecutive steps in which it must be reached. A limit that
is too short, or a student that never ends, shows in all of them."""


def _grader_fails(recent: Sequence[Row], watched: Watched) -> str | None:
    step, row = recent[-1]
    share = row.get("rollout/grader_error_frac", 0.0)
    if share == 0.0:
        return None
    return (
        f"the grader failed on {share:.1%} of the completions of step {step}; they count as wrong, so rollout/accuracy "
        "is too low by up to as much (rollout/grader_error_frac shows it for every step). "
        "data.grader_errors=raise stops at the first one instead."
    )


def _nearly_all_cut(recent: Sequence[Row], watched: Watched) -> str | None:
    if watched.is_prefix:
        return None
    rows = last(recent, CUT_STEPS, "rollout/truncated_frac")
    if not rows or any(row["rollout/truncated_frac"] < CUT_SHARE for _, row in rows):
        return None
    return (
        f"{mean(rows, 'rollout/truncated_frac'):.1%} of the completions were cut in {steps(rows)}, at "
        f"{mean(rows, 'rollout/length'):.0f} tokens on average: the student hardly ever comes to an end, and answers "
        "that are cut count as wrong. Raise rollout.max_completion_length; look at the ends that the run named at its "
        "start (`renio preview`), and set rollout.stop_token_ids or rollout.stop_strings; or say rollout.prefix=true, "
        "where the run trains on prefixes."
    )


def _all_the_same(recent: Sequence[Row], watched: Watched) -> str | None:
    rows = always(recent, STEADY_STEPS, "rollout/distinct", 1.0)
    if watched.num_sequences == 1 or not rows:
        return None
    return (
        f"all completions of a step were equal in {steps(rows)}, whatever their prompts: a step learns from one text. "
        "Raise rollout.temperature, rollout.top_k or rollout.top_p; look at the prompts (`renio preview`): a chat "
        "template that the student does not know, or an end that comes first; and at the rate of learning, if it began "
        "in the middle of the run."
    )


def _accuracy_stands(recent: Sequence[Row], watched: Watched) -> str | None:
    if rows := always(recent, LONG, "rollout/accuracy", 0.0):
        return (
            f"no completion was right in {steps(rows)}: the task may be beyond the student, or the grader does not "
            "read its answers. The weights do not look at answers, and go on. Look at some completions "
            "(rollout.log=true) and at what the grader reads of them (`renio preview`, data.grader)."
        )
    if rows := always(recent, LONG, "rollout/accuracy", 1.0):
        return (
            f"every completion was right in {steps(rows)}: these problems have nothing to teach any more by their "
            "answers. Take harder ones, or stop; if they are hard, look at what the grader accepts (rollout.log=true)."
        )
    return None


def _unread(recent: Sequence[Row], watched: Watched) -> str | None:
    names = ("rollout/no_answer_frac", *(name for name in recent[-1][1] if family_of(name) == _OF_A_GROUP))
    for name in names:
        if rows := always(recent, STEADY_STEPS, name, 1.0):
            whose = "completion" if name == names[0] else f"completion of the records of {name.split('/')[1]!r}"
            return (
                f"no grader read an answer in any {whose} in {steps(rows)} ({name}): they all count as wrong. Look at "
                "some (rollout.log=true); choose a grader that reads their form (data.grader), or ask for that form in "
                "the prompt (data.student_template)."
            )
    return None


OF_ANSWERS = (
    Notice("completions are cut", f"at least {CUT_SHARE:.0%} of them in each of {CUT_STEPS} steps", _nearly_all_cut),
    Notice("all completions of a step are equal", f"in each of {STEADY_STEPS} steps", _all_the_same),
    Notice("no completion is right, or every one", f"in each of {LONG} steps", _accuracy_stands),
    Notice(
        "no grader reads an answer in any completion, or in any that one of several teachers scores",
        f"in each of {STEADY_STEPS} steps",
        _unread,
    ),
    Notice("the grader fails", "in one step", _grader_fails),
)
