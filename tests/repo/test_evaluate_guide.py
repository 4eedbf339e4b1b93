"""The page about evaluations: its commands are run, and its lists are those of the code."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from renio_megatron.config.sections.evaluation_job import EvaluationJobConfig
from renio_megatron.evaluation.benchmarks import NAMES
from renio_megatron.evaluation.results import FIELDS
from renio_megatron.evaluation.summary import BenchmarkSummary
from tests.e2e.test_evaluate import done
from tests.fakes.completion_server import Says, completion, standing_in
from tests.helpers.paths import ROOT, SHARED

PAGE = (ROOT / "docs" / "guides" / "evaluate.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.mark.timeout(300)
def test_its_commands_run_and_end_with_its_table(tmp_path: Path):
    (problems,), (commands,), (table,) = (
        blocks("json"),
        blocks("bash"),
        re.findall(r"```\n(benchmark .*?)```", PAGE, re.S),
    )
    (tmp_path / "chain.jsonl").write_text(problems)
    for command in commands.splitlines():
        program, *arguments = shlex.split(command)
        assert program == "renio"
        said = done(*arguments, cwd=tmp_path)
    assert "20 of 30 drawn before" in said
    assert [line.split() for line in table.splitlines()] == [
        line.split() for line in said.splitlines() if line.startswith(("benchmark ", "chain "))
    ]
    assert json.loads((tmp_path / "figures" / "summary.json").read_text())["benchmarks"]["chain"]["n"] == 6


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `models/mine`, of random weights and a token for each byte, and `data`."""
    if not (SHARED / "data").is_dir():
        pytest.skip("needs the benchmark files in ../shared/data")
    place = tmp_path_factory.mktemp("place")
    tokenizer = Tokenizer(models.BPE({byte: index for index, byte in enumerate(BYTES)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    mine = place / "models" / "mine"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>").save_pretrained(mine)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 8192}
    Qwen3ForCausalLM(Qwen3Config(vocab_size=len(BYTES) + 2, **sizes, **heads)).save_pretrained(mine)
    (place / "data").symlink_to(SHARED / "data")
    return place


BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
COMMANDS = [line for block in blocks("text") for line in block.splitlines()]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", range(len(COMMANDS)))
def test_its_commands_for_large_models_run_on_a_tiny_one(place, number):
    """As they stand, but for the number of ranks, the first problem alone, and four tokens."""
    program, *arguments = shlex.split(COMMANDS[number])
    few = ["--limit", "1", "max_completion_length=4", "--output", str(number)]
    with standing_in(lambda asked: completion("\\boxed{1}") if asked.body else Says(SERVED)) as server:
        if program == "torchrun":
            launched = [argument if argument != "8" else "2" for argument in arguments]
            command = [sys.executable, "-m", "torch.distributed.run", *launched, *few]
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
            run = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=200)
            assert run.returncode == 0, run.stdout + run.stderr
        else:
            given = [argument.replace("http://localhost:8000/v1", server.url) for argument in arguments]
            done(*given, *few, cwd=place)
    figures = json.loads((place / str(number) / "summary.json").read_text())["benchmarks"]
    asked = [name for option, name in itertools.pairwise(arguments) if option == "--benchmark"]
    assert list(figures) == asked and all(one["problems"] == 1 for one in figures.values())


SERVED = {"data": [{"id": "Qwen3-1.7B"}]}


def test_there_are_commands_of_each_kind():
    assert len(COMMANDS) >= 4 and {shlex.split(command)[0] for command in COMMANDS} == {"renio", "torchrun"}


def test_its_lists_are_the_codes():
    settings = PAGE.partition("## Settings")[2]
    names = {field.name for field in dataclasses.fields(EvaluationJobConfig)} - {"concurrency", "timeout_s"}
    assert names <= {name.removesuffix(".*") for name in re.findall(r"`([a-z0-9_]+(?:\.\*)?)`", settings)}
    row = next(line for line in PAGE.splitlines() if line.startswith("| `completions.jsonl`"))
    assert tuple(re.findall(r"`([a-z_]+)`", row.partition("|")[2].partition("|")[2])) == FIELDS
    figures = [field.name for field in dataclasses.fields(BenchmarkSummary)]
    assert f"{{{', '.join(figures)}}}" in PAGE
    by_name = PAGE.partition("By name:")[2].partition("in any spelling")[0]
    assert set(re.findall(r"`([a-z0-9]+)`", by_name)) == set(NAMES)
