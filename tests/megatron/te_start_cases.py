"""What the ranks of test_te_spec.py start from: adapters where `auto` chooses Transformer Engine, checkpoints."""

from __future__ import annotations

import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from renio_megatron.config import LoraConfig, ParallelConfig, PrecisionConfig, TrainConfig
from tests.fakes import te_standin
from tests.helpers.resuming import error_of
from tests.helpers.training_cases import layout_of, recipe
from tests.helpers.warned import messages_of
from tests.megatron.te_cases import FP8, TE, build, initial_values_are_loaded, start_everything


def run_all(root: Path) -> dict[str, Any]:
    """All of it."""
    te_standin.install()
    return {"attention": warnings_of_attention(root), "checkpoint": from_a_checkpoint(root), **beside_adapters(root)}


def warnings_of_attention(root: Path) -> list[int]:
    """Warnings of two steps each: attention that is fused, that is not, and of Megatron's own layers."""
    from tests.megatron.te_cases import LOCAL, step_of

    parallel, train = ParallelConfig(tensor_model_parallel_size=2), TrainConfig(micro_batch_size=2)
    layout, counts = start_everything(parallel), []
    chosen = types.ModuleType("transformer_engine.pytorch.attention.choice")
    sys.modules[chosen.__name__] = chosen
    for is_slow, precision in ((False, TE), (True, TE), (True, LOCAL)):
        chosen._attention_backends = {"use_unfused_attention": is_slow, "use_fused_attention": not is_slow}
        part = build(root / "qwen3", layout, parallel, precision, train)
        with messages_of("renio_megatron.megatron.student.learner") as said:
            step_of(part, train, parallel, steps=2)
        counts.append(sum("without a fused kernel" in message for message in said))
    del sys.modules[chosen.__name__]
    return counts if layout.is_main else [*counts, "not the main rank"]


def from_a_checkpoint(root: Path) -> dict[str, Any]:
    """A student whose weights are kept in FP8, from a checkpoint of Megatron and from Hugging Face's files.

    Whether both have the same values, and the number of values that the optimiser begins with, and whether they are
    the checkpoint's.
    """
    import torch.distributed as dist
    from megatron.core import dist_checkpointing

    from renio_megatron.megatron.checkpoint.sharded_state import sharded_model
    from renio_megatron.megatron.model.build import build_model
    from renio_megatron.megatron.model.te_modules import values_of
    from renio_megatron.megatron.runtime.mcore_compat import own_writer
    from renio_megatron.megatron.weights.pretrained import load_pretrained
    from renio_megatron.models.architecture import Architecture
    from tests.megatron.te_cases import VOCAB

    parallel, train = ParallelConfig(tensor_model_parallel_size=2), TrainConfig(micro_batch_size=2)
    layout = start_everything(parallel)
    exact = build(root / "qwen3", layout, parallel, TE, train)
    target = root / "written"
    if layout.is_main:
        target.mkdir()
    dist.barrier()
    dist_checkpointing.save({"model": sharded_model(exact, {})}, str(target), **own_writer())
    gathered = replace(FP8, fp8_param_gather=True)
    expected = dict(build(root / "qwen3", layout, parallel, gathered, train).named_parameters())
    architecture = Architecture.from_directory(root / "qwen3")
    part = build_model(architecture, layout, parallel, train, gathered, vocab_size=VOCAB)
    load_pretrained(part, target)
    same = [torch.equal(values_of(value), values_of(expected[name])) for name, value in part.named_parameters()]
    return {"same": all(same), "number": len(same), "initial": initial_values_are_loaded(part, exact)}


def beside_adapters(root: Path) -> dict[str, Any]:
    """A step of a student with adapters and its teacher, built as on a GPU; the backends and the kinds of layers."""
    from renio_megatron.megatron.model import build
    from renio_megatron.runner.build import build_student, build_trainer
    from renio_megatron.runner.inputs import read_inputs

    real = build.resolve_backend
    build.resolve_backend = lambda precision, device, **given: real(precision, torch.device("cuda"), **given)
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
