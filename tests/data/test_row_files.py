"""Files of records as people have them: read whatever their name says, or named as what they are."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from renio_megatron.config import DataConfig
from renio_megatron.data.sources import build_source, check_files
from renio_megatron.data.sources.row_files import rows_of
from renio_megatron.errors import DataError
from tests.helpers.row_files import write_rows

ROWS: list[dict[str, Any]] = [
    {"problem": "1 + 1?", "answer": "2"},
    {"problem": "zwei\nZeilen, ä", "answer": "3"},
    {"problem": "[]", "answer": "4"},
]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


WRITERS = {
    "lines": lambda path: path.write_text(LINES),
    "lines, blank ones between": lambda path: path.write_text(LINES.replace("\n", "\n\n  \n")),
    "lines, no end": lambda path: path.write_text(LINES.rstrip("\n")),
    "lines of Windows": lambda path: path.write_bytes(LINES.replace("\n", "\r\n").encode()),
    "a mark of UTF-8": lambda path: path.write_text(LINES, encoding="utf-8-sig"),
    "gzipped lines": lambda path: path.write_bytes(gzip.compress(LINES.encode())),
    "an array": lambda path: path.write_text(json.dumps(ROWS)),
    "an array over lines": lambda path: path.write_text("\n" + json.dumps(ROWS, indent=2, ensure_ascii=False)),
    "an array with a mark": lambda path: path.write_text(json.dumps(ROWS), encoding="utf-8-sig"),
    "a gzipped array": lambda path: path.write_bytes(gzip.compress(json.dumps(ROWS).encode())),
    "parquet": lambda path: write_rows(path, ROWS, row_group_size=2),
}


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "jsonl.gz"])
@pytest.mark.parametrize("form", WRITERS)
def test_every_form_holds_the_same_records(form: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"data.{suffix}"
    WRITERS[form](path)
    assert [row for _, row in rows_of(path, "data.path")] == ROWS
    config = DataConfig(source="jsonl", path=str(path), eval_path=str(path))
    check_files(config, "train")
    source = build_source(config, "eval")
    assert (source.size, source.has_answers) == (3, True)
    assert [source.record(place).problem for place in range(3)] == [row["problem"] for row in ROWS]


def test_places_are_lines_or_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    WRITERS["lines, blank ones between"](path)
    assert [where for where, _ in rows_of(path, "data.path")] == [f"{path}:1", f"{path}:4", f"{path}:7"]
    WRITERS["an array"](path)
    assert [where for where, _ in rows_of(path, "data.path")] == [f"{path}, row {number}" for number in range(3)]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (LINES.encode("utf-16"), "is UTF-16"),
        (LINES.encode("utf-32"), "is UTF-32"),
        (b"problem\tanswer\n1\t2\n", "looks like TSV"),
        (b"problem,answer\n1,2\n", "looks like CSV"),
        (json.dumps({"data": ROWS}, indent=1).encode(), "object over several lines"),
        (b"PK\x03\x04rest", "is a zip archive"),
        (gzip.compress(LINES.encode(), mtime=0)[:40], "cannot be read"),
        (gzip.compress(b"PAR1 and more", mtime=0), "gzipped parquet"),
        (b"PAR1" + bytes(50), "a parquet file that cannot be read"),
        (b"", "the file holds no records"),
        (b"\n \n", "the file holds no records"),
        (b"[]", "the file holds no records"),
        (b"[1, 2]", "row 0: expected a JSON object, got int"),
        (b'[{"problem": "1"}, {"pro', "a JSON array that cannot be read"),
        (b'["a"]\n["b"]\n', "a.jsonl:1: expected a JSON object, got list"),
        (b'{"problem": "1"}\n[1]\n', "a.jsonl:2: expected a JSON object, got list"),
        (b'{"problem": "1"}\n{"problem": \n', "a.jsonl:2: not valid JSON"),
        (b'{"problem": "\xff"}\n', "a.jsonl:1: not valid JSON"),
        (b'{"problem": ' + b"[" * 99_999 + b"\n", "a.jsonl:1: the JSON is nested too deeply"),
        (b"[" * 99_999, "the JSON is nested too deeply"),
    ],
)
def test_what_is_no_record_is_named(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(rows_of(path, "data.path"))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_of_a_large_file_the_first_records_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("renio_megatron.data.sources.files._READ_WHOLE", 100)
    monkeypatch.setattr("renio_megatron.data.sources.files._FIRST_RECORDS", 3)
    path = tmp_path / "a.jsonl"
    config = DataConfig(source="jsonl", path=str(path))
    path.write_text(LINES + "{\n")
    check_files(config, "train")
    with pytest.raises(DataError, match=r"a\.jsonl:4"):
        build_source(config, "train")
    path.write_text("{\n" + LINES)
    with pytest.raises(DataError, match=r"a\.jsonl:1"):
        check_files(config, "train")


@pytest.mark.parametrize(
    ("row", "found", "told"),
    [
        ({"question": "1?", "Answer": "4"}, ("1?", None, "4"), ["'question'", "'Answer'", "data.problem_key"]),
        ({"Problem": "1?", "response": "so 4"}, ("1?", "so 4", None), ["'Problem'", "'response'"]),
        ({"prompt": "1?", "completion": "4", "ground_truth": 4}, ("1?", "4", "4"), ["'ground_truth'"]),
        ({"problem": "1?", "question": "2?", "answer": "4"}, ("1?", None, "4"), []),
        ({"instruction": "1?", "extra": "4"}, ("1?", None, None), ["'instruction'"]),
    ],
)
def test_usual_names_of_columns_are_read_and_told(
    row: dict[str, Any], found: tuple[Any, ...], told: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row))
    source = build_source(DataConfig(source="jsonl", path=str(path)), "train")
    record = source.record(0)
    assert (record.problem, record.solution, record.answer) == found
    assert bool(source.notices) == bool(told)
    for words in told:
        assert words in " ".join(source.notices)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"problem": "1?", "response": "a", "completion": "b"}, ["'response', 'completion' could be meant"]),
        ({"problem": "1?", "target": {"a": 1}}, []),
        ({"problem": "1?", "ground_truth": "1", "target": "2"}, ["'ground_truth', 'target'", "data.answer_key"]),
    ],
)
def test_a_column_that_may_be_missing_is_left_out_where_it_is_not_clear(
    row: dict[str, Any], told: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row))
    source = build_source(DataConfig(source="jsonl", path=str(path)), "train")
    assert (source.record(0).solution, source.record(0).answer) == (None, None)
    assert len(source.notices) == bool(told)
    for words in told:
        assert words in source.notices[0]


def test_a_name_that_was_asked_for_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "1?"}\n')
    with pytest.raises(DataError, match="there is no column 'frage' with a problem; columns: question"):
        build_source(DataConfig(source="jsonl", path=str(path), problem_key="frage"), "train")
    path.write_text('{"question": "1?", "prompt": "2?"}\n')
    with pytest.raises(DataError, match=r"'question', 'prompt' could be meant\. Set data\.problem_key"):
        build_source(DataConfig(source="jsonl", path=str(path)), "train")
    source = build_source(DataConfig(source="jsonl", path=str(path), problem_key="prompt"), "train")
    assert source.record(0).problem == "2?"


def test_data_sets_have_usual_names_as_well(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([{"question": "1?", "final_answer": "4"}]).save_to_disk(str(tmp_path / "a"))
    source = build_source(DataConfig(source="datasets", path=str(tmp_path / "a")), "train")
    assert (source.record(0).problem, source.record(0).answer) == ("1?", "4")
    assert "'final_answer'" in " ".join(source.notices)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (4, "4"),
        (4.0, "4.0"),
        (1e-05, "0.00001"),
        (-2.5e-7, "-0.00000025"),
        (1e22, "10000000000000000000000"),
        (123456789012345678901234567890, "123456789012345678901234567890"),
        ("1e-05", "0.00001"),
        (" 2.50E2 ", "250"),
        ("1e", "1e"),
        ("e2", "e2"),
        ("x + 1", "x + 1"),
        ("#### 42", "#### 42"),
        (None, None),
    ],
)
def test_answers_are_read_as_text_in_full_digits(value: Any, text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"problem": "1?", "answer": value}))
    assert build_source(DataConfig(source="jsonl", path=str(path)), "train").record(0).answer == text


def test_a_small_number_is_graded() -> None:
    from renio_megatron.data.sources.columns import answer_text
    from renio_megatron.evaluation.graders.grader import Completion
    from renio_megatron.evaluation.graders.number import grade_number
    from renio_megatron.types import Record

    answer = answer_text({"answer": 1e-05}, "answer", "here")
    record = Record("", answer=answer)

    def is_right(text: str) -> bool | None:
        return grade_number(Completion(text), record).correct

    assert is_right("It is 0.00001.") and is_right(r"\boxed{\frac{1}{100000}}")
    assert not is_right("It is 1.") and not is_right("It is 0.0001.")
