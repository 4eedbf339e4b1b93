import json

import pytest

from renio_megatron.config import DataConfig
from renio_megatron.data import sources
from renio_megatron.data.sources import build_source
from renio_megatron.errors import ConfigError, DataError
from renio_megatron.evaluation.graders import Completion, build_grader


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def jsonl(path, *rows, split="train", **settings):
    file = write(path / "data.jsonl", *rows)
    return build_source(DataConfig(source="jsonl", path=file, eval_path=file, **settings), split)


def test_jsonl_reads_its_columns(tmp_path):
    row = {"question": "2+2?", "work": "four", "result": 4, "level": 1}
    keys = {"problem_key": "question", "solution_key": "work", "answer_key": "result"}
    record = jsonl(tmp_path, "", row, **keys).record(0)
    assert (record.problem, record.solution, record.answer) == ("2+2?", "four", "4")
    assert record.metadata == {"level": 1}
    assert record.where.endswith("data.jsonl:2"), "blank lines count"


def test_each_epoch_is_a_permutation_of_its_own(tmp_path):
    rows = [{"problem": str(i)} for i in range(20)]
    source = jsonl(tmp_path, *rows, seed=1)
    epochs = [[source.record(20 * epoch + i).problem for i in range(20)] for epoch in range(3)]
    assert all(sorted(epoch, key=int) == [str(i) for i in range(20)] for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    again = jsonl(tmp_path, *rows, seed=1)
    assert [again.record(i).problem for i in (39, 0, 21)] == [epochs[1][19], epochs[0][0], epochs[1][1]]
    assert [jsonl(tmp_path, *rows, seed=2).record(i).problem for i in range(20)] != epochs[0]


def test_evaluation_keeps_the_order_of_the_file(tmp_path):
    source = jsonl(tmp_path, *({"problem": str(i)} for i in range(20)), split="eval")
    assert [source.record(i).problem for i in range(20)] == [str(i) for i in range(20)]


GOOD = {"problem": "p", "answer": "1"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{oops", r"data\.jsonl:2: not valid JSON"),
        ("[1, 2]", r"data\.jsonl:2: expected a JSON object, got list"),
        (
            {"question": "q", "answer": "1"},
            r"data\.jsonl:2: .*'problem'.*columns: question, answer\..*data\.problem_key",
        ),
        ({"problem": 3, "answer": "1"}, r"data\.jsonl:2: column 'problem' must hold text, got int"),
        ({"problem": " ", "answer": "1"}, r"data\.jsonl:2: the problem .* is empty"),
        ({"problem": "p", "answer": True}, r"data\.jsonl:2: column 'answer' must hold text, got bool"),
        ({"problem": "p", "answer": "1", "solution": ["a"]}, r"data\.jsonl:2: column 'solution' .* list"),
        ({"problem": "p"}, r"data\.jsonl:2: no answer .*data\.jsonl:1 has one"),
    ],
)
def test_jsonl_errors_name_the_line(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        jsonl(tmp_path, GOOD, row)


def test_jsonl_not_utf8_names_the_line(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_bytes(b'{"problem": "p"}\n{"problem": "\xff"}\n')
    with pytest.raises(DataError, match=r"data\.jsonl:2: not valid JSON"):
        build_source(DataConfig(source="jsonl", path=str(file)), "train")


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(DataError, match=r"data\.path: there is no file"):
        build_source(DataConfig(source="jsonl", path=str(tmp_path / "none.jsonl")), "train")
    with pytest.raises(DataError, match="holds no records"):
        jsonl(tmp_path, "", "")
    with pytest.raises(ConfigError, match=r"needs data\.path for training"):
        build_source(DataConfig(source="jsonl"), "train")
    with pytest.raises(ConfigError, match=r"needs data\.eval_path for evaluation"):
        build_source(DataConfig(source="jsonl", path="x"), "eval")


def test_answers_are_all_or_none(tmp_path):
    assert jsonl(tmp_path, GOOD).has_answers
    assert not jsonl(tmp_path, {"problem": "p"}).has_answers


def test_settings_that_would_be_ignored_are_refused():
    with pytest.raises(ConfigError, match=r"data\.path has no meaning for data\.source=modchain"):
        build_source(DataConfig(path="x"), "train")
    with pytest.raises(ConfigError, match=r"data\.task has no meaning"):
        build_source(DataConfig(source="jsonl", path="x", task="y"), "train")
    with pytest.raises(ConfigError, match="modchain, jsonl, datasets, reasoning_gym"):
        build_source(DataConfig(source="json"), "train")
    with pytest.raises(ConfigError, match=r"data\.seed"):
        build_source(DataConfig(seed=-1), "train")


def test_modchain_is_endless_and_splits_differ():
    train, held_out = (build_source(DataConfig(), split) for split in sources.SPLITS)
    assert train.size is None
    assert train.record(10**9).problem.startswith("^")
    assert train.record(0).problem != held_out.record(0).problem
    assert train.grader == "modchain"


def test_datasets_directory(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"problem": ["a", "b", "c"], "answer": [1, 2, 3]})
    rows.save_to_disk(str(tmp_path / "set"))
    source = build_source(DataConfig(source="datasets", path=str(tmp_path / "set")), "train")
    seen = sorted((source.record(i).problem, source.record(i).answer) for i in range(3))
    assert seen == [("a", "1"), ("b", "2"), ("c", "3")]

    datasets.DatasetDict({"train": rows, "extra": rows}).save_to_disk(str(tmp_path / "dict"))
    config = DataConfig(source="datasets", path=str(tmp_path / "dict"), eval_path=str(tmp_path / "dict"))
    assert build_source(config, "train").size == 3
    with pytest.raises(DataError, match=r"no split 'test', but train, extra"):
        build_source(config, "eval")


def test_datasets_errors(tmp_path):
    pytest.importorskip("datasets")
    with pytest.raises(DataError, match=r"data\.path: there is no directory"):
        build_source(DataConfig(source="datasets", path=str(tmp_path / "none")), "train")
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match="save_to_disk"):
        build_source(DataConfig(source="datasets", path=str(tmp_path / "other")), "train")


def gym(split="train", **settings):
    pytest.importorskip("reasoning_gym", reason="the extra [gym] is not installed")
    return build_source(DataConfig(**{"source": "reasoning_gym", "task": "gsm_symbolic", "size": 8, **settings}), split)


def test_reasoning_gym_records():
    record = gym().record(0)
    assert record.solution.endswith(f"#### {record.answer}")
    train, held_out = ({source.record(i).problem for i in range(8)} for source in (gym(), gym("eval")))
    assert not train & held_out
    assert gym(task="chain_sum").record(0).solution is None


def test_reasoning_gym_unknown_task_names_near_ones():
    with pytest.raises(ConfigError, match=r"gsm_symbolc.*gsm_symbolic"):
        gym(task="gsm_symbolc")
    with pytest.raises(ConfigError, match=r"data\.task"):
        gym(task=None)


def test_reasoning_gym_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "reasoning_gym", None)
    monkeypatch.setitem(__import__("sys").modules, "reasoning_gym.factory", None)
    with pytest.raises(ConfigError, match=r"pip install reasoning-gym"):
        build_source(DataConfig(source="reasoning_gym", task="gsm_symbolic"), "train")


@pytest.mark.parametrize(
    ("text", "right"), [("3 and then {a}.", True), (r"\boxed{{{a}}} of 3", True), ("{a} of 3", False), ("none", False)]
)
def test_reasoning_gym_grader_reads_the_last_number(text, right):
    source = gym()
    record = source.record(1)

    grader = build_grader(DataConfig(source="reasoning_gym", task="gsm_symbolic"), source)
    assert record.answer != "3"
    assert grader.grade(Completion(text.format(a=record.answer)), record).correct is right
