"""What teachers take of a rank's memory, offloaded or not, in a dtype of their own, or with an adapter merged."""

from __future__ import annotations

import gc
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from renio_megatron.config import ParallelConfig, TeacherConfig
from tests.helpers.resuming import error_of, train_config
from tests.helpers.training_cases import layout_of
from tests.megatron.lora_cases import peft_student
from tests.megatron.teacher_cases import LAYOUTS, STEPS, built, config_of

SP = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
NUM_LOOKS = 4


def live_bytes(but: Any = ()) -> int:
    """Memory of every tensor that stays alive on this rank, each once, without that of the tensors `but`.

    gloo's threads let go of a collective's tensors some time after the call has returned: in more than half of the
    calls they are alive for a moment, longer on a busy machine. What is there in all of a few looks stays.
    """
    looks = []
    for _ in range(NUM_LOOKS):
        looks.append(_bytes_now(but))
        time.sleep(0.02)
    return min(looks)


def _bytes_now(but: Any) -> int:
    gc.collect()
    storages = {}
    for one in gc.get_objects():
        if issubclass(type(one), torch.Tensor):
            storage = one.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    for one in but:
        del storages[one.untyped_storage().data_ptr()]
    return sum(storages.values())


def measured(folder: Path) -> dict[str, Any]:
    """Bytes that a teacher adds on this rank, between its passes and during one, beside those of its parameters."""
    found: dict[str, Any] = {}
    for layout, parallel in LAYOUTS.items():
        for kind in ("separate", "initial"):
            config = config_of(folder, "memory", kind, parallel=parallel, model=str(folder / "deep_tied"))
            for offload in (None, "host"):
                found[f"{kind}, {layout}, {offload}"] = _one(
                    replace(config, teacher=replace(config.teacher, offload=offload)), folder
                )
        for bf16 in (False, True):
            config = config_of(
                folder, "memory", "ema", parallel=parallel, train=train_config(train_iters=STEPS, bf16=bf16)
            )
            found[f"ema, {layout}, {'bf16' if bf16 else 'fp32'}"] = _one(config, folder)
    return found


def _one(config: Any, folder: Path) -> dict[str, Any]:
    from renio_megatron.runner.build_teachers import build_teacher
    from renio_megatron.runner.inputs import read_inputs

    trainer, inputs, layout = built(replace(config, teacher=TeacherConfig(kind="current")), folder)
    algorithm = trainer.algorithm
    rollouts = algorithm.sampler.sample(inputs.stream.batch(0, 8), algorithm._sampling_params, rng_stream=(1,))
    batches = algorithm.learner.make_micro_batches(rollouts)
    before = live_bytes()
    teacher = build_teacher(config, read_inputs(config), layout, algorithm.learner.part)
    weights = teacher.weights
    waiting = [host for _, host in getattr(weights, "_waiting", ())]
    named = list(weights.part.trained_parameters() if weights.averages else weights.part.named_parameters())
    found: dict[str, Any] = {
        "parameters": sum(one.numel() * one.element_size() for _, one in named),
        "entries": sum(one.numel() for _, one in named),
        "waiting": sum(one.numel() * one.element_size() for one in waiting),
        "at first": live_bytes(waiting) - before,
    }
    with weights.activated():
        found["during"] = live_bytes(waiting) - before
    teacher.score(rollouts, batches)
    found["between"] = live_bytes(waiting) - before
    scores = teacher.score(rollouts, batches)
    found["scores"] = [scores.logp, *scores.payload]
    return found


def own_dtype(folder: Path) -> dict[str, Any]:
    """Runs whose teacher has another dtype than the student."""
    found = {}
    for name, student, teacher in (("same", False, None), ("bf16 teacher", False, True), ("fp32 teacher", True, False)):
        config = config_of(folder, name, "separate", train=train_config(train_iters=2, bf16=student))
        config = replace(config, teacher=replace(config.teacher, bf16=teacher))
        trainer, _, _ = built(config, folder)
        score, seen = trainer.algorithm.teacher.score, []

        def look(*args: Any, score: Any = score, seen: Any = seen) -> Any:
            seen.append(score(*args))
            return seen[-1]

        trainer.algorithm.teacher.score = look
        metrics = trainer.run()
        found[name] = {
            "dtypes": (str(trainer.algorithm.learner.part.head().weight.dtype), str(seen[0].payload[0].dtype)),
            "loss": metrics["loss"],
            "logp": seen[0].logp,
        }
    return found


def merged(folder: Path) -> dict[str, Any]:
    """Weights of a teacher with an adapter beside those of the model into which PEFT merged it; refusals."""
    from renio_megatron.megatron.runtime.initialize import start
    from renio_megatron.runner.build_teachers import build_teacher
    from renio_megatron.runner.inputs import read_inputs

    found: dict[str, Any] = {}
    layouts = {"TP2 + SP": SP, "PP2": layout_of(1, 2), "TP1": layout_of()}
    for layout, parallel in layouts.items():
        for name in ADAPTERS:
            parts = []
            for teacher in (
                TeacherConfig(model=str(folder / "teacher"), adapter=str(folder / name)),
                TeacherConfig(model=str(folder / f"{name} merged")),
                TeacherConfig(model=str(folder / "teacher")),
            ):
                config = config_of(folder, "merged", "separate", parallel=parallel, teacher=teacher)
                built_layout = start(config.parallel, seed=1)
                parts.append(build_teacher(config, read_inputs(config), built_layout).weights.part)
            ours, theirs, plain = (dict(part.named_parameters()) for part in parts)
            found[f"{name}, {layout}"] = (
                max(float((ours[key] - value).abs().max()) for key, value in theirs.items()),
                max(float((plain[key] - value).abs().max()) for key, value in theirs.items()),
            )
    for name, model, adapter in (
        ("other model", "deep", "all"),
        ("nowhere", "teacher", "deep"),
        ("dora", "teacher", "dora"),
    ):
        teacher = TeacherConfig(model=str(folder / model), adapter=str(folder / adapter))
        found[name] = error_of(lambda t=teacher: read_inputs(config_of(folder, "x", "separate", teacher=t)))
    return found


ADAPTERS = {
    "all": {"r": 3, "alpha": 6.0},
    "some": {"r": 2, "alpha": 3.0, "use_rslora": True, "targets": ["v_proj", "q_proj", "up_proj", "down_proj"]},
}


def save_adapters(folder: Path) -> None:
    """Random adapters of the model `teacher`, by PEFT, and the models into which it merges them."""
    import json
    import shutil

    from renio_megatron.config import LoraConfig

    for name, settings in ADAPTERS.items():
        model = peft_student(str(folder / "teacher"), LoraConfig(**settings))
        generator = torch.Generator().manual_seed(len(name))
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(folder / name)
        shutil.copytree(folder / "teacher", folder / f"{name} merged")
        model.merge_and_unload().save_pretrained(folder / f"{name} merged")
    shutil.copytree(folder / "all", folder / "dora")
    path = folder / "dora" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": True}))
