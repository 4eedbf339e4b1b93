"""Records from the rows of a file, whatever its columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from renio_megatron.config import DataConfig
from renio_megatron.data.sources.columns import answer_text, behind_hashes, value_of
from renio_megatron.data.sources.conversations import answer_of, conversation_of
from renio_megatron.errors import DataError
from renio_megatron.types import Record, Turn


class RecordReader:
    """Reads the rows of one file.

    A problem is text, or a conversation, whose last answer, if it has one, is the solution. Where all answers end in a
    line behind ``####`` and there is no column of solutions, the answer's text is the solution and that line the
    answer: GSM8K's way.

    Args:
        config: the settings, with the file's columns.
        names: its columns, as `column_names` gives them.
        where: the file, for messages.
        answers: values of the column of answers in all rows.
        is_taught: whether a teacher may read the records, which have prompts of its own then.
    Attributes:
        notices: sentences about how rows are read.

    Raises:
        DataError: the setting of the teacher's own prompts names a column that is not there.
    """

    def __init__(
        self, config: DataConfig, names: Sequence[str], where: str, answers: Iterable[Any], *, is_taught: bool
    ) -> None:
        self._config = config
        self.notices: list[str] = []
        is_free = config.solution_key == DataConfig().solution_key and config.solution_key not in names
        self._splits_answers = is_free and _all_have_hashes(answers)
        if self._splits_answers:
            self.notices.append(
                f"{where}: the solution is the text of {config.answer_key!r}, and the answer what follows #### in it; "
                "a column of data.solution_key says otherwise."
            )
        self._reads_teacher_prompts = is_taught and config.teacher_prompt_key in names
        is_chosen = is_taught and config.teacher_prompt_key != DataConfig().teacher_prompt_key
        if is_chosen and not self._reads_teacher_prompts:
            raise DataError(
                f"{where}: there is no column {config.teacher_prompt_key!r}, which data.teacher_prompt_key names; "
                f"columns: {', '.join(names)}."
            )
        if self._reads_teacher_prompts and config.teacher_template is not None:
            self._reads_teacher_prompts = False
            self.notices.append(
                f"{where}: the column {config.teacher_prompt_key!r} is not read, because data.teacher_template says "
                "what the teacher sees. Leave one of them out."
            )

    def record(self, row: Mapping[str, Any], where: str) -> Record:
        """The record of a row.

        Raises:
            DataError: it has no problem, or a column holds something else than it should.
        """
        config = self._config
        problem, before, solution = self._problem(row, where)
        column = value_of(row, config.solution_key)
        if isinstance(column, list) and column and isinstance(column[0], Mapping):
            solution = answer_of(column, config.solution_key, where)
        elif (text := text_of(row, config.solution_key, where)) is not None:
            solution = text
        answer = answer_text(row, config.answer_key, where)
        if self._splits_answers and answer is not None:
            solution, answer = answer, behind_hashes(answer)
        used = (
            *(config.problem_key, config.solution_key, config.answer_key, config.teacher_key),
            *((config.teacher_prompt_key,) if self._reads_teacher_prompts else ()),
        )
        return Record(
            problem=problem,
            solution=solution,
            answer=answer,
            metadata={key: value for key, value in row.items() if key not in used},
            where=where,
            teacher=None if config.teacher_key is None else text_of(row, config.teacher_key, where),
            before=before,
            teacher_turns=self._teacher_turns(row, where),
        )

    def _problem(self, row: Mapping[str, Any], where: str) -> tuple[str, tuple[Turn, ...], str | None]:
        """(the problem, the turns before it, the answer behind it)."""
        key = self._config.problem_key
        value = value_of(row, key)
        before: tuple[Turn, ...] = ()
        solution = None
        if isinstance(value, list):
            asked = conversation_of(value, key, where)
            before, value, solution = asked.before, asked.question, asked.answer
        if value is None:
            raise DataError(
                f"{where}: there is no column {key!r} with a problem; columns: {', '.join(row) or 'none'}. "
                "Set data.problem_key to the right one."
            )
        if not isinstance(value, str):
            raise DataError(f"{where}: column {key!r} must hold text, got {type(value).__name__}.")
        if not value.strip():
            raise DataError(f"{where}: the problem ({key!r}) is empty.")
        return value, before, solution

    def _teacher_turns(self, row: Mapping[str, Any], where: str) -> tuple[Turn, ...] | None:
        key = self._config.teacher_prompt_key
        value = value_of(row, key) if self._reads_teacher_prompts else None
        if isinstance(value, list):
            asked = conversation_of(value, key, where)
            if asked.answer is not None:
                raise DataError(
                    f"{where}: column {key!r} ends with the assistant's answer; the student's completion follows it. "
                    "End it with a turn of the user."
                )
            return (*asked.before, ("user", asked.question))
        if value is not None and not (isinstance(value, str) and value.strip()):
            raise DataError(f"{where}: column {key!r} must hold a prompt, text or turns; got {value!r:.80}.")
        return None if value is None else (("user", value),)


def text_of(row: Mapping[str, Any], key: str, where: str) -> str | None:
    """The text of a column; None where there is none."""
    value = value_of(row, key)
    if value is not None and not isinstance(value, str):
        raise DataError(f"{where}: column {key!r} must hold text, got {type(value).__name__}.")
    return value


def _all_have_hashes(answers: Iterable[Any]) -> bool:
    """Whether there are answers, and all are text that ends in a line behind hashes, with text before it."""
    is_empty = True
    for answer in answers:
        is_empty = False
        if not isinstance(answer, str):
            return False
        before, _, last = answer.rpartition("####")
        if not before.strip() or not last.strip() or "\n" in last.strip():
            return False
    return not is_empty
