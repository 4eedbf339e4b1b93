"""The section `teacher` of a recipe: kinds, what belongs to each, what is refused; a step that was left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from renio_megatron.config.load import load_recipe
from renio_megatron.config.resume import is_changeable
from renio_megatron.errors import ConfigError
from tests.training.test_trainer import PROMPTS, Roles

VIEW = "data: {teacher_template: '{problem}{solution}'}\n"
FP8 = ["precision={fp8: e4m3, backend: te, fp8_param_gather: true}", "train.bf16=true"]


def load(tmp_path: Path, kind: str, *overrides: str, view: str = VIEW) -> Any:
    model = ", model: teacher" if kind == "separate" else ""
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model: student\noutput_dir: runs/a\nteacher: {{kind: {kind}{model}}}\n{view}")
    return load_recipe("train", path, overrides).config


@pytest.mark.parametrize(
    ("kind", "overrides", "shares"),
    [
        ("separate", [], False),
        ("separate", ["lora.r=4", "teacher.adapter=a", "teacher.offload=host", "teacher.bf16=true"], False),
        ("initial", ["teacher.offload=host", "teacher.bf16=true", "teacher.payload_device=host"], False),
        ("initial", ["lora.r=4"], True),
        ("ema", ["teacher.ema_decay=0.5"], True),
        ("ema", ["lora.r=4", "lora.adapter=a"], True),
        ("current", ["lora.r=4", "lora.adapter=a", "teacher.payload_device=host"], True),
    ],
)
def test_what_can_be_asked_of_a_kind(kind, overrides, shares, tmp_path):
    config = load(tmp_path, kind, *overrides)
    assert config.teacher.kind == kind
    assert config.teachers[0].shares_student == shares


def test_the_average_moves_slowly_by_default(tmp_path):
    assert load(tmp_path, "ema").teacher.ema_decay == 0.999
    assert is_changeable("teacher.offload")
    assert not is_changeable("teacher.ema_decay")


OWN = "the teacher is the student's own modules"


@pytest.mark.parametrize(
    ("kind", "overrides", "words"),
    [
        ("self", [], ["teacher.kind=self is called initial now", "Set teacher.kind=initial"]),
        ("frozen", [], ["teacher.kind", "'frozen'", "separate, initial, ema, current"]),
        ("ema", ["teacher.ema_decay=1.0"], ["teacher.ema_decay must lie in (0, 1); got 1.0", "kind=initial"]),
        ("ema", ["teacher.ema_decay=0"], ["teacher.ema_decay must lie in (0, 1)", "kind=current"]),
        ("current", ["teacher.ema_decay=0.9"], ["teacher.ema_decay is set but would be ignored", "not ema"]),
        ("initial", ["teacher.model=b"], ["teacher.model is set but would be ignored"]),
        ("ema", ["teacher.adapter=b"], ["teacher.adapter is set but would be ignored"]),
        ("ema", ["teacher.offload=host"], ["teacher.offload is set but would be ignored", OWN]),
        ("current", ["teacher.bf16=true"], ["teacher.bf16 is set but would be ignored", OWN]),
        ("initial", ["lora.r=4", "teacher.offload=host"], ["teacher.offload is set but would be ignored", OWN]),
        ("ema", ["teacher_precision.backend=local"], ["teacher_precision.backend is set but would be ignored", OWN]),
        ("current", ["teacher_precision.fp8=e4m3"], ["teacher_precision.fp8 is set but would be ignored", OWN]),
        ("ema", ["teacher.payload_device=recompute"], ["teacher.kind=ema", "one model", "Choose host"]),
        ("current", ["teacher.payload_device=recompute"], ["teacher.kind=current", "one model", "Choose host"]),
        ("ema", [*FP8, "parallel.use_distributed_optimizer=true"], ["teacher.kind=ema", "fp8_param_gather=false"]),
        ("separate", ["teacher.offload=disk"], ["teacher.offload", "host"]),
        ("separate", ["teacher.offload=host", "teacher.payload_device=recompute"], ["for every micro-batch"]),
        (
            "separate",
            ["teacher.offload=host", "teacher_precision={fp8: e4m3, backend: te}", "train.bf16=true"],
            ["teacher.offload=host", "teacher_precision.fp8=e4m3"],
        ),
        (
            "separate",
            ["teacher.bf16=false", "teacher_precision={fp8: e4m3, backend: te}", "train.bf16=true"],
            ["teacher_precision.fp8=e4m3 with teacher.bf16=false", "Set teacher.bf16=true"],
        ),
        (
            "separate",
            ["teacher.bf16=false", "train.bf16=true", "head.logits_dtype=bf16"],
            ["head.logits_dtype=bf16 with teacher.bf16=false"],
        ),
    ],
)
def test_mistakes_are_named(kind, overrides, words, tmp_path):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, kind, *overrides)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("kind", ["initial", "ema", "current"])
def test_a_teacher_that_is_the_student_needs_a_view_of_its_own(kind, tmp_path):
    with pytest.raises(ConfigError, match=rf"teacher\.kind={kind} with the student's own view"):
        load(tmp_path, kind, view="")


def test_the_teacher_is_told_of_a_step_that_was_left_out():
    roles = Roles()
    algorithm = roles.distillation()
    algorithm.learner.update = lambda *args, **kwargs: {"train/skipped_frac": 1.0, "lr": 0.1}
    algorithm.step(PROMPTS, 7)
    assert roles.asked[-1] == {"skipped": True}
