"""Benchmarks by name: spellings, folders, the files in them, and the cache of `datasets`."""

from __future__ import annotations

import json
import os
import re
import socket
from pathlib import Path
from typing import Any

import pytest

from renio_megatron.errors import ConfigError, DataError
from renio_megatron.evaluation import benchmarks
from renio_megatron.evaluation.benchmark_files import cached_rows, is_path
from renio_megatron.evaluation.benchmark_formats import FUNCTION_INSTRUCTION, MATH_INSTRUCTION
from renio_megatron.evaluation.benchmark_names import KNOWN, known_benchmark
from renio_megatron.evaluation.benchmarks import NAMES, load_benchmark
from tests.helpers.benchmark_rows import FUNCTION, SUM, written
from tests.helpers.paths import SHARED

FILES = SHARED / "data"
needs_files = pytest.mark.skipif(not FILES.is_dir(), reason="needs the benchmark files in ../shared/data")


@pytest.fixture(autouse=True)
def no_folders_and_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RENIO_BENCHMARKS", raising=False)
    monkeypatch.setattr(benchmarks, "cached_rows", lambda known: (None, ""))


# name, problems, grader, instruction, file
SETS = [
    ("math500", 500, "math", MATH_INSTRUCTION, "math500.jsonl"),
    ("aime24", 30, "math", "", "aime24_qwq.jsonl"),
    ("aime25", 30, "math", "", "aime25_qwq.jsonl"),
    ("gsm8k", 1319, "number", MATH_INSTRUCTION, "gsm8k_test.jsonl"),
    ("humanevalplus", 164, "code", FUNCTION_INSTRUCTION, "humanevalplus.jsonl.gz"),
    ("mbppplus", 378, "code", FUNCTION_INSTRUCTION, "mbppplus.jsonl.gz"),
]


@needs_files
@pytest.mark.parametrize(("name", "count", "grader", "instruction", "file"), SETS, ids=[case[0] for case in SETS])
def test_the_known_sets(name: str, count: int, grader: str, instruction: str, file: str) -> None:
    found = load_benchmark(name, folder=str(FILES))
    assert (found.name, len(found.records), found.grader, found.instruction) == (name, count, grader, instruction)
    assert (found.source, len(set(found.digests))) == (str(FILES / file), count)
    first, row = found.records[0], found.records[0].metadata
    assert (first.where, first.solution) == (f"{FILES / file}:1", None)
    if name == "math500":
        assert (first.problem, first.answer) == (row["problem"], row["answer"])
        assert set(row) == {"problem", "solution", "answer", "subject", "level", "unique_id"}
    elif name == "gsm8k":
        assert (first.problem, first.answer) == (row["question"], row["answer"])
        assert re.fullmatch(r"#### \d+", (first.answer or "").splitlines()[-1])
    elif grader == "math":
        assert first.problem.endswith("\\boxed{}.") and found.prompt(first) == row["prompt"]
        assert isinstance(row["answer"], int) and first.answer == str(row["answer"])
    else:
        assert (first.problem, first.answer) == (row["prompt"].rstrip(), None)
        assert row["entry_point"] in first.problem and {"base_input", "plus_input", "atol"} <= set(row)


@needs_files
def test_the_same_file_by_its_path() -> None:
    one, other = load_benchmark("aime25", folder=str(FILES)), load_benchmark(str(FILES / "aime25_qwq.jsonl"))
    assert (one.name, other.name) == ("aime25", "aime25_qwq")
    assert (one.records, one.digest) == (other.records, other.digest)


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("MATH-500", "math500"),
        ("HuggingFaceH4/MATH-500", "math500"),
        ("AIME 2024", "aime24"),
        ("aime_25", "aime25"),
        ("HMMT-Feb-2025", "hmmt25"),
        ("gsm-8k", "gsm8k"),
        ("HumanEval+", "humanevalplus"),
        ("HumanEval", "humanevalplus"),
        ("mbpp_plus", "mbppplus"),
        ("MBPP+", "mbppplus"),
        ("mbpp", "mbppplus"),
    ],
)
def test_other_spellings_lead_to_the_name(spelling: str, name: str) -> None:
    assert known_benchmark(spelling).name == name and name in NAMES
    assert not is_path(spelling)


@pytest.mark.parametrize(("name", "meant"), [("aime", "aime24 or aime25"), ("mth500", "math500"), ("gsm8", "gsm8k")])
def test_a_mistyped_name_gets_the_nearest(name: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"no benchmark '{name}'. Did you mean {meant}\\?"):
        load_benchmark(name)


def test_a_name_like_no_other_gets_all_names() -> None:
    with pytest.raises(ConfigError, match=r"no benchmark 'zzz'\. Known names: math500, .* path of a file"):
        load_benchmark("zzz")


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("math500", "math500.jsonl"),
        ("math500", "MATH-500/test.jsonl"),
        ("math500", "MATH-500.json"),
        ("aime24", "aime24_qwq.jsonl"),
        ("aime24", "aime_2024/data/train-00000-of-00001.jsonl"),
        ("gsm8k", "gsm8k/main/test-00000-of-00001.jsonl"),
        ("hmmt25", "hmmt_feb_2025/data/train-00000-of-00001.jsonl"),
    ],
)
def test_files_of_a_folder_by_their_names(name: str, file: str, tmp_path: Path) -> None:
    path = written(tmp_path / file, SUM)
    for other in ("aime2400.jsonl", "math5000.jsonl", ".math500.jsonl", "math500.txt", "hmmt25_nov.jsonl"):
        written(tmp_path / other, SUM)
    assert load_benchmark(name, folder=str(tmp_path)).source == path


def test_files_of_the_evalplus_releases(tmp_path: Path) -> None:
    path = written(tmp_path / "HumanEvalPlus-v0.1.10.jsonl.gz", FUNCTION)
    written(tmp_path / "HumanEvalPlus-Mini-v0.1.10.jsonl.gz", FUNCTION)
    written(tmp_path / "HumanEval.jsonl.gz", {"task_id": "HumanEval/0", "prompt": "", "entry_point": "f"})
    assert load_benchmark("humaneval", folder=str(tmp_path)).source == path


def test_the_shortest_name_and_the_right_part_are_preferred(tmp_path: Path) -> None:
    written(tmp_path / "gsm8k_train.jsonl", SUM)
    with pytest.raises(DataError, match=r"gsm8k was found neither .*Another part .* is '\S+gsm8k_train\.jsonl'"):
        load_benchmark("gsm8k", folder=str(tmp_path))
    path = written(tmp_path / "gsm8k_test.jsonl", SUM)
    written(tmp_path / "gsm8k_answers_of_mine.jsonl", SUM)
    written(tmp_path / "gsm8k" / "socratic" / "test-00000-of-00001.jsonl", SUM)
    written(tmp_path / "gsm8k" / "0001.jsonl", SUM)
    assert load_benchmark("gsm8k", folder=str(tmp_path)).source == path


def test_two_files_that_fit_equally_are_refused(tmp_path: Path) -> None:
    one, other = written(tmp_path / "aime24_a.jsonl", SUM), written(tmp_path / "aime24_b.jsonl", SUM)
    with pytest.raises(DataError, match=rf"aime24: '{one}' and '{other}' fit equally\. Give the path"):
        load_benchmark("aime24", folder=str(tmp_path))
    assert load_benchmark(other).name == "aime24_b"


def test_folders_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [written(tmp_path / folder / "math500.jsonl", SUM) for folder in ("second", "third")]
    (tmp_path / "first").mkdir()
    folders = [str(tmp_path / name) for name in ("first", "second", "third")]
    monkeypatch.setenv("RENIO_BENCHMARKS", os.pathsep.join(folders))
    assert load_benchmark("math500").source == paths[0]
    assert load_benchmark("math500", folder=folders[2]).source == paths[1]
    with pytest.raises(DataError, match=r"neither in '\S+first' nor in the cache"):
        load_benchmark("math500", folder=folders[0])
    monkeypatch.setenv("RENIO_BENCHMARKS", os.pathsep.join([*folders, "/nowhere/at/all"]))
    with pytest.raises(ConfigError, match="RENIO_BENCHMARKS: there is no directory '/nowhere/at/all'"):
        load_benchmark("math500")


@pytest.mark.parametrize("known", KNOWN.values(), ids=list(KNOWN))
def test_a_missing_one_says_what_to_fetch_and_where_to_put_it(known: Any) -> None:
    with pytest.raises(DataError) as raised:
        load_benchmark(known.name)
    message = str(raised.value)
    assert known.hub_id in message and "columns" in message and f"DIR/{known.name}.jsonl" in message
    assert "--benchmarks DIR" in message and "RENIO_BENCHMARKS" in message
    assert ("EvalPlus release" in message) == known.name.endswith("plus")


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no file 'nowhere/sums\.jsonl'"):
        load_benchmark("nowhere/sums.jsonl")
    with pytest.raises(DataError, match=r"is a directory\. Give a file of it"):
        load_benchmark(f"{tmp_path}/")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match=r"empty\.jsonl: the file holds no records"):
        load_benchmark(str(tmp_path / "empty.jsonl"))


def test_the_cache_of_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import pyarrow

    def no_network(*args: Any, **kwargs: Any) -> None:
        pytest.fail("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    before = datasets.config.HF_HUB_OFFLINE
    monkeypatch.setattr(benchmarks, "cached_rows", cached_rows)
    with pytest.raises(DataError, match="gsm8k was found neither in a folder"):
        load_benchmark("gsm8k")

    # What load_dataset leaves there: a folder for each data set, configuration, version and hash.
    folder = tmp_path / "cache" / "openai___gsm8k" / "main" / "0.0.0" / "0123"
    folder.mkdir(parents=True)
    table = pyarrow.Table.from_pylist([{"question": "How many?", "answer": "2 + 2\n#### 4"}])
    with pyarrow.ipc.new_stream(str(folder / "gsm8k-test.arrow"), table.schema) as out:
        out.write_table(table)
    info = {
        "features": {name: {"dtype": "string", "_type": "Value"} for name in table.column_names},
        "dataset_name": "gsm8k",
        "config_name": "main",
        "version": {"version_str": "0.0.0", "major": 0, "minor": 0, "patch": 0},
        "splits": {"test": {"name": "test", "num_bytes": 1, "num_examples": 1, "dataset_name": "gsm8k"}},
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))

    found = load_benchmark("gsm8k")
    assert (found.grader, found.source) == ("number", "openai/gsm8k (split test) in the cache of datasets")
    assert (found.records[0].problem, found.records[0].where) == ("How many?", "openai/gsm8k, split test, row 0")
    assert before == datasets.config.HF_HUB_OFFLINE
    folder.parents[1].rename(folder.parents[2] / "socratic")
    with pytest.raises(DataError, match=r"was found neither .*\(The cache: .*socratic"):
        load_benchmark("gsm8k")
