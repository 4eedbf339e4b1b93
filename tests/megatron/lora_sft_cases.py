"""Fine-tuning of a student with adapters on two ranks: against PEFT's cross-entropy, and with overlapped gathers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from renio_megatron.config import LoraConfig
from tests.megatron.layout_cases import small_buckets
from tests.megatron.lora_cases import FULL, OVERLAP, TP2_SP, Case, config_of, peft_student, set_adapters, whole_adapters


def run_sft(lora: LoraConfig, folder: Path) -> dict[str, float]:
    """A step of fine-tuning a tied student on two tensor ranks: its loss and gradients against PEFT's cross-entropy."""
    from renio_megatron.megatron.runtime.initialize import start
    from renio_megatron.runner.build import build_trainer
    from renio_megatron.runner.inputs import read_inputs

    config = sft_config(Case(TP2_SP, FULL, lora, tied=True), folder)
    layout, inputs = start(config.parallel, seed=7), read_inputs(config)
    trainer = build_trainer(config, inputs, layout, folder / "unused")
    dropped: dict[str, Any] | None = {} if lora.dropout else None
    learner, student = trainer.algorithm.learner, peft_student(config.model, config.lora, dropped=dropped)
    whole = whole_adapters(student)
    set_adapters(learner, whole)
    prompts = inputs.stream.batch(0, 8)
    trainer.save_interval = 0
    metrics = trainer.run()
    total, count = torch.zeros(()), 0
    for prompt in prompts:
        ids = torch.tensor([prompt.student_ids + prompt.completion_ids])
        if dropped is not None:
            dropped["number"] = prompt.index
        logits = student(ids).logits[0, len(prompt.student_ids) - 1 : -1]
        total = total + torch.nn.functional.cross_entropy(logits, ids[0, len(prompt.student_ids) :], reduction="sum")
        count += len(prompt.completion_ids)
    (total / count).backward()
    norm = float(torch.stack([parameter.grad.norm() for parameter in whole.values()]).norm())
    return {
        "loss": abs(metrics["loss"] - float(total.detach()) / count),
        "grad_norm": abs(metrics["grad_norm"] - norm) / norm,
    }


def sft_config(case: Case, folder: Path) -> Any:
    """The recipe of a case, for fine-tuning."""
    from renio_megatron.config.schema import SftConfig

    given = config_of(case, folder)
    return SftConfig(
        model=given.model,
        data=given.data,
        parallel=given.parallel,
        train=given.train,
        lora=given.lora,
        output_dir=given.output_dir,
    )


def run_overlap(folder: Path) -> dict[str, float]:
    """Three steps of fine-tuning with gathers under way in the forward pass: adapters against those without overlap.

    Fine-tuning, because nothing else between two steps asks for the weights. `not called`: the same where the module
    that holds the adapters is passed by, whose hook waits for them.
    """
    from renio_megatron.megatron.model.lora import Adapters

    expected = _three_steps({}, folder)
    overlap = _three_steps(OVERLAP, folder)
    Adapters.__call__ = lambda self, *inputs: self.forward(*inputs)  # type: ignore[method-assign]
    try:
        passed_by = _three_steps(OVERLAP, folder)
    finally:
        del Adapters.__call__
    return {
        name: max(float((found[key] - value).abs().max()) for key, value in expected.items())
        for name, found in (("overlap", overlap), ("not called", passed_by))
    }


def _three_steps(parallel: dict[str, Any], folder: Path) -> dict[str, torch.Tensor]:
    from renio_megatron.megatron.runtime.initialize import start
    from renio_megatron.runner.build import build_trainer
    from renio_megatron.runner.inputs import read_inputs

    config = sft_config(Case(parallel, {"train_iters": 3, "lr": 1e-2}), folder)
    layout = start(config.parallel, seed=7)
    with small_buckets():
        trainer = build_trainer(config, read_inputs(config), layout, folder / "unused")
    trainer.save_interval = 0
    trainer.run()
    part = trainer.algorithm.learner.part
    part.sync_params()
    return {name: parameter.detach().clone() for name, parameter in part.trained_parameters()}
