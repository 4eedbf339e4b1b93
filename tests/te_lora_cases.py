"""What the ranks of tests/test_te_spec.py do with adapters: a student where `auto` chooses Transformer Engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from renio_megatron.settings import LoraConfig, PrecisionConfig
from tests import te_standin
from tests.resuming import error_of
from tests.te_cases import start_everything
from tests.training_cases import layout_of, recipe


def beside_adapters(root: Path) -> dict[str, Any]:
    """A step of a student with adapters and its teacher, built as on a GPU; the backends and the kinds of layers."""
    te_standin.install()
    from renio_megatron.build import build_student, build_trainer, read_inputs
    from renio_megatron.megatron import model

    real = model.resolve_backend
    model.resolve_backend = lambda precision, device, **given: real(precision, torch.device("cuda"), **given)
    config = recipe(root, parallel=layout_of(2, sp=True), lora=LoraConfig(r=2))
    config = replace(config, train=replace(config.train, bf16=True, train_iters=1))
    layout, inputs = start_everything(config.parallel), read_inputs(config)
    trainer = build_trainer(config, inputs, layout, root / "unused")
    trainer.save_interval = 0
    part = trainer.algorithm.learner.part
    metrics = trainer.run()
    asked = replace(config, precision=PrecisionConfig(backend="te"))
    return {
        "student": part.backend,
        "teacher": trainer.algorithm.teacher._part.backend,
        "kinds": {type(module).__name__ for chunk in part.chunks for module in chunk.modules()},
        "adapters": len(list(part.trained_parameters())),
        "grad_norm": metrics["grad_norm"],
        "without adapters": build_student(replace(config, lora=LoraConfig()), inputs, layout)[0].part.backend,
        "asked for te": error_of(lambda: build_student(asked, inputs, layout)),
    }
