"""The files of an evaluation: completions as they are drawn, and what follows from them.

`completions.jsonl` grows while completions are drawn and is sorted at the end, so that an evaluation that was killed
and resumed leaves the same file as one that was not. A completion is drawn once: it is identified by benchmark, index
of the problem and number of the draw.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from renio_megatron.errors import CheckpointError, ConfigError, DataError
from renio_megatron.files import JsonLines, Lock, output_error, write_atomically
from renio_megatron.types import Record, Verdict

Row = Mapping[str, Any]
"""An object of completions.jsonl."""
Key = tuple[str, int, int]
"""(benchmark, index of the problem, number of the draw)."""
FIELDS = (
    *("benchmark", "index", "draw", "problem", "completion", "answer", "gold"),
    *("correct", "reason", "finish_reason", "tokens"),
)
"""Keys of a row of completions.jsonl, in their order."""


class Results:
    """A directory of results.

    Args:
        directory: it is created; an earlier evaluation's is continued.
        settings: what completions depend on: the model, and how they are drawn and judged.

    Raises:
        ConfigError: the directory holds an evaluation of another model, or with other settings; names the first. Or
            another process writes it.
        CheckpointError: the directory cannot be read or written.
    """

    def __init__(self, directory: Path, settings: Mapping[str, Any]) -> None:
        self.directory = directory
        self.completions = directory / "completions.jsonl"
        self._settings = directory / "settings.json"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._lock = Lock(directory / ".lock")
        except OSError as error:
            raise output_error(directory, error) from error
        if self._lock.holder is not None:
            raise ConfigError(
                f"{directory} is being written by {self._lock.holder}. Wait for it, or give another --output."
            )
        self._check(json.loads(json.dumps(settings)))
        self._lines = JsonLines(self.completions)
        self.rows = {key_of(row): row for row in _read(self.completions)}

    def _check(self, settings: dict[str, Any]) -> None:
        if self._settings.is_file():
            try:
                before = json.loads(self._settings.read_text())
            except ValueError as error:
                raise CheckpointError(f"{self._settings} cannot be read ({error}). Give another --output.") from error
            changed = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
            if changed:
                name = changed[0]
                raise ConfigError(
                    f"{self.directory} holds completions with {name}={_shown(before.get(name))}, now it is "
                    f"{_shown(settings.get(name))}. Give another --output, or the former value."
                )
            return
        if self.completions.is_file() and self.completions.stat().st_size:
            raise ConfigError(
                f"{self.completions} is there without the settings.json that says what it is of. Give another --output."
            )
        try:
            write_atomically(self._settings, json.dumps(settings, indent=1) + "\n")
        except OSError as error:
            raise output_error(self._settings, error) from error

    def require_same_problems(self, benchmark: str, digests: Sequence[str]) -> None:
        """Raises `ConfigError` where there are completions of other problems under the benchmark's name.

        Args:
            benchmark: its name.
            digests: of its problems, in their order; more than before, or fewer, are no other problems.
        """
        path = self.directory / "digests.json"
        known: dict[str, list[str]] = json.loads(path.read_text()) if path.is_file() else {}
        before = known.get(benchmark, [])
        for index, (old, new) in enumerate(zip(before, digests, strict=False)):
            if old != new:
                raise ConfigError(
                    f"{self.directory} holds completions of other problems under the name {benchmark!r}: they differ "
                    f"from problem {index} on, counted from 0. Give another --output, or rename the file."
                )
        if len(digests) > len(before):
            try:
                write_atomically(path, json.dumps({**known, benchmark: list(digests)}) + "\n")
            except OSError as error:
                raise output_error(path, error) from error

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Keeps rows; they are on disk when it returns.

        Raises:
            CheckpointError: writing fails.
        """
        self._lines.append(rows)
        self.rows.update((key_of(row), dict(row)) for row in rows)

    def finish(self, order: Sequence[str], summary: Mapping[str, Any], problems: Iterable[Mapping[str, Any]]) -> None:
        """Sorts the completions, and writes `summary.json` and `problems.jsonl`.

        Args:
            order: names of the benchmarks in the order of the command; those of earlier evaluations follow.
            summary: contents of summary.json.
            problems: rows of problems.jsonl.
        """
        self._lines.close()
        places = {
            name: place for place, name in enumerate(dict.fromkeys((*order, *sorted(key[0] for key in self.rows))))
        }
        ordered = sorted(self.rows, key=lambda key: (places[key[0]], *key[1:]))
        contents = {
            self.completions: _lines(self.rows[key] for key in ordered),
            self.directory / "problems.jsonl": _lines(problems),
            self.directory / "summary.json": json.dumps(summary, indent=1) + "\n",
        }
        for path, text in contents.items():
            try:
                write_atomically(path, text)
            except OSError as error:
                raise output_error(path, error) from error

    def close(self) -> None:
        """Closes the files."""
        self._lines.close()
        self._lock.close()


def saved_date(directory: Path) -> datetime | None:
    """The date that the prompts of an earlier evaluation in a directory hold; None where there is none."""
    try:
        return datetime.fromisoformat(json.loads((directory / "settings.json").read_text())["date"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def key_of(row: Mapping[str, Any]) -> Key:
    """What identifies a completion."""
    return row["benchmark"], row["index"], row["draw"]


def row_of(
    benchmark: str,
    index: int,
    draw: int,
    record: Record,
    verdict: Verdict,
    completion: str,
    *,
    finish_reason: str,
    tokens: int | None,
) -> dict[str, Any]:
    """A row of completions.jsonl.

    Args:
        benchmark, index, draw: what identifies it.
        record: the problem, without the instruction.
        verdict: on the completion.
        completion: its text.
        finish_reason: `stop`, or `length` where it was cut; of a server what that says.
        tokens: its length, the end token included; None where a server does not say it.
    """
    asked = (benchmark, index, draw, record.problem, completion, verdict.answer, record.answer)
    judged = (verdict.correct, verdict.reason, finish_reason, tokens)
    return dict(zip(FIELDS, (*asked, *judged), strict=True))


def _lines(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _read(path: Path) -> list[dict[str, Any]]:
    """The rows of completions.jsonl; a half-written last line has been cut off before."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            key_of(row)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}:{number}: it is no completion of an evaluation. Remove the line, and it is drawn again; or "
                "give another --output."
            ) from error
        rows.append(row)
    return rows


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
