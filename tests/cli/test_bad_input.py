"""Mistakes through the command line: one message that names setting, value and remedy; exit code 2; no file left."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from renio_megatron.cli import launch, worker
from renio_megatron.cli.main import main
from renio_megatron.errors import Scope
from tests.fakes.broken_models import save_broken_models
from tests.helpers import warm
from tests.helpers.jobs import python_path
from tests.helpers.multiprocess import run_ranks

TP, PP = "parallel.tensor_model_parallel_size", "parallel.pipeline_model_parallel_size"
PROBLEMS = [{"problem": f"^{digit}+5*3=", "solution": "+52*36", "answer": "6"} for digit in range(10)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_broken_models(folder)
    return folder


@pytest.fixture(autouse=True)
def no_world(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "RENIO_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in sorted(folder.rglob("*"))}


def _check(code: int, error: str, fragments: tuple[str, ...]) -> None:
    assert code == 2, error
    assert error.startswith("error: "), error
    assert len(re.findall(r"^(?:\[rank \d+\] )?error: ", error, re.MULTILINE)) == 1, "told once"
    assert "Traceback" not in error
    for fragment in fragments:
        assert fragment in error


BY_THE_PARENT: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "unknown key": (["train.lrr=1e-3"], ("unknown key 'train.lrr'", "Did you mean 'train.lr'?")),
    "value of another type": (["train.lr=fast"], ("train.lr", "'fast'", "a number")),
    "not a setting": (["train.lr"], ("'train.lr' is not a setting", "Write key=value")),
    "world": (["--nproc", "3", f"{TP}=2"], ("takes 2 ranks", "world of 3", "Start a multiple of 2")),
    "heads": (
        [f"{TP}=3"],
        ("tensor_model_parallel_size=3", "num_attention_heads=4", "student", "Choose a divisor"),
    ),
    "groups": (
        [f"{TP}=2", "model=MODELS/odd_groups"],
        ("tensor_model_parallel_size=2", "num_key_value_heads=3", "odd_groups", "Choose one that is"),
    ),
    "layers": ([f"{PP}=3"], ("pipeline_model_parallel_size=3", "num_hidden_layers=2", "Choose a divisor")),
    "the teacher's heads": (
        [f"{TP}=2", "teacher.model=MODELS/three_heads"],
        ("teacher.model", "num_attention_heads=3", "Choose a divisor"),
    ),
    "the teacher's layers": (
        [f"{PP}=2", "teacher.model=MODELS/three_layers"],
        ("teacher.model", "num_hidden_layers=3", "Choose a divisor"),
    ),
    "batch": (
        ["train.global_batch_size=9"],
        ("train.global_batch_size=9", "multiple of 4", "train.micro_batch_size=4", "Change one of them"),
    ),
    "batch and ranks": (["--nproc", "3"], ("train.global_batch_size=8", "multiple of 12", "data-parallel size 3")),
    "too few sequences": (
        ["train.global_batch_size=1", "train.micro_batch_size=1"],
        ("at least 2 sequences", "got 1", "Raise train.global_batch_size"),
    ),
    "a teacher that sees what the student sees": (
        ["teacher=initial"],
        ("teacher.kind=initial", "the student's own view", "Give data.teacher_template"),
    ),
    "no model directory": (["model=MODELS/none"], ("model: there is no directory", "none'", "modchain/student")),
    "no teacher directory": (["teacher.model=MODELS/none"], ("teacher.model: there is no directory",)),
    "no config.json": (["model=MODELS/no_config"], ("model: ", "no_config' holds no config.json", "save_pretrained")),
    "family": (["model=MODELS/mamba"], ("model: ", "model_type 'mamba'", "llama, qwen2, qwen3", "Choose")),
    "a model without its heads": (["model=MODELS/no_heads"], ("model: ", "needs num_attention_heads", "got 0")),
    "evaluation without problems": (
        ["evaluate.every=1", "data.source=jsonl", "data.path=MODELS/a.jsonl"],
        ("data.eval_path is missing", "evaluate.every=0 does without"),
    ),
    "no data path": (["data.source=jsonl"], ("data.path is missing",)),
}


@pytest.mark.parametrize("case", BY_THE_PARENT)
def test_the_parent_finds_it_before_any_rank_starts(case, models, tmp_path, monkeypatch, capsys):
    def refuse(*_: Any) -> int:
        raise AssertionError("ranks were started")

    monkeypatch.setattr(launch, "start_ranks", refuse)
    arguments, fragments = BY_THE_PARENT[case]
    overrides = [text.replace("MODELS", str(models)) for text in arguments]
    code = main(["train", str(models / "recipe.yaml"), f"output_dir={tmp_path / 'run'}", *overrides])
    _check(code, capsys.readouterr().err, fragments)
    assert _tree(tmp_path) == {}


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("trian: {lr: 1.0e-3}\n", ("recipe.yaml", "unknown key 'trian'", "Did you mean 'train'?")),
        ("train: {learning_rat: 1.0}\n", ("recipe.yaml", "unknown key 'train.learning_rat'", "The keys of train are")),
        ("train: 3\n", ("recipe.yaml", "train is a section", "got 3")),
        ("train: {lr: [}\n", ("recipe.yaml", "line 4", "not valid YAML")),
        (f"train: {'[' * 2000}{']' * 2000}\n", ("recipe.yaml", "nested too deeply")),
        (None, ("there is no recipe", "recipe.yaml'", "Give the path of a YAML file")),
    ],
)
def test_recipes_that_cannot_be_read(text, fragments, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    if text is not None:
        recipe.write_text(f"model: modchain/student\nteacher: {{model: modchain/teacher}}\noutput_dir: run\n{text}")
    before = _tree(tmp_path)
    _check(main(["train", str(recipe)]), capsys.readouterr().err, fragments)
    assert _tree(tmp_path) == before


def _jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def _rows(name: str, rows: list[dict[str, Any]] = PROBLEMS) -> Callable[[Path], list[str]]:
    return lambda folder: ["data.source=jsonl", f"data.{name}={_jsonl(folder / f'{name}.jsonl', rows)}"]


def _text(text: str) -> Callable[[Path], list[str]]:
    def write(folder: Path) -> list[str]:
        (folder / "text.jsonl").write_text(text)
        return ["data.source=jsonl", f"data.path={folder / 'text.jsonl'}"]

    return write


def _evaluated(rows: list[dict[str, Any]]) -> Callable[[Path], list[str]]:
    return lambda folder: [*_rows("path")(folder), *_rows("eval_path", rows)(folder)[1:], "evaluate.every=1"]


WITHOUT_ANSWERS = [{"problem": row["problem"]} for row in PROBLEMS]
LONG = [*PROBLEMS * 20, {**PROBLEMS[0], "problem": "^" + "7+5*" * 30 + "3="}]  # the last of 201 is too long
# What needs tokenizers or data; found by every rank alike, before the ranks join.
BY_EVERY_RANK: dict[str, tuple[Callable[[Path], list[str]], tuple[str, ...]]] = {
    "empty file": (_text(""), ("text.jsonl: the file holds no records", "one JSON object a line")),
    "malformed line": (_text('{"problem": "^1+1="}\n{"problem": \n'), ("text.jsonl:2: not valid JSON",)),
    "not an object": (_text("[1]\n"), ("text.jsonl, row 0: expected a JSON object, got int",)),
    "no problem column": (
        _rows("path", [{"frage": "^1+1=", "answer": "2"}]),
        ("path.jsonl:1: there is no column 'problem'", "columns: frage, answer", "Set data.problem_key"),
    ),
    "no data file": (
        lambda _: ["data.source=jsonl", "data.path=nowhere.jsonl"],
        ("data.path: there is no file 'nowhere.jsonl'",),
    ),
    "evaluation without answers": (
        _evaluated(WITHOUT_ANSWERS),
        ("evaluate.every is set", "no answers", "data.answer_key", "evaluate.every=0"),
    ),
    "text without a token": (_rows("path", [{"problem": "why?"}]), ("path.jsonl:1", "cannot encode 'why?'")),
    "another tokenizer": (
        lambda _: ["teacher.model=MODELS/other_tokenizer"],
        ("must share a tokenizer", "token 0 is '0' for the student and '$' for the teacher", "Choose two models"),
    ),
    "a smaller vocabulary": (
        lambda _: ["teacher.model=MODELS/small_vocabulary"],
        ("which has 12: ", "has the id 12", "(and 2 more)", "resize_token_embeddings"),
    ),
    "views that do not differ": (
        lambda folder: [
            *_rows("path", PROBLEMS)(folder),
            "teacher=initial",
            "data.teacher_template={problem}",
        ],
        ("teacher.kind=initial", "Give data.teacher_template something that the student does not see"),
    ),
    "a problem too long, far behind": (
        # Long enough to reach the last record: what a run never uses is not read.
        lambda folder: [*_rows("path", LONG)(folder), "data.max_prompt_length=100", "train.train_iters=26"],
        ("path.jsonl:201: the student's prompt has 123 tokens", "data.max_prompt_length=100", "Raise it"),
    ),
    "an evaluation problem too long, far behind": (
        lambda folder: [*_evaluated(LONG)(folder), "data.max_prompt_length=100"],
        ("eval_path.jsonl:201: the student's prompt has 123 tokens", "data.max_prompt_length=100", "Raise it"),
    ),
    "a generation config that is no object": (
        lambda _: ["model=MODELS/odd_generation"],
        ("odd_generation/generation_config.json cannot be read", "eos_token_id", "Fix it, or remove it"),
    ),
    "a model of few positions": (
        lambda folder: [*_rows("path")(folder), "teacher.model=MODELS/short", "rollout.max_completion_length=16"],
        ("path.jsonl:", "the teacher's prompt of ", "the teacher was made for 16", "max_completion_length"),
    ),
    "a model without its width": (lambda _: ["model=MODELS/no_hidden_size"], ("no_hidden_size", "hidden_size")),
}


@pytest.mark.parametrize("case", BY_EVERY_RANK)
def test_every_rank_finds_it_before_the_ranks_join_and_the_first_one_says_it(
    case, models, tmp_path, monkeypatch, capsys
):
    def joined(*_: Any, **__: Any) -> None:
        raise AssertionError("the ranks joined: not found in time")

    monkeypatch.setattr("renio_megatron.runner.run.start", joined)
    monkeypatch.setattr(worker, "_PATIENCE", 0.0)
    slept: list[float] = []
    monkeypatch.setattr(worker.time, "sleep", slept.append)
    arguments, fragments = BY_EVERY_RANK[case]
    settings = [text.replace("MODELS", str(models)) for text in arguments(tmp_path)]
    before = _tree(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        code = worker.main(["train", str(models / "recipe.yaml"), f"output_dir={tmp_path / 'run'}", *settings])
        _check(code, capsys.readouterr().err.removeprefix("[rank 1] "), fragments)
        assert len(slept) == int(rank), "rank 1 waits for rank 0 to say it"
    assert _tree(tmp_path) == before


# What a run meets once the ranks have joined: the output directory and the weights.
WEIGHTS: dict[str, tuple[str, ...]] = {
    "no_weights": ("no_weights holds no model.safetensors", "Save the model with save_pretrained"),
    "cut_weights": ("cut_weights", "model.safetensors"),
    "three_layers": ("three_layers: the weights hold no 'model.layers.2.", "config.json asks for"),
    "other_mlp": ("other_mlp: ", "config.json and the weights are not of the same model"),
    "other_groups": ("other_groups: ", "config.json and the weights are not of the same model"),
    "other_vocabulary": ("other_vocabulary: ", "config.json and the weights are not of the same model"),
}
PLACES: dict[str, tuple[str, list[str], tuple[str, ...]]] = {
    "a file": ("file", [], ("output_dir ", "file' is a file", "Choose another output_dir")),
    "under a file": ("file/run", [], ("output_dir ", "file/run'")),
    "no parent": ("none/run", [], ("output_dir ", "does not exist", "Make it, or correct output_dir")),
    "somebody else's": ("thesis", [], ("thesis' is not empty", "'thesis.tex'", "Choose another output_dir")),
    "other settings": ("run", ["train.lr=0.5"], ("run' holds a run with other settings", "is now 0.5", "--fresh")),
    "a fresh run that cannot start": ("run", ["--fresh", "model=MODELS/no_weights"], ("holds no model.safetensors",)),
}


def _rank_cases(models: Path, folder: Path) -> dict[str, Any]:
    """Case -> (exit code, stderr, whether the error is marked as every rank's, what became of the directory)."""
    from renio_megatron.cli import train as commands

    def attempt(target: Path, *settings: str) -> dict[str, Any]:
        told, marks, real = io.StringIO(), [], commands.run

        def watch(*args: Any, **kwargs: Any) -> None:
            try:
                real(*args, **kwargs)
            except Exception as error:
                marks.append(getattr(error, "scope", None) is Scope.ALL_RANKS)
                raise

        commands.run, worker._PATIENCE = watch, 0.0  # type: ignore[assignment]
        before = _tree(folder)
        dist.barrier()
        try:
            with contextlib.redirect_stderr(told):
                code = worker.main(["train", str(models / "recipe.yaml"), f"{TP}=2", f"output_dir={target}", *settings])
        finally:
            commands.run = real
        dist.barrier()
        changed = sorted(set(_tree(folder).items()) ^ set(before.items()))
        dist.barrier()
        if target.is_relative_to(folder / "weights") and dist.get_rank() == 0:
            shutil.rmtree(target, ignore_errors=True)
        return {"code": code, "error": told.getvalue(), "shared": marks, "changed": [path for path, _ in changed]}

    import torch.distributed as dist

    found = {"good": attempt(folder / "run")}
    found |= {name: attempt(folder / "weights" / name, f"model={models / name}") for name in WEIGHTS}
    for name, (place, settings, _) in PLACES.items():
        found[name] = attempt(folder / place, *(text.replace("MODELS", str(models)) for text in settings))
    return found


@pytest.fixture(scope="module")
def found(models: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("places")
    (folder / "weights").mkdir()
    (folder / "file").write_text("here")
    (folder / "thesis").mkdir()
    (folder / "thesis" / "thesis.tex").write_text("x")
    return run_ranks(_rank_cases, 2, models, folder, timeout=200)


def test_the_recipe_of_the_cases_below_runs(found):
    assert [rank["good"]["code"] for rank in found] == [0, 0]
    assert any(path.endswith("run/finished.json") for path in found[0]["good"]["changed"])


@pytest.mark.timeout(240)
@pytest.mark.parametrize("case", [*WEIGHTS, *PLACES])
def test_ranks_that_have_joined_refuse_it_as_one(case, found):
    fragments = WEIGHTS[case] if case in WEIGHTS else PLACES[case][2]
    for rank in found:
        _check(rank[case]["code"], rank[case]["error"].removeprefix("[rank 1] "), fragments)


@pytest.mark.parametrize("case", [*WEIGHTS, *PLACES])
def test_their_error_is_told_once(case, found):
    assert [rank[case]["shared"] for rank in found] == [[True], [True]]


@pytest.mark.parametrize("case", [*WEIGHTS, *PLACES])
def test_they_leave_nothing_behind(case, found):
    assert found[0][case]["changed"] == []


def test_the_quickstart_refuses_a_file_as_its_directory(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(worker, "_PATIENCE", 0.0)
    (tmp_path / "file").write_text("here")
    _check(worker.main(["quickstart", str(tmp_path / "file")]), capsys.readouterr().err, ("file", "output"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "fragments"),
    [
        (["data.source=jsonl", "data.path=nowhere.jsonl"], ("there is no file 'nowhere.jsonl'",)),
        (["output_dir=file"], ("output_dir 'file' is a file",)),
        (["model=MODELS/no_weights"], ("no_weights holds no model.safetensors",)),
    ],
)
def test_two_real_ranks_tell_it_once_and_leave_nothing(settings, fragments, models, tmp_path):
    (tmp_path / "file").write_text("here")
    before = _tree(tmp_path)
    settings = [f"{TP}=2", *(text.replace("MODELS", str(models)) for text in settings)]
    if not any(text.startswith("output_dir") for text in settings):
        settings.append(f"output_dir={tmp_path / 'run'}")
    command = [sys.executable, "-m", "renio_megatron.cli.main", "train", str(models / "recipe.yaml"), *settings]
    environment = {**os.environ, "PYTHONPATH": python_path()}
    done = warm.run(command, env=environment, cwd=tmp_path, timeout=120)
    _check(done.returncode, done.stderr, fragments)
    assert _tree(tmp_path) == before
