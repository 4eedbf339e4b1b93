"""What the rows of a benchmark become: formats, graders, instructions, limits and digests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from renio_megatron.config.sections.data import GRADERS
from renio_megatron.errors import ConfigError, DataError
from renio_megatron.evaluation import benchmarks
from renio_megatron.evaluation.benchmark_formats import FUNCTION_INSTRUCTION, MATH_INSTRUCTION, PROGRAM_INSTRUCTION
from renio_megatron.evaluation.benchmarks import Benchmark, load_benchmark, record_digest
from renio_megatron.evaluation.graders import Grader
from renio_megatron.types import Record
from tests.helpers.benchmark_rows import ASKED, FUNCTION, STARTED, STDIN, SUM, written


def test_every_kind_of_file_holds_the_same(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [SUM, {"problem": "3 + 3?", "answer": "6"}]
    lines, packed = written(tmp_path / "a.jsonl", *rows), written(tmp_path / "b.jsonl.gz", *rows)
    (tmp_path / "c.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    found = [load_benchmark(str(tmp_path / name)) for name in ("a.jsonl", "b.jsonl.gz", "c.json", "d.parquet")]
    assert [one.name for one in found] == ["a", "b", "c", "d"]
    assert len({one.digest for one in found}) == 1
    assert [one.records[1].where for one in found] == [
        f"{lines}:2",
        f"{packed}:2",
        f"{tmp_path / 'c.json'}, row 1",
        f"{tmp_path / 'd.parquet'}, row 1",
    ]


def test_answers_that_are_numbers_or_formulas(tmp_path: Path) -> None:
    rows = [{"problem_idx": 1, "problem": "A?", "answer": 103}, {"problem_idx": 2, "problem": "B?", "answer": r"\pi"}]
    found = load_benchmark("hmmt25", folder=str(Path(written(tmp_path / "hmmt25.jsonl", *rows)).parent))
    assert [record.answer for record in found.records] == ["103", r"\pi"]
    assert (found.grader, found.instruction, found.records[0].metadata) == ("math", MATH_INSTRUCTION, rows[0])


@pytest.mark.parametrize(
    ("row", "grader"),
    [
        ({"question": "How far?", "answer": "3 \\times 10^{8}"}, "math"),  # Minerva
        ({"Problem": "How far?", "Answer": "4", "solution": "2 + 2"}, "math"),  # OpenThoughts
        ({"question": "How far?", "answer": "2 + 2 = 4\n#### 4"}, "number"),
    ],
)
def test_columns_of_other_names(row: dict[str, Any], grader: str, tmp_path: Path) -> None:
    found = load_benchmark(written(tmp_path / "rows.jsonl", row))
    (record,) = found.records
    assert (record.problem, record.solution, found.grader) == ("How far?", None, grader)
    assert record.answer == row.get("answer", row.get("Answer"))
    assert found.prompt(record) == f"How far?\n\n{MATH_INSTRUCTION}"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "Q?", "prompt": "P?", "answer": "4"}, "'question' and 'prompt' could both be the problem"),
        ({"problem": "P?", "target": "4", "final_answer": "5"}, "'target' and 'final_answer' could both be"),
        ({"problem": "P?", "solution": "4"}, r"no column with an answer .*columns: problem, solution"),
        ({"text": "P?", "answer": "4"}, r"no column with a problem \(problem, question"),
        ({"problem": " ", "answer": "4"}, r"rows\.jsonl:1: column 'problem' must hold"),
        ({"problem": ["P?"], "answer": "4"}, r"rows\.jsonl:1: column 'problem', turn 1: a turn is an object"),
        ({"problem": "P?", "answer": ""}, r"rows\.jsonl:1: the answer \('answer'\) is empty"),
    ],
)
def test_rows_that_cannot_be_read(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        load_benchmark(written(tmp_path / "rows.jsonl", row))


def test_a_row_without_an_answer_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:2: there is no answer in column 'answer'"):
        load_benchmark(written(tmp_path / "rows.jsonl", SUM, {"problem": "3 + 3?"}))


def test_a_prompt_that_holds_its_instruction_gets_no_second_one(tmp_path: Path) -> None:
    found = load_benchmark(written(tmp_path / "asked.jsonl", ASKED))
    assert (found.instruction, found.prompt(found.records[0])) == ("", ASKED["prompt"])


def test_where_some_hold_it_the_others_are_given_it_in_the_problem(tmp_path: Path) -> None:
    found = load_benchmark(written(tmp_path / "mixed.jsonl", {"prompt": "1 + 1?", "answer": 2}, ASKED), limit=1)
    assert found.instruction == ""
    assert found.prompt(found.records[0]) == f"1 + 1?\n\n{MATH_INSTRUCTION}"


def test_where_some_functions_hold_it(tmp_path: Path) -> None:
    asked = {**FUNCTION, "prompt": FUNCTION["prompt"] + "Answer in a fenced Python block."}
    found = load_benchmark(written(tmp_path / "mixed.jsonl", FUNCTION, asked))
    assert [found.prompt(record) for record in found.records] == [
        f"{FUNCTION['prompt'].rstrip()}\n\n{FUNCTION_INSTRUCTION}",
        asked["prompt"],
    ]


def test_a_box_of_a_formula_is_no_instruction(tmp_path: Path) -> None:
    row = {"problem": r"Find the digit in $1\boxed{\phantom{0}} + 5 = 20$.", "answer": "5"}
    found = load_benchmark(written(tmp_path / "rows.jsonl", row))
    assert found.instruction == MATH_INSTRUCTION


def test_functions_with_inputs(tmp_path: Path) -> None:
    found = load_benchmark(written(tmp_path / "mine.jsonl", FUNCTION))
    (record,) = found.records
    assert (found.grader, record.problem, record.metadata) == ("code", FUNCTION["prompt"].rstrip(), FUNCTION)
    assert found.prompt(record).endswith(f'"""\n\n{FUNCTION_INSTRUCTION}')
    with pytest.raises(DataError, match=r"lacks\.jsonl:2: the function has no plus_input"):
        load_benchmark(written(tmp_path / "lacks.jsonl", FUNCTION, {**FUNCTION, "plus_input": None}))


@pytest.mark.parametrize(
    "row",
    [
        {"task_id": "HumanEval/900", "prompt": "def f(): ...", "entry_point": "f", "test": "def check(candidate): ..."},
        {"task_id": 900, "prompt": "Write f.", "code": "def f(): ...", "test_list": ["assert f()"], "test": ""},
    ],
)
def test_rows_of_the_hub_lack_the_inputs(row: dict[str, Any], tmp_path: Path) -> None:
    path = written(tmp_path / "humanevalplus.jsonl", row)
    with pytest.raises(DataError, match=r"lack base_input and plus_input\. .* Fetch HumanEvalPlus\.jsonl\.gz"):
        load_benchmark("humanevalplus", folder=str(tmp_path))
    assert load_benchmark(path, grader="my_module:grade").records[0].problem == row["prompt"]


def test_programs_of_livecodebench(tmp_path: Path) -> None:
    found = load_benchmark(written(tmp_path / "lcb.jsonl", STDIN, STARTED))
    assert (found.grader, found.instruction) == ("code", PROGRAM_INSTRUCTION)
    program, function = found.records
    assert program.problem.startswith("Print twice") and "standard input" in program.problem
    assert "standard input" not in function.problem
    assert function.problem.endswith(
        "```python\nclass Solution:\n    def double(self, x: int) -> int:\n```"
    ) and function.problem.startswith("Return twice x.")
    assert function.metadata == STARTED


def test_programs_with_test_cases(tmp_path: Path) -> None:
    tests: dict[str, Any] = {"inputs": ["1\n"], "outputs": ["2\n"]}
    rows = [
        {"problem": "Double it.", "solution": "...", "test_cases": json.dumps(tests)},
        {"problem": "Double it.", "solution": "...", "test_cases": json.dumps({**tests, "fn_name": "double"})},
    ]
    found = load_benchmark(written(tmp_path / "rows.jsonl", *rows))
    assert (found.grader, found.instruction) == ("code", PROGRAM_INSTRUCTION)
    assert "standard input" in found.records[0].problem and "`double`" in found.records[1].problem
    with pytest.raises(DataError, match=r"rows\.jsonl:2: there are no test_cases"):
        load_benchmark(written(tmp_path / "rows.jsonl", rows[0], {"problem": "Double it."}))


def test_a_grader_that_is_named_wins(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", {**SUM, "test_cases": "{}"})
    assert load_benchmark(path, grader="number").grader == "number"
    assert load_benchmark(path, grader="number").records[0].answer == "4"
    assert load_benchmark(path, grader="my_module:grade").grader == "my_module:grade"
    with pytest.raises(ConfigError, match=r"'code' needs tests: .*columns: problem, answer"):
        load_benchmark(written(tmp_path / "sums.jsonl", SUM), grader="code")
    for grader in ("maths", "reasoning_gym", "none"):
        with pytest.raises(ConfigError, match="the grader must be one of number, math, code, modchain, a function"):
            load_benchmark(path, grader=grader)


def test_a_grader_of_ones_own_needs_no_answers(tmp_path: Path) -> None:
    rows = {"prompt": "Write a poem."}, {"prompt": "Write a poem about a Python code block."}
    found = load_benchmark(written(tmp_path / "rows.jsonl", *rows), grader="my_module:grade")
    assert [found.prompt(record) for record in found.records] == [row["prompt"] for row in rows]
    assert found.records[0].answer is None


def test_answers_that_no_grader_can_read_are_named(tmp_path: Path) -> None:
    bad = {"problem": "P?", "answer": r"\frac{1}{2"}
    with pytest.raises(DataError, match=r"rows\.jsonl:2: the answer .* braces .*\. So it is for 2 of 4 problems"):
        load_benchmark(path := written(tmp_path / "rows.jsonl", SUM, bad, SUM, bad))
    with pytest.raises(DataError, match=r"rows\.jsonl:2: .* is no number, .* or choose the grader math"):
        load_benchmark(path, grader="number")
    assert len(load_benchmark(path, limit=1).records) == 1


def test_code_is_checked_by_its_grader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "rows.jsonl", FUNCTION, {**FUNCTION, "task_id": "HumanEval/901"})

    def problem_of(record: Record) -> str | None:
        return "no inputs" if record.metadata["task_id"] == "HumanEval/901" else None

    def grader(config: Any, source: Any) -> Grader:
        return Grader("code", lambda completion, record: pytest.fail("nothing is graded"), problem_of)

    monkeypatch.setattr(benchmarks, "a_grader", grader, raising=False)
    monkeypatch.setitem(GRADERS, "code", "renio_megatron.evaluation.benchmarks:a_grader")
    with pytest.raises(DataError, match=r"rows\.jsonl:2: no inputs, and the grader code"):
        load_benchmark(path)


def test_a_larger_limit_begins_with_the_same_problems(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", *({"problem": f"{n} + 1?", "answer": n + 1} for n in range(5)))
    few, all_of_them = load_benchmark(path, limit=2), load_benchmark(path)
    assert len(few.records) == 2 and all_of_them.digests[:2] == few.digests
    assert all_of_them.digest == load_benchmark(path, limit=9).digest != few.digest
    for limit in (0, -1):
        with pytest.raises(ConfigError, match=f"at least 1 problem; got {limit}"):
            load_benchmark(path, limit=limit)


def test_digests_see_the_problem_the_answer_and_the_tests() -> None:
    record = Record("P?", answer="4", metadata={"tests": [1], "level": 2}, where="a:1")
    same = Record("P?", answer="4", metadata={"level": 2, "tests": [1]}, where="b:9")
    others = [
        Record("Q?", answer="4", metadata=record.metadata),
        Record("P?", answer="5", metadata=record.metadata),
        Record("P?", answer="4", metadata={"tests": [2], "level": 2}),
    ]
    assert record_digest(record) == record_digest(same)
    assert len({record_digest(one) for one in (record, *others)}) == 4
    two = Benchmark("two", (record, others[0]), "math", "", "two.jsonl")
    swapped = Benchmark("two", (others[0], record), "math", "", "two.jsonl")
    assert two.digest != swapped.digest and set(two.digests) == set(swapped.digests)


def test_tests_are_looked_at_in_the_sandbox_that_is_named(tmp_path, monkeypatch):
    """Where no other works, `unsafe` must not be refused for want of one."""
    asked = []
    monkeypatch.setattr("renio_megatron.evaluation.graders.code.open_sandbox", asked.append)
    row = {"problem": "Add.", "test_cases": {"inputs": ["1"], "outputs": ["1"]}}
    load_benchmark(written(tmp_path / "code.jsonl", row), sandbox="unsafe")
    assert asked == ["unsafe"]
