"""Data as people have it: each format gives the same prompts as JSON lines with plain columns."""

from __future__ import annotations

import json
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from renio_megatron.config import DataConfig
from renio_megatron.data.prompts import PromptStream
from renio_megatron.data.sources import build_source, check_files
from renio_megatron.data.sources.conversations import conversation_of
from renio_megatron.data.sources.hub import digest
from renio_megatron.errors import DataError
from tests.data.test_prompts import CHAT, characters
from tests.helpers.row_files import write_rows

ROWS = [{"problem": f"{n} + {n}?", "solution": f"Twice {n}.", "answer": str(2 * n)} for n in range(1, 8)]
ROLES = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def prompts(path: Path, count: int = 16, start: int = 0, chat: str | None = None, **settings: Any) -> list:
    """Prompts, told apart from where they come from."""
    config = DataConfig(**{"source": "jsonl", "path": str(path), "chat": chat is not None, **settings})
    stream = PromptStream(build_source(config, "train"), characters(chat=chat), config)
    found = stream.batch(start, count)
    return [(one.index, one.student_ids, one.teacher_ids, one.record.solution, one.record.answer) for one in found]


def written(folder: Path, name: str) -> tuple[Path, dict[str, Any]]:
    """The rows in a format; and the settings that it needs."""
    import datasets

    path, settings = folder / name, {}
    if name in ("rows.jsonl.gz", "array.json", "rows.parquet"):
        write_rows(path, ROWS)
    elif name == "question.jsonl":
        write_rows(
            path, [{"Question": r["problem"], "response": r["solution"], "final_answer": r["answer"]} for r in ROWS]
        )
    elif name == "messages.jsonl":
        write_rows(path, [_chat("messages", row) for row in ROWS])
    elif name == "from_value.jsonl":
        turns = [[("human", row["problem"]), ("gpt", row["solution"])] for row in ROWS]
        pairs = [[{"from": role, "value": text} for role, text in one] for one in turns]
        write_rows(
            path, [{"conversations": one, "answer": row["answer"]} for one, row in zip(pairs, ROWS, strict=True)]
        )
    elif name == "verl.parquet":
        rows = [
            {
                "data_source": "sums",
                "prompt": [{"role": "user", "content": row["problem"]}],
                "solution": row["solution"],
                "reward_model": {"style": "rule", "ground_truth": row["answer"]},
            }
            for row in ROWS
        ]
        write_rows(path, rows)
    elif name == "saved":
        write_rows(path, ROWS)
        settings = {"source": "datasets"}
    elif name == "of splits":
        datasets.DatasetDict({"mine": datasets.Dataset.from_list(ROWS)}).save_to_disk(str(path))
        settings = {"source": "datasets", "split": "mine"}
    elif name in ("folder", "folder of two"):
        path.mkdir()
        if name == "folder":
            write_rows(path / "train.jsonl", ROWS)
        else:  # as the hub's repositories have them
            for part, rows in enumerate((ROWS[:3], ROWS[3:])):
                write_rows(path / f"train-0000{part}-of-00002.parquet", rows)
        settings = {"source": "datasets"}
    return path, settings


def _chat(column: str, row: dict[str, str]) -> dict[str, Any]:
    turns = [{"role": "user", "content": row["problem"]}, {"role": "assistant", "content": row["solution"]}]
    return {column: turns, "answer": row["answer"]}


@pytest.mark.parametrize(
    "name",
    [
        *("rows.jsonl.gz", "array.json", "rows.parquet", "question.jsonl", "messages.jsonl", "from_value.jsonl"),
        *("verl.parquet", "saved", "of splits", "folder", "folder of two"),
    ],
)
def test_each_format_gives_the_prompts_of_json_lines_also_in_the_middle_of_an_epoch(tmp_path, monkeypatch, name):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    expected = prompts(write_rows(tmp_path / "plain.jsonl", ROWS), teacher_template="{problem} {solution}")
    path, settings = written(tmp_path, name)
    settings["teacher_template"] = "{problem} {solution}"
    assert prompts(path, **settings) == expected
    assert prompts(path, 6, 10, **settings) == expected[10:]


def test_a_name_is_read_from_the_cache_and_the_network_is_not_asked(tmp_path, monkeypatch):
    """What `load_dataset` leaves there: a folder for each data set, configuration, version and hash."""
    import datasets
    import pyarrow

    def no_network(*args: Any, **kwargs: Any) -> None:
        pytest.fail("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "cache" / "someone___sums" / "easy" / "0.0.0" / "0123"
    folder.mkdir(parents=True)
    splits = {"train": ROWS[:5], "test": ROWS[5:]}
    for split, rows in splits.items():
        table = pyarrow.Table.from_pylist(rows)
        with pyarrow.ipc.new_stream(str(folder / f"sums-{split}.arrow"), table.schema) as out:
            out.write_table(table)
    info = {
        "features": {name: {"dtype": "string", "_type": "Value"} for name in ROWS[0]},
        "dataset_name": "sums",
        "config_name": "easy",
        "version": {"version_str": "0.0.0", "major": 0, "minor": 0, "patch": 0},
        "splits": {
            name: {"name": name, "num_bytes": 1, "num_examples": len(rows), "dataset_name": "sums"}
            for name, rows in splits.items()
        },
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))
    named = {"source": "datasets", "subset": "easy", "eval_split": "test"}
    expected = prompts(write_rows(tmp_path / "plain.jsonl", ROWS[:5]))
    config = DataConfig(**{**named, "path": "someone/sums"})
    check_files(config, "train")
    source = build_source(config, "train")
    stream = PromptStream(source, characters(), config)
    assert [one.student_ids for one in stream.batch(0, 16)] == [student for _, student, *_ in expected]
    assert source.record(0).where.startswith("someone/sums (easy), row ")
    assert source.contents is not None and source.contents() == build_source(config, "train").contents()
    other = build_source(config, "eval").contents
    assert other is not None and other() != source.contents()
    assert [build_source(config, "eval").record(n).problem for n in (0, 1)] == ["6 + 6?", "7 + 7?"]
    with pytest.raises(DataError, match=r"someone/sums: .*[Uu]nknown split .*Set data\.split to one of them"):
        build_source(replace(config, split="none"), "train")


def test_a_name_that_cannot_be_had_says_how(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"data\.path: someone/none, split 'train', cannot be .*load_dataset\('some"):
        check_files(DataConfig(source="datasets", path="someone/none"), "train")
    with pytest.raises(DataError, match=r"load_dataset\('someone/none', 'easy'\)"):
        check_files(DataConfig(source="datasets", path="someone/none", subset="easy"), "train")
    with pytest.raises(DataError, match=r"data\.path: there is no directory"):
        check_files(DataConfig(source="datasets", path="./none"), "train")


def test_a_digest_is_of_the_rows_and_not_of_how_they_are_stored():
    import datasets

    whole = datasets.Dataset.from_list(ROWS * 300)
    pieces = datasets.concatenate_datasets([datasets.Dataset.from_list(ROWS) for _ in range(300)])
    assert digest(whole) == digest(pieces)
    changed = [*ROWS * 299, *ROWS[:-1], {**ROWS[-1], "answer": "15"}]
    assert digest(datasets.Dataset.from_list(changed)) != digest(whole)


TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "And {doubled}?"},
]


@pytest.mark.parametrize("chat", [CHAT, ROLES])
@pytest.mark.parametrize("column", ["messages", "prompt", "conversations"])
def test_a_conversation_without_a_view_is_what_the_chat_template_makes_of_it(tmp_path, column, chat):
    tokenizer = characters(chat=chat)
    expected = tuple(tokenizer.apply_chat_template(TURNS, add_generation_prompt=True, return_dict=False))
    for turns, solution in ((TURNS, None), ([*TURNS, {"role": "assistant", "content": "4"}], "4")):
        ((_, student, teacher, found, _),) = prompts(write_rows(tmp_path / "a.jsonl", [{column: turns}]), 1, chat=chat)
        assert (student, teacher, found) == (expected, expected, solution)


def test_a_template_writes_the_last_turn_and_keeps_the_others(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"messages": TURNS}])
    ((_, student, _, _, _),) = prompts(path, 1, chat=ROLES, student_template="[{problem}]")
    text = "<system>Be brief.<user>1 + 1?<assistant>2<user>[And {doubled}?]<assistant>"
    assert characters().decode(list(student)) == text
    with pytest.raises(DataError, match=r"a\.jsonl:1: .* 4 turns \(system, user, assistant, user\).*data\.chat=true"):
        prompts(path, 1)


def test_contents_in_parts_are_joined(tmp_path):
    parts = [{"type": "text", "text": "1 + "}, {"type": "text", "text": "1?"}]
    found = conversation_of([{"role": "user", "content": parts}], "messages", "here")
    assert (found.before, found.question, found.answer) == ((), "1 + 1?", None)


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([], r"must end with a turn of the user.*got nothing"),
        ([{"role": "system", "content": "x"}], r"got a turn of 'system'"),
        ([{"role": "assistant", "content": "x"}], r"got nothing there"),
        (["x"], r"turn 1: a turn is an object with `role` and `content`.*got 'x'"),
        ([{"role": "user"}], r"turn 1: a turn is an object"),
        ([{"role": "user", "content": None}], r"got NoneType as its contents"),
        ([{"role": "user", "content": [{"type": "image", "image": "a"}]}], r"got list as its contents. Images"),
        ([{"role": 3, "content": "x"}], r"got the role 3"),
        ([{"role": "user", "content": "x", "name": "Bob"}], r"turn 1: it has name, which a chat template may write"),
        (
            [{"role": "assistant", "content": "", "tool_calls": [{}]}, {"role": "user", "content": "x"}],
            r"turn 1: it has tool_calls, which",
        ),
    ],
)
def test_what_is_no_conversation_is_named_with_its_line(tmp_path, turns, message):
    with pytest.raises(DataError, match=r"a\.jsonl:1: column 'messages'.*" + message):
        prompts(write_rows(tmp_path / "a.jsonl", [{"messages": turns}]), 1, chat=ROLES)


def test_parts_of_a_turn_that_are_empty_are_none(tmp_path):
    turns = [{"role": "user", "content": "1?", "tool_calls": None, "name": None, "weight": 1}]
    assert conversation_of(turns, "messages", "here").question == "1?"


def test_text_is_preferred_to_a_conversation(tmp_path):
    """As in data sets that keep the first question beside the whole conversation."""
    rows = [{"prompt": "1 + 1?", "messages": [{"role": "user", "content": "1 + 1?"}]}]
    source = build_source(DataConfig(source="jsonl", path=str(write_rows(tmp_path / "a.jsonl", rows))), "train")
    assert (source.record(0).problem, source.record(0).before) == ("1 + 1?", ())
    assert any("read from 'prompt'" in notice for notice in source.notices)


def test_completions_may_be_one_turn(tmp_path):
    asked = [{"role": "user", "content": "1 + 1?"}]
    rows = [{"prompt": asked, "completion": [{"role": "assistant", "content": "2"}]}]
    path = write_rows(tmp_path / "a.jsonl", rows)
    ((_, _, _, solution, _),) = prompts(path, 1, chat=ROLES)
    assert solution == "2"
    rows[0]["completion"] = asked
    with pytest.raises(DataError, match=r"a\.jsonl:1: column 'completion' must hold text, or one turn .* got user"):
        prompts(write_rows(path, rows), 1, chat=ROLES)


def test_a_misspelled_column_of_the_teachers_prompts_is_refused(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"problem": "1?", "teacher_prompt": "1? (1)"}])
    with pytest.raises(DataError, match=r"there is no column 'techer', which data\.teacher_prompt_key names; columns"):
        prompts(path, 1, teacher_prompt_key="techer")
    eval_file = write_rows(tmp_path / "b.jsonl", [{"problem": "1?"}])
    config = DataConfig(source="jsonl", path=str(path), eval_path=str(eval_file), teacher_prompt_key="other")
    assert build_source(config, "eval").record(0).problem == "1?", "no teacher reads these"


def test_the_system_turn_of_a_setting_stands_before_the_teachers_own_prompt(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"problem": "1?", "teacher_prompt": "1? (1)"}])
    systems = {"student_system": "S", "teacher_system": "T"}
    ((_, student, teacher, _, _),) = prompts(path, 1, chat=ROLES, **systems)
    texts = [characters().decode(list(ids)) for ids in (student, teacher)]
    assert texts == ["<system>S<user>1?<assistant>", "<system>T<user>1? (1)<assistant>"]
    own = [{"role": "system", "content": "R"}, {"role": "user", "content": "1?"}]
    write_rows(path, [{"problem": "1?", "teacher_prompt": own}])
    with pytest.raises(DataError, match=r"a system turn of its own, and data\.teacher_system is set"):
        prompts(path, 1, chat=ROLES, **systems)
    with pytest.raises(DataError, match=r"a system turn of its own, and data\.student_system is set"):
        prompts(path, 1, chat=ROLES, student_system="S")


def test_fine_tuning_reads_no_prompt_of_a_teacher(tmp_path):
    turns = [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "1"}, {"role": "user", "content": "2"}]
    row = {"problem": "1?", "solution": "1", "teacher_prompt": turns}
    config = DataConfig(source="jsonl", path=str(write_rows(tmp_path / "a.jsonl", [row])))
    stream = PromptStream(build_source(config, "train"), characters(), config, with_completions=True)
    (prompt,) = stream.batch(0, 1)
    assert prompt.teacher_ids == prompt.student_ids


def test_the_answers_of_gsm8k_are_solution_and_answer(tmp_path):
    rows = [
        {"question": "Half of 48?", "answer": "It is 48/2 = <<48/2=24>>24.\n#### 24"},
        {"question": "1000 + 1?", "answer": "It is 1,001.\n#### 1,001"},
    ]
    path = write_rows(tmp_path / "a.jsonl", rows)
    source = build_source(DataConfig(source="jsonl", path=str(path), eval_path=str(path)), "eval")
    assert [(source.record(n).solution, source.record(n).answer) for n in (0, 1)] == [
        (rows[0]["answer"], "24"),
        (rows[1]["answer"], "1,001"),
    ]
    assert any("the answer what follows ####" in notice for notice in source.notices)
    for text in ("A\n#### Step one\nB", "#### 24"):
        source = build_source(
            DataConfig(source="jsonl", path=str(write_rows(tmp_path / "b.jsonl", [{"question": "q", "answer": text}]))),
            "train",
        )
        assert (source.record(0).solution, source.record(0).answer) == (None, text)
    config = DataConfig(source="jsonl", path=str(path), solution_key="worked")
    assert build_source(config, "train").record(0).solution is None, "a setting that was given stands"
    rows[0]["solution"] = "Halve it."
    source = build_source(DataConfig(source="jsonl", path=str(write_rows(path, rows))), "train")
    assert {source.record(n).solution for n in (0, 1)} == {"Halve it.", None}
    assert all("####" in (source.record(n).answer or "") for n in (0, 1))


def test_the_teachers_own_prompt(tmp_path):
    turns = [{"role": "system", "content": "You know it is 2."}, {"role": "user", "content": "1 + 1?"}]
    rows = [{"problem": "1 + 1?", "teacher_prompt": turns}, {"problem": "2?", "teacher_prompt": "2? (2)"}]
    path = write_rows(tmp_path / "a.jsonl", [*rows, {"problem": "3?", "teacher_prompt": None}])
    config = DataConfig(source="jsonl", path=str(path), eval_path=str(path), chat=True)
    tokenizer = characters(chat=ROLES)
    drawn = PromptStream(build_source(config, "train"), tokenizer, config).batch(0, 3)
    found = sorted(drawn, key=lambda prompt: "123".index(prompt.record.problem[0]))
    texts = [tokenizer.decode(list(one.teacher_ids)) for one in found]
    assert texts == [
        "<system>You know it is 2.<user>1 + 1?<assistant>",
        "<user>2? (2)<assistant>",
        "<user>3?<assistant>",
    ]
    assert tokenizer.decode(list(found[0].student_ids)) == "<user>1 + 1?<assistant>"
    told = DataConfig(source="jsonl", path=str(path), teacher_template="{problem}!", chat=True)
    source = build_source(told, "train")
    assert source.record(0).teacher_turns is None
    assert any("'teacher_prompt' is not read" in notice for notice in source.notices)
    rows[0]["teacher_prompt"] = [*turns, {"role": "assistant", "content": "2"}]
    with pytest.raises(DataError, match=r"a\.jsonl:1: .*ends with the assistant's answer"):
        build_source(DataConfig(source="jsonl", path=str(write_rows(path, rows)), chat=True), "train")
    rows[0]["teacher_prompt"] = 3
    with pytest.raises(DataError, match=r"a\.jsonl:1: column 'teacher_prompt' must hold a prompt.*got 3"):
        build_source(DataConfig(source="jsonl", path=str(write_rows(path, rows)), chat=True), "train")


def test_a_nested_column_by_a_setting(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"problem": "p", "extra": {"gold": {"value": 7}}}])
    source = build_source(DataConfig(source="jsonl", path=str(path), answer_key="extra.gold.value"), "train")
    assert source.record(0).answer == "7" and source.record(0).metadata == {"extra": {"gold": {"value": 7}}}
