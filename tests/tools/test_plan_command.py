"""`renio plan` as a command."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from renio_megatron.cli.main import main
from renio_megatron.cli.plan import DOES_NOT_FIT
from renio_megatron.errors import ConfigError
from renio_megatron.tools.plan.models import read_model
from tests.helpers.jobs import python_path
from tests.helpers.paths import MODELS, ROOT

EXAMPLE = ROOT / "examples" / "qwen3_32b_to_1_7b.yaml"
DOCUMENT = ROOT / "docs" / "guides" / "plan.md"


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command line of the example, with directories that hold nothing but config.json where it looks for models."""
    shutil.copytree(MODELS, tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    return ["plan", str(EXAMPLE)]


def test_the_command_fits_or_not_by_its_exit_code(example, capsys):
    assert main([*example, "--gpus", "8", "--memory", "80"]) == 0
    assert "It fits: the largest rank needs" in capsys.readouterr().out
    assert main([*example, "--gpus", "8", "--memory", "24"]) == DOES_NOT_FIT
    assert "It does not fit" in capsys.readouterr().out
    assert main(example) == 0
    out = capsys.readouterr().out
    assert "fit" not in out
    assert "8 ranks: TP 8 x SP x PP 1 x DP 1; distributed optimizer, bf16, recompute full" in out


def test_adapters_are_named_and_make_room(example, capsys):
    own = ["model=models/Qwen3-32B", "teacher=initial", "data.teacher_template='{problem}{solution}'"]
    own += ["rollout.micro_batch_size=16"]
    assert main([*example, *own, "--gpus", "8", "--memory", "80"]) == DOES_NOT_FIT
    assert main([*example, *own, "lora.r=16", "--gpus", "8", "--memory", "80"]) == 0
    out = capsys.readouterr().out
    assert "adapters of rank 16 on q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj" in out
    assert "the teacher is the student without its adapters" in out


def test_experts_of_teacher_and_student_are_counted(example, capsys):
    changes = ["teacher.model=models/Qwen3-235B-A22B", "parallel.tensor_model_parallel_size=4"]
    assert main([*example, *changes, "parallel.pipeline_model_parallel_size=2"]) == 0
    out = capsys.readouterr().out
    assert "a mixture of 128 experts, of which a rank has 128 in each layer, each cut over 4 ranks." in out
    assert "stage 1" in out
    student = [
        "model=models/Qwen3-235B-A22B",
        "teacher.model=models/Qwen3-32B",
        "train.max_tokens_per_micro_batch=null",
        "parallel.tensor_model_parallel_size=4",
        "parallel.expert_model_parallel_size=8",
        "parallel.expert_tensor_parallel_size=1",
    ]
    assert main([*example, *student, "--gpus", "16"]) == 0
    out = capsys.readouterr().out
    assert "16 ranks: TP 4 x SP x PP 1 x DP 4 x EP 8 x ETP 1;" in out
    assert "of which a rank has 16 in each layer. Tokens are taken to be spread evenly" in out


def test_several_teachers_are_named_and_counted_together(example, capsys, tmp_path):
    recipe = tmp_path / "routes.yaml"
    text = EXAMPLE.read_text()
    teacher = "teacher: {routes: {math: {model: models/Qwen3-32B}, code: {model: models/Qwen3-8B}}}"
    text, count = re.subn(r"(?m)^teacher:.*\n(?:[ #].*\n)*", teacher + "\n", text)
    assert count == 1
    recipe.write_text(text)
    records = ["data.source=jsonl", "data.path=a.jsonl", "data.task=null", "data.size=null", "data.teacher_key=subject"]
    assert main(["plan", str(recipe), *records, "--gpus", "8", "--memory", "80"]) == 0
    out = capsys.readouterr().out
    assert "learns from math: models/Qwen3-32B, code: models/Qwen3-8B; 8 ranks: TP 8 x SP x PP 1 x DP 1" in out
    assert "each teacher is counted as if all sequences of a step were its own" in out
    # 2 x (4,095,857,664 + 1,024,111,616) bytes, counted by hand in test_plan.py and test_plan_teachers.py
    assert re.search(r"teacher's parameters +│ +9\.54 ", out)


def test_the_fewest_ranks_hold_a_copy_of_each_model(example, capsys):
    colocated = ["parallel.tensor_model_parallel_size=2", "teacher.parallel.tensor_model_parallel_size=8"]
    assert main([*example, *colocated]) == 0
    out = capsys.readouterr().out
    assert "8 ranks: TP 2 x SP x PP 1 x DP 4;" in out
    assert "teacher TP 8 x SP x PP 1 x DP 1 on the same ranks" in out
    apart = ["teacher.ranks=dedicated", "teacher.parallel.pipeline_model_parallel_size=4"]
    assert main([*example, *colocated, *apart, "teacher.bf16=false"]) == 0
    out = capsys.readouterr().out
    assert "2 of 34 ranks: TP 2 x SP x PP 1 x DP 1;" in out
    assert "teacher in fp32, teacher TP 8 x SP x PP 4 x DP 1 on 32 ranks of its own" in out
    assert "scoring 3" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "12"], "does not divide the world of 12"),
        (["model=models/nowhere"], "there is no directory 'models/nowhere'"),
        (["parallel.tensor_model_parallel_size=3"], "does not divide num_attention_heads=16"),
        (["teacher.ranks=dedicated", "--gpus", "8"], "and none remains for the student"),
        (
            ["train.max_tokens_per_micro_batch=null", "parallel.expert_model_parallel_size=2", "--gpus", "16"],
            "no model of this run has experts",
        ),
        (
            ["teacher.ranks=dedicated", "teacher.parallel.tensor_model_parallel_size=3"],
            "does not divide num_attention_heads=64",
        ),
        (["train.no_such=1"], "unknown key 'train.no_such'"),
    ],
)
def test_mistakes_are_told_as_by_the_other_commands(example, arguments, message, capsys):
    assert main([*example, *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("arguments", [["--memory", "0"], ["--memory", "much"], ["--gpus", "0"], ["--gpu-count", "8"]])
def test_wrong_numbers_are_refused(example, arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*example, *arguments])
    assert caught.value.code == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts": 0}, "needs num_experts .*, a whole number above 0; got 0"),
        ({"mlp_only_layers": [3]}, "mlp_only_layers=\\[3\\] is not supported"),
        ({"hidden_size": "wide"}, "transformers refuses it .*'hidden_size'.*got str"),
    ],
)
def test_a_description_that_cannot_be_counted_is_refused(tmp_path, change, message):
    values = json.loads((MODELS / "Qwen3-235B-A22B" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | change))
    with pytest.raises(ConfigError, match=message):
        read_model(str(tmp_path), "teacher.model")


def test_a_plan_does_without_megatron():
    code = (
        "import sys; from renio_megatron.cli.main import main\n"
        f"main(['plan', {str(EXAMPLE)!r}, 'model={MODELS}/Qwen3-1.7B', 'teacher.model={MODELS}/Qwen3-32B'])\n"
        "print([name for name in ('megatron',) if name in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": python_path()}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_documented_output_is_the_commands(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "80")
    shown = re.findall(r"```\n\$ renio ((?:[^\n]*\\\n)*[^\n]*)\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL)
    assert len(shown) == 2
    for command, output in shown:
        main(command.replace("\\\n", " ").split())
        assert _lines(capsys.readouterr().out) == _lines(output)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]
