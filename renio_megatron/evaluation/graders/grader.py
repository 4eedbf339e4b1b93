"""What a grader is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from renio_megatron.errors import DataError, RenioError
from renio_megatron.types import Record, Verdict

UNCLOSED_THINKING = "the thinking is not closed"
CUT = "cut before an answer"
NO_ANSWER = "no answer found"


@dataclass(frozen=True)
class Completion:
    """A student's completion as text.

    Attributes:
        text: the completion without its end token. Special tokens stay visible: a padding token that the student
            sampled is a mistake and must not vanish.
        finished: whether it ended by itself (False: cut at the maximum length).
        in_thinking: whether the prompt ends inside an open thought, so that the text begins within it.
    """

    text: str
    finished: bool = True
    in_thinking: bool = False


Grade = Callable[[Completion, Record], Verdict]


def every_record_fits(record: Record) -> str | None:
    """None: for graders that can use any record."""
    return None


def same_text(one: str, other: str) -> bool:
    """Whether two answers are the same text."""
    return one == other


@dataclass(frozen=True)
class Grader:
    """A grader of completions.

    Attributes:
        name: its name in `data.grader`.
        grade: (completion, record) -> verdict. It may raise: `data.grader_errors` decides what follows.
        problem_of: why a record's completions cannot be graded, for the user; None where they can.
        same_answer: whether two answers that it read are the same, for a majority vote; None: there is no such vote.
    """

    name: str
    grade: Grade
    problem_of: Callable[[Record], str | None] = every_record_fits
    same_answer: Callable[[str, str], bool] | None = same_text


class GuardedGrader:
    """A grader whose exceptions stop the job, or count as wrong: then the first is told.

    Args:
        grader: the grader, which may be user code.
        errors: `raise`, or `count_wrong`.
        setting: name of the setting that says so, for messages.
        report: takes the sentence about the first exception that counts as wrong.
    """

    def __init__(self, grader: Grader, *, errors: str, setting: str, report: Callable[[str], object]) -> None:
        self.grader = grader
        self._errors, self._setting, self._report = errors, setting, report
        self._has_reported = False

    def __call__(self, completion: Completion, record: Record, place: str) -> Verdict:
        """The verdict; `correct` is None where the grader raised.

        Raises:
            DataError: it raised, and `errors` is `raise`; names the `place`.
        """
        try:
            return self.grader.grade(completion, record)
        except Exception as error:  # any error of a grader
            said = str(error).rstrip(".") if isinstance(error, RenioError) else f"{type(error).__name__}: {error}"
            problem = f"{place}: the grader {self.grader.name!r} raised {said}."
            if self._errors == "raise":
                raise DataError(
                    f"{problem} Fix the record or the grader, or set {self._setting}=count_wrong to count such "
                    "completions as wrong."
                ) from error
        if not self._has_reported:
            self._report(f"{problem} It counts as wrong, as later ones will without a word.")
            self._has_reported = True
        return Verdict(None, None, problem)
