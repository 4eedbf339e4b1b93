"""What `renio plan` says where a run does not fit: with those settings it does, and with fewer of them it does not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from renio_megatron.cli.main import main
from renio_megatron.cli.plan import DOES_NOT_FIT
from tests.helpers.paths import MODELS, ROOT

EXAMPLE = ROOT / "examples" / "qwen3_32b_to_1_7b.yaml"
EXPERTS = [
    *("model=models/Qwen3-235B-A22B", "train.max_tokens_per_micro_batch=null", "--gpus", "128"),
    *("parallel.tensor_model_parallel_size=4", "parallel.expert_tensor_parallel_size=1"),
]
OWN_LAYOUT = ["teacher.parallel.tensor_model_parallel_size=2", "--gpus", "8"]


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command line of the example, with directories that hold nothing but config.json where it looks for models."""
    shutil.copytree(MODELS, tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    return ["plan", str(EXAMPLE)]


def advice(command: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[str, list[str]]:
    """The last lines that a plan which does not fit prints: how, and the settings."""
    assert main(command) == DOES_NOT_FIT
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("  "), lines[-1]
    return lines[-2], lines[-1].split()


@pytest.mark.parametrize(
    ("changes", "memory", "expected"),
    [
        # The figures of docs/guides/plan.md: 8.75 GiB of cache fall to half, and 5 GiB of payload leave the device.
        (["--gpus", "8"], 24, ["rollout.micro_batch_size=32"]),
        (["--gpus", "8"], 16, ["rollout.micro_batch_size=16", "teacher.payload_device=host"]),
        (EXPERTS, 80, ["parallel.expert_model_parallel_size=128"]),
        (OWN_LAYOUT, 40, ["teacher.parallel.pipeline_model_parallel_size=2"]),
    ],
    ids=["one", "two", "experts", "own layout"],
)
def test_the_settings_are_enough_and_none_is_too_much(example, capsys, changes, memory, expected):
    command = [*example, *changes, "--memory", str(memory)]
    how, settings = advice(command, capsys)
    assert how.startswith("It fits, with ") and how.endswith(" GiB, where you add:")
    assert settings == expected
    assert main([*command, *settings]) == 0
    for left_out in settings:
        assert main([*command, *(one for one in settings if one != left_out)]) == DOES_NOT_FIT


def test_two_settings_are_given_only_where_no_single_one_is_enough(example, capsys):
    singles = [
        *(f"rollout.micro_batch_size={size}" for size in (32, 16, 8, 4, 2, 1)),
        *("teacher.payload_device=host", "teacher.payload_device=recompute", "teacher.offload=host"),
        *("parallel.pipeline_model_parallel_size=2", "parallel.context_parallel_size=2"),
    ]
    command = [*example, "--gpus", "8", "--memory", "16"]
    assert {main([*command, single]) for single in singles} <= {2, DOES_NOT_FIT}
    capsys.readouterr()
    assert len(advice(command, capsys)[1]) == 2


def test_recomputation_is_one_word(example, capsys):
    given = ["model=models/Qwen3-8B", "teacher.model=models/Qwen3-1.7B", "rollout.micro_batch_size=1"]
    recipe = Path("recipe.yaml")
    text = EXAMPLE.read_text().replace("max_tokens_per_micro_batch: 16384", "micro_batch_size: 1")
    text = text.replace("payload_device: device", "payload_device: host")
    recipe.write_text("".join(line for line in text.splitlines(True) if "  recompute_" not in line))
    command = ["plan", str(recipe), *given, "--gpus", "8", "--memory", "26"]
    _, settings = advice(command, capsys)
    assert settings == ["train.recompute_granularity=full"]
    assert main([*command, *settings]) == 0


def test_what_was_given_is_replaced_only_where_nothing_else_helps(example, capsys):
    given = ["parallel.tensor_model_parallel_size=1", "parallel.sequence_parallel=false"]
    how, settings = advice([*example, *given, "--gpus", "8", "--memory", "24"], capsys)
    assert how.endswith("where you add, in the place of parallel.tensor_model_parallel_size:")
    assert "parallel.tensor_model_parallel_size=8" in settings
    command = [*example, given[1], "--gpus", "8", "--memory", "24"]
    assert main([*command, *settings]) == 0


def test_where_nothing_is_enough_it_says_how_near_it_came(example, capsys):
    assert main([*example, "--gpus", "8", "--memory", "4"]) == DOES_NOT_FIT
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(
        "No 4 settings of batches, recomputation, layouts and places make it fit on 8 GPUs; at the least, with "
    )
    assert last.endswith("Take more GPUs (--gpus), adapters (lora.r), or shorter completions.")
