"""Models with experts: read from Hugging Face's files and written back, checkpoints, fine-tuning, adapters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from renio_megatron.config import CheckpointConfig, EvaluateConfig, LoraConfig, ParallelConfig
from renio_megatron.types import Rollout
from tests.helpers.moe_reference import reference_step
from tests.helpers.resuming import run, run_config, train_config
from tests.helpers.training_cases import VOCAB_SIZE
from tests.megatron.moe_cases import CP2, EP2, OVERLAP, PP2, TP2_SP, Case, config_of

LAYOUTS = {
    "EP2": EP2,
    "TP2": {"tensor_model_parallel_size": 2},
    "TP2, whole experts": {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1},
    "PP2": PP2,
}
MOVES = {  # name: the layout that saves, the layout that goes on
    "EP2 -> EP1": (EP2, {}),
    "EP2 -> TP2 + SP": (EP2, TP2_SP),
    "PP2 -> TP2 + SP, EP2": (PP2, {**TP2_SP, **EP2, "expert_tensor_parallel_size": 1}),
    "distributed EP2 -> EP1": ({**EP2, **OVERLAP}, OVERLAP),
    "EP2 -> itself": (EP2, EP2),
}
STEPS, SAVED = 5, 3
SAVED_IN = ("EP2", "TP2")
TUNED = {"EP2": EP2, "CP2": CP2, "SP": TP2_SP}


def logits_in(layout_name: str, name: str, folder: Path) -> tuple[Any, int, int]:
    """(logits where they are made, bytes that the rank read, bytes of its parameters).

    In a layout of `SAVED_IN` a checkpoint of the weights is left, which `export_all` exports.
    """
    from renio_megatron.megatron.model.build import build_model
    from renio_megatron.megatron.runtime.initialize import start
    from renio_megatron.megatron.weights.hf import load_weights
    from renio_megatron.models.architecture import Architecture
    from tests.megatron.test_hf import logits_of, save_checkpoint

    architecture, parallel = Architecture.from_directory(folder / name), ParallelConfig(**LAYOUTS[layout_name])
    layout = start(parallel, seed=0)
    part = build_model(
        architecture, layout, parallel, train_config(), vocab_size=VOCAB_SIZE, trained=False, initialize=False
    )
    with torch.no_grad():
        for _, parameter in part.named_parameters():
            parameter.fill_(float("nan"))  # the memory may have held it
    num_bytes = load_weights(part, folder / name)
    part.train(False)
    own_bytes = sum(parameter.numel() * 4 for _, parameter in part.named_parameters())
    logits = logits_of(part, rows())
    if layout_name in SAVED_IN:
        trained = build_model(architecture, layout, parallel, train_config(), vocab_size=VOCAB_SIZE)
        load_weights(trained, folder / name)
        save_checkpoint(trained, folder / "exports" / f"{name}, {layout_name}", 1, None)
    return logits, num_bytes, own_bytes


def rows() -> list[list[int]]:
    """Token ids of every row."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist() for length in (7, 3, 12, 5, 9, 1)]


def fine_tune(layout_name: str, folder: Path) -> dict[str, float]:
    """Errors of a step whose denominator counts tokens."""
    from renio_megatron.config.schema import SftConfig
    from renio_megatron.megatron.runtime.initialize import start
    from renio_megatron.runner.build import build_trainer
    from renio_megatron.runner.inputs import read_inputs

    given = config_of(Case(TUNED[layout_name]), folder)
    config = SftConfig(
        model=given.model, data=given.data, parallel=given.parallel, train=given.train, output_dir=given.output_dir
    )
    layout, inputs = start(config.parallel, seed=7), read_inputs(config)
    trainer = build_trainer(config, inputs, layout, folder / "unused")
    trainer.save_interval = 0
    metrics = trainer.run()
    rollouts = [Rollout(prompt, prompt.completion_ids) for prompt in inputs.stream.batch(0, 8)]
    reference = reference_step(config, rollouts, per_token=True)
    values = {**reference["metrics"], "loss": reference["loss"], "grad_norm": reference["grad_norm"]}
    return {name: abs(metrics[name] - value) / max(abs(value), 1e-12) for name, value in values.items()}


def adapters_on_attention(folder: Path) -> dict[str, float]:
    """Errors of a step of adapters beside attention, the experts frozen and shared."""
    from renio_megatron.megatron.runtime.initialize import start
    from renio_megatron.runner.build import build_trainer
    from renio_megatron.runner.inputs import read_inputs
    from tests.megatron.lora_cases import peft_student, set_adapters, whole_adapters

    lora = LoraConfig(r=3, alpha=6.0, targets=["q_proj", "k_proj", "v_proj", "o_proj"])
    config = replace(config_of(Case(EP2), folder), lora=lora)
    layout = start(config.parallel, seed=7)
    trainer = build_trainer(config, read_inputs(config), layout, folder / "unused")
    trainer.save_interval = 0
    student, seen = peft_student(config.model, lora), {}
    set_adapters(trainer.algorithm.learner, whole_adapters(student))
    sample = trainer.algorithm.sampler.sample
    trainer.algorithm.sampler.sample = lambda *args, **kwargs: seen.setdefault("mine", sample(*args, **kwargs))
    metrics = trainer.run()
    shares: list[Any] = [None] * layout.data.size
    dist.all_gather_object(shares, seen["mine"], group=layout.data.group)
    rollouts = sorted((one for share in shares for one in share), key=lambda one: one.prompt.index)
    reference = reference_step(config, rollouts, student=student)
    values = {**reference["metrics"], "loss": reference["loss"], "grad_norm": reference["grad_norm"]}
    return {name: abs(metrics[name] - value) / max(abs(value), 1e-12) for name, value in values.items()}


def uneven_sampling(folder: Path) -> dict[str, Any]:
    """Completions of three prompts, one at a time, of which each rank has as many as its key says."""
    from renio_megatron.megatron.runtime.initialize import start
    from renio_megatron.runner.build import build_student, sampling_params_of
    from renio_megatron.runner.inputs import read_inputs

    found = {}
    for name, parallel in (("EP1", {}), ("EP2", EP2)):
        config = config_of(Case(parallel), folder)
        layout, inputs = start(config.parallel, seed=7), read_inputs(config)
        _, sampler = build_student(config, inputs, layout)
        prompts = inputs.stream.batch(0, 3)
        sampling_params = replace(sampling_params_of(config), micro_batch_size=1)
        for share in ((3, 0), (0, 3), (1, 2)):
            mine = prompts[: share[0]] if layout.data.is_first else prompts[3 - share[1] :]
            own = sampler.sample(mine, sampling_params, rng_stream=(1,))
            found[name, share] = {rollout.prompt.index: rollout.completion_ids for rollout in own}
    return found


def whole(name: str, folder: Path) -> dict[str, Any]:
    """A run in one layout: "whole", or "whole EP2"."""
    return run(_moved(name, EP2 if name.endswith("EP2") else {}, folder))


def move(name: str, folder: Path) -> dict[str, Any]:
    """Some steps in one layout, the rest in the other."""
    first, second = MOVES[name]
    assert run(_moved(name, first, folder), stop_before=SAVED + 2)["outcome"] == "stopped"
    return run(_moved(name, second, folder))


def _moved(name: str, parallel: dict[str, Any], folder: Path) -> Any:
    """The evaluation has one problem: a rank that shares its experts has none of its own."""
    return run_config(
        folder,
        name,
        model=str(folder / "qwen"),
        parallel=ParallelConfig(**parallel),
        train=train_config(train_iters=STEPS, lr=1e-3, micro_batch_size=2, moe_aux_loss_coeff=0.1),
        checkpoint=CheckpointConfig(save_interval=SAVED),
        evaluate=EvaluateConfig(every=SAVED, samples=1),
    )


def export_all(folder: Path) -> list[str]:
    """Exports the checkpoints of `logits_in`, on one rank; their names."""
    from renio_megatron.megatron.runtime.initialize import start
    from renio_megatron.runner.export import export_checkpoint

    names = sorted(path.name for path in (folder / "exports").iterdir())
    try:
        for name in names:
            export_checkpoint(folder / "exports" / name, folder / "exported" / name, None)
    finally:
        start(ParallelConfig(), seed=0)  # an export leaves the world; the launcher wants to end in it
    return names
