"""`renio evaluate` for real: a directory, a run and a server give the same verdicts; what is killed goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from renio_megatron.cli.main import main
from renio_megatron.data.sources import modchain
from renio_megatron.evaluation.sandbox import sandbox_problem
from tests.fakes.completion_server import Asked, Says, completion, standing_in
from tests.fakes.served_model import Served
from tests.helpers import warm
from tests.helpers.jobs import python_path
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.timeout(300)
CHAIN = ["grader=modchain", "instruction=''", "max_completion_length=30"]
NUM_PROBLEMS = 12


def renio(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return warm.run(
        [sys.executable, "-m", "renio_megatron.cli.main", *arguments],
        cwd=cwd,
        env={**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path(), **environment},
        timeout=200,
    )


def done(*arguments: str, cwd: Path, **environment: str) -> str:
    finished = renio(*arguments, cwd=cwd, **environment)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def rows(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "completions.jsonl").read_text().splitlines()]


def verdicts(directory: Path) -> list[tuple[Any, ...]]:
    """Everything of the rows but the tokens, of which a server counts the end as it likes."""
    return [tuple(value for name, value in row.items() if name != "tokens") for row in rows(directory)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Problems, and a run of two steps with its exported model."""
    folder = tmp_path_factory.mktemp("evaluate")
    with (folder / "chain.jsonl").open("w") as file:
        for index in range(NUM_PROBLEMS):
            problem = modchain.make_problem(1, "eval", index)
            file.write(json.dumps({"problem": problem.prompt, "answer": problem.answer, "level": index}) + "\n")
    recipe = ROOT / "examples" / "modchain.yaml"
    settings = ["train.train_iters=2", "evaluate.every=0", "checkpoint.save_interval=2", "output_dir=run"]
    done("train", str(recipe), *settings, cwd=folder)
    done("export", "run", "exported", cwd=folder)
    return folder


def evaluate(folder: Path, target: str, output: str, *more: str) -> str:
    return done("evaluate", target, "--benchmark", "chain.jsonl", "--output", output, *CHAIN, *more, cwd=folder)


@pytest.fixture
def served(folder: Path) -> Iterator[Served]:
    with Served(folder / "exported") as served:
        yield served


def test_a_directory_a_run_and_a_server_give_the_same_verdicts(folder, served):
    said = evaluate(folder, "exported", "of_directory", "temperature=0")
    assert "chain: 12 problems x 1 from chain.jsonl" in said and "of_directory holds summary.json" in said
    evaluate(folder, "run", "of_run", "temperature=0", "--nproc", "2")
    evaluate(folder, "exported", "cut", "temperature=0", "--nproc", "2", "parallel.tensor_model_parallel_size=2")
    evaluate(folder, served.url, "of_server", "temperature=0", "--model", "model", "concurrency=3")
    of_directory = rows(folder / "of_directory")
    assert len(of_directory) == NUM_PROBLEMS and 0 < sum(row["correct"] for row in of_directory) < NUM_PROBLEMS
    assert of_directory[0]["gold"] == modchain.make_problem(1, "eval", 0).answer
    for other in ("of_run", "cut"):
        assert rows(folder / other) == of_directory
    assert verdicts(folder / "of_server") == verdicts(folder / "of_directory")
    summaries = [json.loads((folder / one / "summary.json").read_text())["benchmarks"] for one in ("of_run", "cut")]
    assert summaries[0] == summaries[1]
    assert summaries[0]["chain"]["avg_at_k"] == pytest.approx(
        sum(row["correct"] for row in of_directory) / NUM_PROBLEMS
    )
    problems = [json.loads(line) for line in (folder / "of_run" / "problems.jsonl").read_text().splitlines()]
    assert [one["level"] for one in problems] == list(range(NUM_PROBLEMS))
    assert [one["pass_rate"] for one in problems] == [float(row["correct"]) for row in of_directory]
    assert (folder / "of_run" / "summary.png").stat().st_size > 5000


def test_more_draws_and_problems_are_added_and_others_are_refused(folder):
    evaluate(folder, "exported", "grown", "--limit", "4", "micro_batch_size=4")
    before = rows(folder / "grown")
    assert len(before) == 4
    said = evaluate(folder, "exported", "grown", "--limit", "6", "--n", "2", "micro_batch_size=4")
    assert "4 of 12 drawn before" in said
    after = {(row["index"], row["draw"]): row for row in rows(folder / "grown")}
    assert len(after) == 12 and [after[row["index"], 0] for row in before] == before
    said = evaluate(folder, "exported", "grown", "--limit", "6", "--n", "1")
    assert "6 of 6 drawn before" in said and len(rows(folder / "grown")) == 12
    refused = renio(
        "evaluate", "exported", "--benchmark", "chain.jsonl", "--output", "grown", *CHAIN, "seed=2", cwd=folder
    )
    assert refused.returncode == 2 and "completions with seed=1" in refused.stderr, refused.stderr
    other = renio("evaluate", "modchain/student", "--benchmark", "chain.jsonl", "--output", "grown", *CHAIN, cwd=folder)
    assert other.returncode == 2 and "holds completions with model=" in other.stderr
    (folder / "others").mkdir()
    lines = (folder / "chain.jsonl").read_text().splitlines()
    (folder / "others" / "chain.jsonl").write_text("\n".join([lines[1], lines[0], *lines[2:]]) + "\n")
    other = renio("evaluate", "exported", "--benchmark", "others/chain.jsonl", "--output", "grown", *CHAIN, cwd=folder)
    assert (
        other.returncode == 2 and "other problems under the name 'chain': they differ from problem 0 on" in other.stderr
    )


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_what_is_killed_goes_on_to_the_same_files(folder, tmp_path, how):
    arguments = ["evaluate", "exported", "--benchmark", "chain.jsonl", "--n", "2", *CHAIN, "micro_batch_size=2"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done(*arguments, "--output", str(whole), cwd=folder)
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    process = warm.Popen(
        [sys.executable, "-m", "renio_megatron.cli.main", *arguments, "--output", str(killed)],
        cwd=folder,
        env={**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path()},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    path, deadline = killed / "completions.jsonl", time.monotonic() + 120
    while not (path.is_file() and path.read_bytes().count(b"\n") >= 4) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, how)
    process.wait(60)
    count = path.read_bytes().count(b"\n")
    assert 4 <= count < 24
    deadline = time.monotonic() + 60
    while (finished := renio(*arguments, "--output", str(killed), cwd=folder)).returncode != 0:
        assert "is being written by" in finished.stderr and time.monotonic() < deadline, finished.stderr
    assert "of 24 drawn before" in finished.stdout
    for name in ("completions.jsonl", "summary.json", "problems.jsonl"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()


def test_a_server_that_fails_costs_one_message_and_nothing_that_was_drawn(folder, served, tmp_path):
    served.fails = lambda number: number > 7
    out = str(tmp_path / "out")
    arguments = ["evaluate", served.url, "--model", "model", "--benchmark", "chain.jsonl", "--output", out]
    failed = renio(*arguments, *CHAIN, "temperature=0", "concurrency=1", cwd=folder)
    assert failed.returncode == 2 and failed.stderr.count("error: ") == 1 and "not today" in failed.stderr, (
        failed.stderr
    )
    assert len(rows(tmp_path / "out")) == 7
    served.fails, asked = lambda number: False, len(served.requests)
    said = done(*arguments, *CHAIN, "temperature=0", "concurrency=1", cwd=folder)
    assert "7 of 12 drawn before" in said and len(served.requests) - asked == NUM_PROBLEMS - 7
    assert len(rows(tmp_path / "out")) == NUM_PROBLEMS


CODE_ROWS = [
    {
        "task_id": f"HumanEval/{number}",
        "prompt": f"def add{number}(x):\n",
        "entry_point": f"add{number}",
        "canonical_solution": f"    return x + {number}\n",
        "base_input": [[1], [2]],
        "plus_input": [[-4], [0]],
        "atol": 0,
    }
    for number in (9001, 9002)
]


def test_programs_are_judged_in_a_sandbox(tmp_path):
    if all(sandbox_problem(name) is not None for name in ("namespaces", "landlock")):
        pytest.skip("no sandbox works here: " + str(sandbox_problem("namespaces")))
    (tmp_path / "code.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CODE_ROWS))

    def says(asked: Asked) -> Says:
        if asked.body is None:
            return Says({"data": [{"id": "coder"}]})
        text = asked.body["messages"][0]["content"]
        assert "```python" in text or "python block" in text
        number = "9001" if "add9001" in text else "9002"
        return completion(f"Here:\n```python\ndef add{number}(x):\n    return x + 9001\n```\n", tokens=9)

    with standing_in(says) as server:
        said = done(
            "evaluate", server.url, "--model", "coder", "--benchmark", "code.jsonl", "--output", "out", "--n", "2",
            cwd=tmp_path,
        )  # fmt: skip
    assert "code" in said
    found = [(row["correct"], row["reason"]) for row in rows(tmp_path / "out")]
    assert [correct for correct, _ in found] == [True, True, False, False]
    assert found[2][1] == "base test 1: expected 9003, got 9002"
    figures = json.loads((tmp_path / "out" / "summary.json").read_text())["benchmarks"]["code"]
    assert (figures["avg_at_k"], figures["majority_at_k"], figures["length"]) == (0.5, None, 9.0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], ["TARGET: there is no directory 'nowhere'"]),
        (["exported", "--model", "x"], ["--model names a model of a server"]),
        (["exported", "--step", "2"], ["--step names a checkpoint of a run"]),
        (["run", "--step", "7"], ["no checkpoint of step 7"]),
        (["http://127.0.0.1:9/v1"], ["--model NAME"]),
        (["ftp://x/v1", "--model", "x"], ["no address of a server"]),
        (["exported", "concurrency=3"], ["concurrency has no effect on a local model"]),
        (["http://127.0.0.1:9/v1", "--model", "x", "bf16=true"], ["bf16 has no effect on a server"]),
        (["exported", "temprature=1"], ["temprature", "temperature"]),
        (["exported", "temperature=-1"], ["temperature must be at least 0"]),
        (["exported", "grader=maths"], ["grader must be one of"]),
        (["exported", "--benchmark", "chain.jsonl"], ["two benchmarks have one name"]),
        (["exported", "--benchmark", "aime99"], ["aime99"]),
    ],
)
def test_mistakes_are_one_line_before_a_rank_starts(folder, tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(folder)
    target, *more = arguments
    assert main(["evaluate", target, "--benchmark", "chain.jsonl", *more, "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1, said
    assert all(word in said for word in words), said
    assert not (tmp_path / "out").exists()


def test_a_model_without_enough_positions_is_told_by_its_ranks(folder, tmp_path):
    refused = renio(
        "evaluate", "exported", "--benchmark", "chain.jsonl", "--output", str(tmp_path), "max_completion_length=500",
        "grader=modchain", "instruction=''", "--nproc", "2", cwd=folder,
    )  # fmt: skip
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1, refused.stderr
    assert "chain.jsonl:1: a prompt of " in refused.stderr and "max_completion_length" in refused.stderr


def test_a_run_evaluates_on_benchmarks_and_resumes_to_the_same_rows(folder, tmp_path):
    """On 2 tensor ranks; the second start has a step that was evaluated before it was cut off."""
    settings = [
        "train.train_iters=2", "checkpoint.save_interval=1", "evaluate.every=1", "evaluate.samples=4", "evaluate.n=2",
        f"evaluate.benchmarks=[{folder}/chain.jsonl]", "evaluate.limit=5", "evaluate.top_p=0.9",
        "evaluate.grader=modchain",
        "evaluate.instruction=''",
        "train.global_batch_size=8", "train.micro_batch_size=8",
    ]  # fmt: skip
    recipe = str(ROOT / "examples" / "modchain.yaml")
    done("train", recipe, *settings, "output_dir=whole", cwd=tmp_path)
    whole = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    names = {f"eval/chain/{name}" for name in ("avg_at_n", "pass_at_n", "interval_low", "length", "cut_frac")}
    assert len(whole) == 3 and all(names <= row.keys() for row in whole)
    step = tmp_path / "whole" / "evaluations" / "step-0000002"
    found = rows(step)
    assert len(found) == 10
    assert whole[2]["eval/chain/avg_at_n"] == sum(bool(row["correct"]) for row in found) / 10
    assert whole[2]["eval/chain/length"] == sum(row["tokens"] for row in found) / 10
    assert json.loads((step / "summary.json").read_text())["benchmarks"]["chain"]["n"] == 2
    # As a job that was killed in step 2's evaluation.
    run = tmp_path / "whole"
    (run / "finished.json").unlink()
    (run / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("1\n")
    shutil.rmtree(run / "checkpoints" / "iter_0000002")
    lines = (step / "completions.jsonl").read_text().splitlines(keepends=True)
    (step / "completions.jsonl").write_text("".join(lines[:3]))
    done("train", recipe, *settings, "output_dir=whole", cwd=tmp_path)
    times = ("time/", "tokens_per_s")
    for old, new in zip(whole, (run / "metrics.jsonl").read_text().splitlines(), strict=True):
        kept = {name: value for name, value in json.loads(new).items() if not name.startswith(times)}
        assert kept == {name: value for name, value in old.items() if not name.startswith(times)}
    assert rows(step) == found


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["evaluate.benchmarks=[nowhere.jsonl]"], ["nowhere.jsonl"]),
        (["evaluate.n=2"], ["evaluate.n", "evaluate.benchmarks is null"]),
        (["evaluate.every=0", "evaluate.benchmarks=[chain.jsonl]"], ["evaluate.every is 0"]),
        (["evaluate.top_p=1.5"], ["evaluate.top_p must lie in (0, 1]"]),
    ],
)
def test_benchmarks_of_a_recipe_are_read_before_a_rank_starts(folder, tmp_path, monkeypatch, capsys, settings, words):
    monkeypatch.chdir(folder)
    arguments = ["train", str(ROOT / "examples" / "modchain.yaml"), *settings, f"output_dir={tmp_path}/out"]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and all(word in said for word in words), said
