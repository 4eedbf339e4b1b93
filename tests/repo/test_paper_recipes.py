"""The paper's recipes: every composition of their parts can be planned, and has the values of the published scripts."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from renio_megatron.cli.main import main
from renio_megatron.cli.plan import DOES_NOT_FIT
from renio_megatron.config.load import check_world, load_recipe
from renio_megatron.config.resolved import resolved_yaml
from tests.helpers.paths import ROOT

PAPER = ROOT / "examples" / "paper"
PARTS = PAPER / "parts"
STUDENTS = ("qwen3-1.7b", "qwen3-4b", "qwen3-8b", "r1-distill-qwen-1.5b", "r1-distill-qwen-7b")
TASKS = ("math", "math-without-solution", "code", "code-without-solution")
COMPOSED = [
    *itertools.product(("opd",), TASKS, STUDENTS, ("renio", "uniform")),
    *itertools.product(("opsd",), ("math", "code"), STUDENTS, ("renio", "uniform")),
]

# By hand from the scripts: lr, steps, batch x accumulation x processes, clips of gradients and of entries, group.
SCRIPTS: dict[str, tuple[Any, ...]] = {
    "qwen3-1.7b": (5e-6, 126, (8, 1, 4), 1.0, 0.05, 8),
    "qwen3-4b": (5e-6, 126, (4, 2, 4), 0.1, 0.05, 4),
    "qwen3-8b": (5e-6, 126, (2, 4, 4), 0.1, 0.06, 2),
    "r1-distill-qwen-1.5b": (5e-6, 126, (8, 1, 4), 1.0, 0.05, 8),  # borrowed
    "r1-distill-qwen-7b": (5e-6, 126, (2, 4, 4), 0.1, 0.06, 2),
}


def composed(folder: Path, algorithm: str, task: str, student: str, weighting: str) -> Path:
    path = folder / "composed.yaml"
    names = [str(PARTS / f"{name}.yaml") for name in (algorithm, task, weighting, student)]
    path.write_text(yaml.safe_dump({"base": names, "output_dir": "run"}))
    return path


@pytest.mark.parametrize(("algorithm", "task", "student", "weighting"), COMPOSED, ids="-".join)
def test_every_composition_has_the_values_of_its_script(tmp_path, algorithm, task, student, weighting):
    path = composed(tmp_path, algorithm, task, student, weighting)
    recipe = load_recipe("train", path)
    config, train, rollout, data = (recipe.config, recipe.config.train, recipe.config.rollout, recipe.config.data)
    check_world(config, 4)
    lr, steps, (device, accumulation, processes), clip_grad, entry_clip, group = SCRIPTS[student]
    assert (train.lr, train.train_iters, train.clip_grad, train.micro_batch_size) == (lr, steps, clip_grad, device)
    assert train.global_batch_size == device * accumulation * processes == 32
    assert (train.lr_decay_style, train.lr_warmup_iters, train.min_lr, train.weight_decay) == ("linear", 0, 0.0, 0.0)
    assert (train.adam_beta1, train.adam_beta2, train.adam_eps, train.bf16) == (0.9, 0.999, 1e-8, True)
    assert (rollout.temperature, rollout.top_p, rollout.top_k) == (1.1, 0.95, 20)
    assert (rollout.max_completion_length, rollout.completions_per_prompt, rollout.prefix) == (1024, 1, True)
    assert data.max_prompt_length + rollout.max_completion_length == 20000
    assert (config.loss.beta, config.loss.temperature) == (0.0, 1.1)
    assert (config.loss.entry_clip, config.loss.entry_floor) == (entry_clip, 0.0)
    assert (config.lora.r, config.lora.alpha, config.lora.dropout, len(config.lora.targets)) == (64, 128, 0.0, 7)
    assert config.checkpoint.save_interval == 25
    assert (train.seed, data.seed) == (42, 42)
    if weighting == "renio":
        found = config.weighting
        assert (found.threshold, found.ceiling, found.temperature, found.cap) == (0.8, 2.5, 1.0, 10.0)
        assert (found.normalize, found.group_size) == ("group", group)
    else:
        assert config.weighting.name == "uniform" and config.renio_report is not None
    assert config.teacher.kind == {"opd": "separate", "opsd": "initial"}[algorithm]
    thinking = (data.enable_thinking, data.teacher_enable_thinking)
    if student.startswith("r1"):
        assert thinking == (None, None)
    else:
        assert thinking == ((True, True) if task.endswith("solution") else (False, True))
    assert "{solution}" not in data.student_template
    assert (data.teacher_template is None) == task.endswith("solution")
    assert data.teacher_template is None or "{solution}" in data.teacher_template
    (tmp_path / "one.yaml").write_text(resolved_yaml(recipe))
    assert load_recipe("train", tmp_path / "one.yaml").config == config


def test_fine_tuning_has_the_values_of_its_script():
    config = load_recipe("sft", PAPER / "sft-qwen3-1.7b-math.yaml").config
    check_world(config, 4)
    assert (config.train.lr, config.train.lr_decay_style, config.train.clip_grad) == (5e-6, "linear", 1.0)
    assert (config.train.global_batch_size, config.train.micro_batch_size) == (32, 2)
    assert config.train.train_iters == 4 * -(-29139 // 32)
    assert (config.lora.r, config.lora.alpha, config.checkpoint.save_interval) == (64, 128, 20)
    assert config.learns_prompts and config.data.max_prompt_length == 16000
    assert config.data.student_template.startswith("{problem}\n\n")


@pytest.mark.parametrize("path", sorted(PAPER.glob("*.yaml")), ids=lambda path: path.stem)
def test_each_that_ships_is_one_of_the_compositions(path):
    written = yaml.safe_load(path.read_text())
    assert written["output_dir"] == f"runs/paper/{path.stem}"
    names = [Path(name).stem for name in written["base"]] if isinstance(written["base"], list) else []
    algorithm, task, weighting, student = names or ("sft", "math", "", "qwen3-1.7b")
    assert names == [] or (algorithm, task, student, weighting) in COMPOSED
    assert path.stem == f"{algorithm}-{student}-{task}{'-uniform' * (weighting == 'uniform')}"


@pytest.mark.parametrize("part", sorted(PARTS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_value_has_its_origin(part):
    """A line with a value ends with where it is from, or stands in a file whose head says so of all."""
    lines = part.read_text().splitlines()
    assert lines[0].startswith("# ")
    told_at_the_top = part.stem in ("uniform", *STUDENTS, *(task for task in TASKS if task.endswith("solution")))
    whole = {"source", "path", "recompute_method", "recompute_num_layers", "name", "answer_key", "teacher_view", "base"}
    for line in lines:
        key, colon, value = line.split("#")[0].partition(":")
        if colon and value.strip() and key.strip() not in whole and not told_at_the_top:
            assert "#" in line or "teacher:" in line, line


QWEN3_4B = {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32}
R1_1_5B = {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12}
R1_7B = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
R1 = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "rope_theta": 1e4, "tie_word_embeddings": False}


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """The directories that the recipes name, with config.json alone."""
    reference = ROOT / "tests" / "reference_data" / "models"
    base = json.loads((reference / "Qwen3-1.7B" / "config.json").read_text())
    qwen2 = {key: value for key, value in base.items() if key not in ("head_dim", "attention_bias")}
    configs = {
        "Qwen3-1.7B": base,
        "Qwen3-8B": json.loads((reference / "Qwen3-8B" / "config.json").read_text()),
        "Qwen3-4B": {**base, **QWEN3_4B},
        "DeepSeek-R1-Distill-Qwen-1.5B": {**qwen2, **R1, **R1_1_5B, "num_key_value_heads": 2},
        "DeepSeek-R1-Distill-Qwen-7B": {**qwen2, **R1, **R1_7B, "num_key_value_heads": 4, "vocab_size": 152064},
    }
    for name, config in configs.items():
        (tmp_path / "models" / name).mkdir(parents=True)
        (tmp_path / "models" / name / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_every_composition_is_planned(models, monkeypatch, capsys):
    monkeypatch.chdir(models)
    chosen = [one for one in COMPOSED if one[1] == "math" and one[3] == "renio"]
    assert len(chosen) == 10
    for one in chosen:
        assert main(["plan", str(composed(models, *one)), "--gpus", "4", "--memory", "80"]) in (0, DOES_NOT_FIT), one
        assert re.search(r"the largest rank needs [\d.]+ GiB of 80 GiB", capsys.readouterr().out)
