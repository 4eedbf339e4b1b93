"""A table of inputs that are wrong, as a newcomer gives them: kind -> name -> (what is given, words of the answer).

What is given is a command line of `renio train` on a recipe that runs, as functions of a folder that they may write to.
"""

from __future__ import annotations

import gzip
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.models.test_chat_template import CHATML

Given = Callable[[Path], list[str]]
Case = tuple[Given, tuple[str, ...]]

RECORDS = [{"problem": "^1+1=", "answer": "2"}, {"problem": "^2+1=", "answer": "3"}]


def _settings(*texts: str) -> Given:
    return lambda folder: [text.replace("FOLDER", str(folder)) for text in texts]


def _recipe(text: str | None) -> Given:
    """A recipe in the place of the one that runs."""

    def write(folder: Path) -> list[str]:
        if text is not None:
            (folder / "own.yaml").write_text(text)
        return [f"RECIPE={folder / 'own.yaml'}"]

    return write


def _data(content: bytes | str | list[dict[str, Any]], name: str = "data.jsonl", *more: str) -> Given:
    def write(folder: Path) -> list[str]:
        if isinstance(content, list):
            (folder / name).write_text("".join(json.dumps(row) + "\n" for row in content))
        else:
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return ["data.source=jsonl", f"data.path={folder / name}", *more]

    return write


def _zip(folder: Path) -> list[str]:
    with zipfile.ZipFile(folder / "data.jsonl", "w") as archive:
        archive.writestr("data.jsonl", "{}")
    return ["data.source=jsonl", f"data.path={folder / 'data.jsonl'}"]


def _answer(value: Any) -> Given:
    return _data([{"problem": "^1+1=", "answer": value}])


def _model(change: Callable[[Path], None], key: str = "model") -> Given:
    """A copy of the student with one thing changed."""

    def make(folder: Path) -> list[str]:
        copy = shutil.copytree(folder / "models" / "student", folder / "changed")
        change(copy)
        return [f"{key}={copy}"]

    return make


def _config(**values: Any) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def _rope(**values: Any) -> Callable[[Path], None]:
    return _config(rope_parameters=None, rope_theta=1e4, rope_scaling=values)


def _write(name: str, content: str | bytes) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        (directory / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def _remove(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).unlink()


def _weights(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def rewrite(directory: Path) -> None:
        from safetensors.torch import load_file, save_file

        state = load_file(directory / "model.safetensors")
        change(state)
        save_file(state, directory / "model.safetensors", metadata={"format": "pt"})

    return rewrite


def _nan(state: dict[str, Any]) -> None:
    state["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")


def _cut(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:2000])


def _old_index(directory: Path) -> None:
    from safetensors import safe_open

    with safe_open(directory / "model.safetensors", "pt") as file:
        index = {"weight_map": dict.fromkeys(file.keys(), "model-00001-of-00002.safetensors")}
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _tokenizer(change: Callable[[Any], None]) -> Callable[[Path], None]:
    def rewrite(directory: Path) -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(directory)
        change(tokenizer)
        tokenizer.save_pretrained(directory)

    return rewrite


def _chat(template: Any) -> Given:
    def change(directory: Path) -> None:
        _tokenizer(lambda tokenizer: setattr(tokenizer, "chat_template", template))(directory)

    given = _model(change)
    return lambda folder: [*given(folder), "data.chat=true"]


def _adapter(**values: Any) -> Given:
    def make(folder: Path) -> list[str]:
        copy = shutil.copytree(folder / "models" / "adapter", folder / "other adapter")
        path = copy / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
        return [f"teacher.adapter={copy}"]

    return make


def _foreign(folder: Path) -> list[str]:
    (folder / "thesis").mkdir()
    (folder / "thesis" / "thesis.tex").write_text("x")
    return [f"output_dir={folder / 'thesis'}"]


def _file_in_its_place(folder: Path) -> list[str]:
    (folder / "here").write_text("x")
    return [f"output_dir={folder / 'here'}"]


def _resumed(change: Callable[[Path], None], *settings: str) -> Given:
    """A run that was cut off after its second step, as it is when it goes on."""

    def make(folder: Path) -> list[str]:
        copy = shutil.copytree(folder / "models" / "cut off", folder / "run")
        change(copy)
        return [f"output_dir={copy}", "train.train_iters=4", "checkpoint.save_interval=2", *settings]

    return make


def _damage(run: Path) -> None:
    for path in (run / "checkpoints" / "iter_0000002").glob("*.distcp"):
        path.write_bytes(path.read_bytes()[:100])


def _nothing(run: Path) -> None:
    pass


def _lose(run: Path) -> None:
    shutil.rmtree(run / "checkpoints" / "iter_0000002")


NESTED = "[" * 100_000
EARLY: dict[str, dict[str, Case]] = {
    # before torch is imported
    "recipe": {
        "not there": (_recipe(None), ("there is no recipe", "Give the path")),
        "no YAML": (_recipe("train: {lr: [}\n"), ("line 1", "not valid YAML")),
        "empty": (_recipe(""), ("the recipe is empty",)),
        "a list": (_recipe("- a\n- b\n"), ("a recipe is a mapping", "list")),
        "nested": (_recipe("a: " + "[" * 3000), ("own.yaml",)),
        "without a model": (_recipe("teacher: {model: a}\noutput_dir: b\n"), ("model is missing", "Add it")),
    },
    "key": {
        "misspelled": (_settings("train.lrr=1"), ("'train.lrr'", "Did you mean 'train.lr'")),
        "of another section": (_settings("lr=1"), ("'lr'", "'train.lr'")),
        "a section that is none": (_settings("weightin.name=renio"), ("'weightin.name'", "weighting")),
        "without a value": (_settings("train.lr="), ("train.lr= has no value",)),
        "no key at all": (_settings("fast"), ("'fast' is not a setting", "key=value")),
        "twice": (_settings("train.lr=1", "train.lr=2"), ("would undo", "Give each key once")),
    },
    "value": {
        "text for a number": (_settings("train.lr=fast"), ("train.lr must be a number", "'fast'")),
        "a negative rate": (_settings("train.lr=-1"), ("train.lr must be above 0",)),
        "a batch of a trillion": (_settings("train.global_batch_size=1000000000000"), ("at most 1048576",)),
        "an evaluation of a trillion": (_settings("evaluate.every=1", "evaluate.samples=1000000000000"), ("at most",)),
        "a share above 1": (_settings("rollout.top_p=2"), ("rollout.top_p must lie in (0, 1]",)),
        "an unknown weighting": (_settings("weighting=magic"), ("weighting.name must be one of renio, uniform",)),
    },
    "combination": {
        "without effect": (_settings("weighting=uniform", "weighting.cap=3"), ("weighting.cap is set but would be",)),
        "a teacher that sees the same": (_settings("teacher=initial"), ("teacher.kind=initial", "Give data.")),
        "a batch that is no multiple": (_settings("train.global_batch_size=9"), ("multiple of 4",)),
        "a model of the teacher's twice": (
            _settings("teacher=initial", "teacher.model=x", "data.teacher_template={solution}"),
            ("teacher.model is set but would be ignored",),
        ),
        "too few sequences": (
            _settings("train.global_batch_size=1", "train.micro_batch_size=1"),
            ("at least 2 sequences",),
        ),
    },
    "template": {
        "double braces": (_settings("data.student_template=Q: {{problem}}"), ("has no {problem}",)),
        "spaces inside": (_settings("data.student_template=Q: { problem }"), ("has no {problem}",)),
        "other brackets": (_settings("data.student_template=Q: <problem>"), ("has no {problem}",)),
        "plain text": (_settings("data.student_template=Think step by step."), ("has no {problem}",)),
        "of the teacher": (_settings("data.teacher_template=You know it."), ("has no {problem} or {solution}",)),
        "an unknown field": (_settings("data.student_template={question}"), ("{problem} and {solution}",)),
    },
    "stop": {
        "a negative token": (_settings("rollout.stop_token_ids=[-1]"), ("token ids, from 0 on",)),
        "a text for a token": (_settings("rollout.stop_token_ids=[end]"), ("a list of whole numbers",)),
        "empty text": (_settings("rollout.stop_strings=['']"), ("an empty text",)),
        "a text for a list": (_settings("rollout.stop_strings=END"), ("a list of words",)),
    },
    "place of the data": {
        "none given": (_settings("data.source=jsonl"), ("data.path is missing",)),
        "not there": (_settings("data.source=jsonl", "data.path=FOLDER/none"), ("data.path: there is no file",)),
        "a directory": (_settings("data.source=jsonl", "data.path=FOLDER"), ("is a directory", "datasets")),
        "an unset variable": (_settings("data.source=jsonl", "data.path=$NO_SUCH_VARIABLE/a"), ("$NO_SUCH_VARIABLE",)),
        "a file for a directory": (
            lambda folder: [*_data(RECORDS)(folder)[1:], "data.source=datasets"],
            ("there is no directory", "data.source=jsonl reads"),
        ),
        "no problems to evaluate on": (
            _data(RECORDS, "data.jsonl", "evaluate.every=1"),
            ("data.eval_path is missing",),
        ),
    },
    "format of the data": {
        "UTF-16": (_data('{"problem": "1"}'.encode("utf-16")), ("is UTF-16", "iconv")),
        "CSV": (_data("problem,answer\n1+1,2\n2+2,4\n", "data.csv"), ("looks like CSV", "to_json")),
        "an object over lines": (_data(json.dumps(RECORDS[0], indent=2)), ("object over several lines", "jq -c")),
        "a zip archive": (_zip, ("is a zip archive", "Unpack it")),
        "half a gzip file": (_data(gzip.compress(b"{}" * 99, mtime=0)[:20]), ("cannot be read", "truncated")),
        "a parquet file cut off": (_data(b"PAR1" + b"\0" * 99), ("a parquet file that cannot be read",)),
    },
    "records": {
        "none": (_data(""), ("the file holds no records",)),
        "an empty array": (_data("[]"), ("the file holds no records",)),
        "not a problem among the columns": (_data([{"frage": "1"}]), ("no column 'problem'", "columns: frage")),
        "two that could be it": (_data([{"question": "1", "prompt": "2"}]), ("could be meant", "data.problem_key")),
        "half of them with answers": (_data([*RECORDS, {"problem": "^1+1="}]), ("Give every record an answer",)),
        "nested": (_data('{"problem": "1", "m": ' + NESTED), ("data.jsonl:1", "nested too deeply")),
    },
    "answer": {
        "NaN": (_answer(float("nan")), ("the answer ('answer') is 'nan'",)),
        "infinity": (_answer(float("inf")), ("the answer ('answer') is 'inf'",)),
        "text that says nan": (_answer("NaN"), ("the answer ('answer') is 'NaN'",)),
        "empty": (_answer(" "), ("the answer ('answer') is empty",)),
        "a list": (_answer(["2"]), ("must hold text, got list",)),
        "true": (_answer(True), ("must hold text, got bool",)),
    },
    "model": {
        "not there": (_settings("model=FOLDER/none"), ("model: there is no directory",)),
        "a directory of something else": (_settings("teacher.model=FOLDER"), ("teacher.model: ", "no config.json")),
        "another family": (_model(_config(model_type="mamba")), ("model_type 'mamba'", "supported are llama")),
        "no JSON": (_model(_write("config.json", "{")), ("cannot be read as JSON",)),
        "nested": (_model(_write("config.json", NESTED)), ("config.json",)),
        "an adapter beside it": (
            _model(_write("adapter_config.json", "{}")),
            ("adapter_config.json beside the model",),
        ),
    },
    "layout": {
        "heads": (_settings("parallel.tensor_model_parallel_size=3"), ("does not divide num_attention_heads=4",)),
        "layers": (_settings("parallel.pipeline_model_parallel_size=3"), ("does not divide num_hidden_layers=2",)),
        "experts of a dense model": (
            _settings("parallel.expert_model_parallel_size=2"),
            ("expert_model_parallel_size=2", "Choose a divisor"),
        ),
        "stages without a pipeline": (
            _settings("parallel.virtual_pipeline_model_parallel_size=2"),
            ("there is one pipeline rank",),
        ),
    },
}

LATE: dict[str, dict[str, Case]] = {
    # by the ranks, before the first step
    "description": {
        "theta null": (_model(_config(rope_parameters=None, rope_theta=None)), ("config.json",)),
        "llama3 without a factor": (
            _model(_rope(rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0)),
            ("config.json",),
        ),
        "longrope": (
            _model(_rope(rope_type="longrope", short_factor=[1.0] * 4, long_factor=[2.0] * 4)),
            ("rope of the kind 'longrope' is not supported",),
        ),
        "a width in words": (_model(_config(hidden_size="wide")), ("config.json: transformers refuses it",)),
        "quantized": (_model(_config(quantization_config={"bits": 4})), ("quantized weights are not read",)),
        "another activation": (_model(_config(hidden_act="gelu"), "teacher.model"), ("hidden_act='gelu'",)),
    },
    "weights": {
        "not there": (_model(_remove("model.safetensors")), ("holds no model.safetensors",)),
        "cut off": (_model(_cut), ("model.safetensors cannot be read", "truncated")),
        "not a number": (_model(_weights(_nan)), ("model.layers.1.mlp.up_proj.weight holds NaN or inf",)),
        "an index without its files": (
            _model(_old_index),
            ("model-00001-of-00002.safetensors cannot be read", "missing"),
        ),
        "of another model": (_model(_config(intermediate_size=48)), ("not of the same model",)),
        "one too many": (
            _model(_weights(lambda state: state.update(extra=state["model.norm.weight"].clone()))),
            ("does not ask for 'extra'",),
        ),
    },
    "tokenizer": {
        "not there": (_model(_remove("tokenizer.json")), ("holds no tokenizer",)),
        "no JSON": (_model(_write("tokenizer.json", "{")), ("The tokenizer of", "cannot be loaded")),
        "without an end": (_model(_tokenizer(lambda t: setattr(t, "eos_token", None))), ("names no eos_token",)),
        "more tokens than rows": (
            _model(_tokenizer(lambda t: t.add_special_tokens({"pad_token": "[PAD]"}))),
            ("'[PAD]' has the id 17", "resize_token_embeddings"),
        ),
        "odd ends": (_model(_write("generation_config.json", '{"eos_token_id": "x"}')), ("generation_config.json",)),
    },
    "chat template": {
        "none": (_chat(None), ("needs a tokenizer with a chat template",)),
        "that refuses": (_chat("{{ raise_exception('no') }}"), ("TemplateError: no",)),
        "of two turns": (_chat("{{ messages[1].content }}"), ("modchain train problem", "UndefinedError")),
        "with a mistake": (_chat("{% for m in messages %}{{ m.content }"), ("TemplateSyntaxError",)),
        "several without a default": (_chat({"rag": CHATML, "tool_use": CHATML}), ("Keep one template",)),
        "a date of its own": (_chat("{% set f = '%d' %}{{ strftime_now(f) }}"), ("cannot be held still",)),
    },
    "adapter": {
        "not there": (_settings("teacher.adapter=FOLDER/none"), ("teacher.adapter: ", "cannot be read")),
        "of another kind": (_adapter(peft_type="LOHA"), ("peft_type='LOHA'",)),
        "DoRA": (_adapter(use_dora=True), ("use_dora=True", "merge_and_unload")),
        "PiSSA by chance": (_adapter(init_lora_weights="pissa_niter_4"), ("path_initial_model_for_weight_conversion",)),
        "of another rank": (
            _settings("lora.r=2", "lora.alpha=8", "lora.adapter=FOLDER/models/adapter"),
            ("lora.r: 4 there, 2 here",),
        ),
        "of another model": (_adapter(target_modules=["q_proj"]), ("teacher.adapter: ", "without a counterpart")),
    },
    "output": {
        "a file": (_file_in_its_place, ("output_dir ", "is a file")),
        "somebody else's": (_foreign, ("is not empty", "thesis.tex")),
        "under a file": (lambda folder: [f"{_file_in_its_place(folder)[0]}/run"], ("output_dir ",)),
        "without a parent": (_settings("output_dir=FOLDER/none/run"), ("does not exist", "Make it")),
        "where nobody writes": (_settings("output_dir=/proc/run"), ("output_dir '/proc/run' cannot be used",)),
        "a full disk": (_settings("output_dir=FOLDER/run", "LIMIT=20000"), ("cannot be written", "Free space")),
    },
    "resume": {
        "with other settings": (_resumed(_nothing, "train.lr=0.5"), ("a run with other settings", "--fresh")),
        "from a damaged checkpoint": (_resumed(_damage), ("iter_0000002 cannot be read",)),
        "from one that is lost": (_resumed(_lose), ("latest_checkpointed_iteration.txt", "--fresh")),
        "from nowhere": (_settings("checkpoint.load=FOLDER/none"), ("checkpoint.load=", "holds no checkpoint")),
        "of another model": (
            _settings("checkpoint.load=FOLDER/models/cut off", "model=FOLDER/models/tied", "train.train_iters=4"),
            ("is of another architecture", "tied"),
        ),
        "with nothing left to do": (
            _settings("checkpoint.load=FOLDER/models/cut off", "train.train_iters=1"),
            ("nothing is left to do",),
        ),
    },
    "place in the world": {
        "beyond its end": (_settings("ENV=RANK:3", "ENV=WORLD_SIZE:2"), ("RANK=3 with WORLD_SIZE=2",)),
        "no port": (
            _settings("ENV=RANK:0", "ENV=WORLD_SIZE:1", "ENV=MASTER_PORT:abc"),
            ("MASTER_PORT must be a port",),
        ),
        "no address": (
            _settings("ENV=RANK:0", "ENV=WORLD_SIZE:1", "ENV=MASTER_PORT:29999", "ENV=MASTER_ADDR:no-such-host"),
            ("MASTER_ADDR=no-such-host is no address",),
        ),
        "no number": (_settings("ENV=RANK:0", "ENV=WORLD_SIZE:1", "ENV=LOCAL_RANK:x"), ("LOCAL_RANK must be",)),
        "half of one": (_settings("ENV=RANK:0"), ("RANK is set and WORLD_SIZE is not",)),
    },
}
