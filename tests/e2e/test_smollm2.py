"""A real pretrained model, SmolLM2-135M-Instruct: teaches itself, whole and by adapters; exports; logits at TP 3."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from renio_megatron.config.load import load_recipe
from renio_megatron.config.schema import DistillationConfig
from renio_megatron.config.teachers import ONLY
from renio_megatron.tools.plan.memory import plan_memory
from renio_megatron.tools.plan.models import read_model
from tests.e2e.test_evaluate import done, verdicts
from tests.fakes.served_model import Served
from tests.helpers import warm
from tests.helpers.multiprocess import run_ranks
from tests.helpers.packages import smollm2_directory
from tests.helpers.paths import ROOT

WHOLE, ADAPTED = (ROOT / "examples" / f"smollm2_gsm_{name}.yaml" for name in ("opsd", "lora"))
LENGTH = 6
SHORT = (
    f"rollout.max_completion_length={LENGTH}",
    "train.global_batch_size=2",
    "train.micro_batch_size=1",  # or activations would hide what else is held
    "weighting.threshold=0.1",  # a few tokens have to decide
)
PROMPT = "What is 7 + 5? Answer with a number."

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def model() -> Path:
    """The model's directory."""
    pytest.importorskip("reasoning_gym", reason="needs the extra `gym`")
    return smollm2_directory()


MEASURED = """
import resource, subprocess, sys
done = subprocess.run(sys.argv[1:])
print("\\npeak", resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
sys.exit(done.returncode)
"""
"""Runs a command; its last line is the largest resident memory that one of its processes had, in bytes."""


@dataclass(frozen=True)
class Run:
    """A run's directory, and the largest resident memory of a rank, bytes."""

    directory: Path
    peak: int


def carried_out(recipe: Path, model: Path, directory: Path) -> Run:
    """An example's two steps on two pipeline stages, with few and short completions."""
    command = [sys.executable, "-m", "renio_megatron.cli.main", "train", str(recipe)]
    command += [f"model={model}", f"output_dir={directory}", *SHORT]
    done = warm.run([sys.executable, "-c", MEASURED, *command], timeout=900)
    assert done.returncode == 0, done.stderr
    assert "the first step's 2 completions" in done.stdout and "the first step, " not in done.stderr, "a canary warns"
    return Run(directory, int(done.stdout.split()[-1]))


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """All weights are trained."""
    return carried_out(WHOLE, model, tmp_path_factory.mktemp("smollm2") / "run")


@pytest.fixture(scope="module")
def adapted(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Adapters are trained."""
    return carried_out(ADAPTED, model, tmp_path_factory.mktemp("smollm2 adapted") / "run")


@pytest.fixture
def run(whole: Run) -> Path:
    return whole.directory


@pytest.mark.parametrize("name", ["whole", "adapted"])
def test_two_steps_of_self_distillation(name: str, request: pytest.FixtureRequest) -> None:
    run = request.getfixturevalue(name).directory
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[0]["loss"] > 0
    for row in rows:
        assert all(math.isfinite(value) for value in row.values())
        assert row["weight/max"] > 1.01  # the weights are not all 1
        assert row["renio/unit_weight_frac"] < 1
        assert row["grad_norm"] > 0
        assert row["rollout/length"] <= LENGTH


def test_the_exported_model_generates(run: Path, model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    exported = tmp_path / "exported"
    command = [sys.executable, "-m", "renio_megatron.cli.main", "export", str(run), str(exported)]
    done = warm.run(command, timeout=300)
    assert done.returncode == 0, done.stderr
    tokenizer = AutoTokenizer.from_pretrained(exported)
    network = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    chat = [{"role": "user", "content": PROMPT}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = network.generate(**inputs, max_new_tokens=24, do_sample=False)
    assert "12" in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    start = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    moved = [not torch.equal(a, b) for a, b in zip(network.parameters(), start.parameters(), strict=True)]
    assert sum(moved) > 0.9 * len(moved)  # it was trained, and it is the trained one that was exported


def test_adapters_save_the_memory_of_the_optimiser(whole: Run, adapted: Run, model: Path) -> None:
    planned = []
    for path in (WHOLE, ADAPTED):
        config = load_recipe("train", path, [f"model={model}"]).config
        assert isinstance(config, DistillationConfig)
        read = read_model(config.model, "model")
        planned.append(plan_memory(config, replace(read, lora=config.lora), {ONLY: read}, 2, fused_norm=False))
    optimizer = max(all_of.held["optimizer"] - few.held["optimizer"] for all_of, few in zip(*planned, strict=True))
    assert optimizer > 600e6
    assert whole.peak - adapted.peak > optimizer


def test_the_exported_adapter_generates(adapted: Run, model: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    exported = tmp_path / "exported"
    command = [sys.executable, "-m", "renio_megatron.cli.main", "export", str(adapted.directory), str(exported)]
    done = warm.run(command, timeout=300)
    assert done.returncode == 0, done.stderr
    tokenizer = AutoTokenizer.from_pretrained(model)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    network = peft.PeftModel.from_pretrained(base, exported)
    chat = [{"role": "user", "content": PROMPT}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        logits = network(**inputs).logits
        with network.disable_adapter():
            before = network(**inputs).logits
    assert float((logits - before).abs().max()) > 1e-3  # it was trained
    output = network.generate(**inputs, max_new_tokens=24, do_sample=False)
    assert "12" in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])


def _logits(model: Path, token_ids: list[int]) -> torch.Tensor:
    """All positions' logits at TP = 3, gathered: [S, V]."""
    from renio_megatron.config import ParallelConfig, TrainConfig
    from renio_megatron.data.batching.collate import BatchLayout, collate
    from renio_megatron.megatron.model.build import build_model
    from renio_megatron.megatron.model.schedules import run_forward
    from renio_megatron.megatron.runtime.initialize import start
    from renio_megatron.megatron.weights.hf import load_weights
    from renio_megatron.models.architecture import Architecture
    from renio_megatron.parallel.vocab import gather_columns
    from renio_megatron.types import Prompt, Rollout

    parallel = ParallelConfig(tensor_model_parallel_size=3)
    layout = start(parallel, seed=0)
    architecture = Architecture.from_directory(model)
    part = build_model(architecture, layout, parallel, TrainConfig(), vocab_size=architecture.vocab_size)
    load_weights(part, model)
    prompt = Prompt(0, tuple(token_ids[:1]), tuple(token_ids[:1]))
    batch = collate([Rollout(prompt, tuple(token_ids[1:]))], audience="student", batch_layout=BatchLayout(0))
    rows = run_forward(part, batch, lambda index, micro_batch, hidden: part.head_logits(hidden))
    return gather_columns(rows[0], part.shard)


def test_logits_agree_with_transformers_at_tp_3(model: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    token_ids = AutoTokenizer.from_pretrained(model)(PROMPT + " The answer is 12.")["input_ids"]
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        expected = network(torch.tensor([token_ids])).logits[0, :-1]
    for found in run_ranks(_logits, 3, model, token_ids, timeout=300):
        error = float((found - expected).abs().max() / expected.abs().max())
        assert error < 1e-5, error


def test_evaluated_from_the_directory_the_run_and_a_server(model, whole, tmp_path):
    """The run's two steps leave it so near to its start that a few greedy tokens stay the same, or do not: the run is
    compared with what it exports."""
    problems = [{"problem": f"What is {a} + {b}?", "answer": a + b} for a, b in ((7, 5), (30, 12))]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    done("export", str(whole.directory), "exported", cwd=tmp_path)
    settings = ["--benchmark", "sums.jsonl", "temperature=0", "max_completion_length=8", "grader=number"]
    done("evaluate", str(whole.directory), *settings, "--output", "of_run", "--nproc", "2", cwd=tmp_path)
    done("evaluate", "exported", *settings, "--output", "of_directory", "bf16=false", cwd=tmp_path)
    with Served(tmp_path / "exported") as served:
        done("evaluate", served.url, "--model", "model", *settings, "--output", "of_server", cwd=tmp_path)
    found = [verdicts(tmp_path / name) for name in ("of_run", "of_directory", "of_server")]
    assert len(found[0]) == 2 and found[0] == found[1] == found[2]
