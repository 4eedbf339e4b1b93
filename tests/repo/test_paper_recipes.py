"""The paper's recipes: every composition of their parts can be planned, and has the values of the published scripts."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from renio_megatron.cli.main import main
from renio_megatron.cli.plan import DOES_NOT_FIT
from renio_megatron.config.load import check_world, load_recipe
from renio_megatron.config.resolved import resolved_yaml
from tests.data.test_prompts import characters
from tests.helpers.character_models import save_character_model, save_successor_model
from tests.helpers.multiprocess import Ranks
from tests.helpers.paths import ROOT
from tests.helpers.training_cases import trainer_of
from tests.helpers.warned import messages_of

PAPER = ROOT / "examples" / "paper"
PARTS = PAPER / "parts"
STUDENTS = ("qwen3-1.7b", "qwen3-4b", "qwen3-8b", "r1-distill-qwen-1.5b", "r1-distill-qwen-7b")
TASKS = ("math", "math-without-solution", "code", "code-without-solution")
COMPOSED = [
    *itertools.product(("opd",), TASKS, STUDENTS, ("renio", "uniform")),
    *itertools.product(("opsd",), ("math", "code"), STUDENTS, ("renio", "uniform")),
]
NAMES = ["-".join(one) for one in COMPOSED]
TEACHERS = {
    "qwen3-1.7b": "Qwen3-8B",
    "qwen3-4b": "Qwen3-8B",
    "qwen3-8b": "Qwen3-32B",
    "r1-distill-qwen-1.5b": "DeepSeek-R1-Distill-Qwen-7B",
    "r1-distill-qwen-7b": "DeepSeek-R1-Distill-Qwen-32B",
}
"""A student's separate teacher: of its family, and another model. That of opd.yaml, or of a part teacher-*.yaml."""

# By hand from the scripts: lr, steps, batch x accumulation x processes, clips of gradients and of entries, group.
SCRIPTS: dict[str, tuple[Any, ...]] = {
    "qwen3-1.7b": (5e-6, 126, (8, 1, 4), 1.0, 0.05, 8),
    "qwen3-4b": (5e-6, 126, (4, 2, 4), 0.1, 0.05, 4),
    "qwen3-8b": (5e-6, 126, (2, 4, 4), 0.1, 0.06, 2),
    "r1-distill-qwen-1.5b": (5e-6, 126, (8, 1, 4), 1.0, 0.05, 8),  # borrowed
    "r1-distill-qwen-7b": (5e-6, 126, (2, 4, 4), 0.1, 0.06, 2),
}


def parts_of(algorithm: str, task: str, student: str, weighting: str) -> list[str]:
    teacher = TEACHERS[student].lower().removeprefix("deepseek-")
    others = [f"teacher-{teacher}"] if algorithm == "opd" and teacher != "qwen3-8b" else []
    return [algorithm, *others, task, weighting, student]


def composed(folder: Path, algorithm: str, task: str, student: str, weighting: str) -> Path:
    path = folder / "composed.yaml"
    names = [str(PARTS / f"{name}.yaml") for name in parts_of(algorithm, task, student, weighting)]
    path.write_text(yaml.safe_dump({"base": names, "output_dir": "run"}))
    return path


@pytest.mark.parametrize(("algorithm", "task", "student", "weighting"), COMPOSED, ids=NAMES)
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
    assert config.teacher.model == {"opd": f"models/{TEACHERS[student]}", "opsd": None}[algorithm] != config.model
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
    assert (config.lora.r, config.lora.alpha, config.lora.dropout) == (64, 128, 0.05)
    assert config.checkpoint.save_interval == 20
    assert config.learns_prompts and (config.max_length, config.data.overlong) == (16000, "skip")
    assert config.data.student_template.startswith("{problem}\n\n")


@pytest.mark.parametrize("path", sorted(PAPER.glob("*.yaml")), ids=lambda path: path.stem)
def test_each_that_ships_is_one_of_the_compositions(path):
    written = yaml.safe_load(path.read_text())
    assert written["output_dir"] == f"runs/paper/{path.stem}"
    names = [Path(name).stem for name in written["base"]] if isinstance(written["base"], list) else []
    algorithm, *_, task, weighting, student = names or ("sft", "math", "", "qwen3-1.7b")
    if names:
        assert (algorithm, task, student, weighting) in COMPOSED
        assert names == parts_of(algorithm, task, student, weighting)
    assert path.stem == f"{algorithm}-{student}-{task}{'-uniform' * (weighting == 'uniform')}"


@pytest.mark.parametrize("part", sorted(PARTS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_value_has_its_origin(part):
    """A line with a value ends with where it is from, or stands in a file whose head says so of all."""
    lines = part.read_text().splitlines()
    assert lines[0].startswith("# ")
    told_at_the_top = part.stem in ("uniform", *STUDENTS, *(task for task in TASKS if task.endswith("solution")))
    told_at_the_top |= part.stem.startswith("teacher-")
    if told_at_the_top:
        assert re.search(r"script|\[ours\]|[Bb]orrowed|collator", "".join(line for line in lines if line[0] == "#"))
    whole = {"source", "path", "recompute_method", "recompute_num_layers", "name", "answer_key", "teacher_view", "base"}
    for line in lines:
        key, colon, value = line.split("#")[0].partition(":")
        if colon and value.strip() and key.strip() not in whole and not told_at_the_top:
            assert "#" in line or "teacher:" in line, line


QWEN3_4B = {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32}
R1_1_5B = {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12}
R1_7B = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
R1_32B = {"hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64, "num_attention_heads": 40}
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
        "DeepSeek-R1-Distill-Qwen-32B": {**qwen2, **R1, **R1_32B, "num_key_value_heads": 8, "vocab_size": 152064},
        "Qwen3-32B": json.loads((reference / "Qwen3-32B" / "config.json").read_text()),
    }
    for name, config in configs.items():
        (tmp_path / "models" / name).mkdir(parents=True)
        (tmp_path / "models" / name / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_every_composition_is_planned(models, monkeypatch, capsys):
    """Those whose models fit in one GPU of 80 GB each fit; of a teacher of 32 billion parameters the plan says so."""
    monkeypatch.chdir(models)
    for one in (each for each in COMPOSED if each[3] == "renio"):  # weights take no memory
        code = main(["plan", str(composed(models, *one)), "--gpus", "4", "--memory", "80"])
        is_large = one[0] == "opd" and "32B" in TEACHERS[one[2]]
        assert code == (DOES_NOT_FIT if is_large else 0), one
        assert re.search(r"the largest rank needs [\d.]+ GiB of 80 GiB", capsys.readouterr().out)


# two steps of each, on the CPU

TEMPLATE = (
    "{% for m in messages %}<u>{{ m.content }}</u>{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
)
WITHOUT_THINKING = (
    "{% for m in messages %}<u>{{ m.content }}</u>{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
ROWS = [{"problem": f"{n} + {n}?", "solution": f"Twice {n}.", "Answer": f"{2 * n}"} for n in range(1, 7)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Students and a teacher whose tokens are characters, with both kinds of chat template; and a few records."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for seed, (name, template) in enumerate(
        (("qwen", TEMPLATE), ("qwen-teacher", TEMPLATE), ("r1", WITHOUT_THINKING), ("r1-teacher", WITHOUT_THINKING))
    ):
        save_character_model(folder / name, characters(chat=template), seed=seed)
    return folder


@pytest.fixture(scope="module")
def one_rank():
    with Ranks(1) as ranks:
        yield ranks


def _two_steps(kind: str, path: str, overrides: list[str]) -> tuple[list[dict[str, float]], list[str]]:
    """Metrics of the steps, and the warnings of canaries."""
    config = load_recipe(kind, path, overrides).config
    rows: list[dict[str, float]] = []
    with messages_of("renio_megatron.training.canaries") as told:
        trainer = trainer_of(config, Path(path).parent)
        trainer.observers = (lambda step, metrics: rows.append(dict(metrics)),)
        trainer.run()
        trainer.algorithm.close()
    return rows, told


def overrides_of(tiny: Path, model: str, **more: str) -> list[str]:
    """Models, data, lengths, batch and precision; parallel sizes are 1 in every recipe."""
    settings = {
        "model": str(tiny / model),
        "data.source": "jsonl",
        "data.path": str(tiny / "rows.jsonl"),
        "train.train_iters": "2",
        "train.global_batch_size": "4",
        "train.micro_batch_size": "2",
        "train.bf16": "false",
        **more,
    }
    return [f"{key}={value}" for key, value in settings.items()]


@pytest.mark.slow
@pytest.mark.parametrize(("algorithm", "task", "student", "weighting"), COMPOSED, ids=NAMES)
def test_every_composition_trains(tmp_path, tiny, one_rank, algorithm, task, student, weighting):
    model = "r1" if student.startswith("r1") else "qwen"
    more = {"rollout.max_completion_length": "8"} | (
        {"teacher.model": str(tiny / f"{model}-teacher")} if algorithm == "opd" else {}
    )
    path = composed(tmp_path, algorithm, task, student, weighting)
    ((rows, told),) = one_rank(_two_steps, "train", str(path), overrides_of(tiny, model, **more))
    assert not told
    assert [row["step"] for row in rows] == [1, 2]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert rows[0]["loss"] > 0 and rows[0]["grad_norm"] > 0 and rows[0]["lr"] == 5e-6 > rows[1]["lr"]


THOUGHT = (
    "{% for m in messages %}<|u|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|a|>"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>\n\n{% endif %}{% endif %}"
)
"""As Qwen3's: a thought is the model's own to begin, or is closed before it begins."""
FOLLOWERS = {"<|a|>": "<", "<": "t", "\n": "0123456789", **dict.fromkeys("0123456789", "0123456789")}
"""A model that begins a thought behind the header, and an answer behind a closed one."""


@pytest.mark.slow
@pytest.mark.parametrize(("algorithm", "task"), [one[:2] for one in COMPOSED if one[2:] == ("qwen3-1.7b", "renio")])
def test_a_teacher_that_thinks_beside_a_student_that_does_not_is_told(tmp_path, tiny, one_rank, algorithm, task):
    for name in ("thinks", "teacher-thinks"):
        save_successor_model(tmp_path / name, characters(chat=THOUGHT), FOLLOWERS)
    model, teacher = (str(tmp_path / name) for name in ("thinks", "teacher-thinks"))
    more = {"rollout.max_completion_length": "8"} | ({"teacher.model": teacher} if algorithm == "opd" else {})
    path = composed(tmp_path, algorithm, task, "qwen3-1.7b", "renio")
    overrides = overrides_of(tiny, model, **more)
    ((_, told),) = one_rank(_two_steps, "train", str(path), overrides)
    if task.endswith("without-solution"):  # both begin a thought
        assert told == []
        return
    (boundary,) = told
    assert boundary.startswith("the first step, boundary: a completion's first token has ")
    assert "which expects something else there" in boundary and "data.teacher_enable_thinking=false" in boundary
    ((_, told),) = one_rank(_two_steps, "train", str(path), [*overrides, "data.teacher_enable_thinking=false"])
    assert told == []


@pytest.mark.slow
def test_fine_tuning_trains(tmp_path, tiny, one_rank):
    path = tmp_path / "sft.yaml"
    path.write_text(yaml.safe_dump({"base": str(PAPER / "sft-qwen3-1.7b-math.yaml"), "output_dir": "run"}))
    ((rows, _),) = one_rank(_two_steps, "sft", str(path), overrides_of(tiny, "qwen"))
    assert [row["step"] for row in rows] == [1, 2] and rows[0]["grad_norm"] > 0
    assert rows[0]["rollout/tokens"] > 4 * len("Work through it step by step"), "the prompts are learned, too"
