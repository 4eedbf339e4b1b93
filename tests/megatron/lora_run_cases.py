"""Runs of a student with adapters: stopped and gone on with, taken over, exported, imported; its own teacher."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from renio_megatron.config import CheckpointConfig, DataConfig, LoraConfig, ParallelConfig, TeacherConfig
from renio_megatron.megatron.checkpoint.directory import step_directory
from tests.helpers.resuming import error_of, run, run_config, train_config
from tests.helpers.training_cases import layout_of

LORA = LoraConfig(r=3, alpha=6.0, dropout=0.1)
TP2_SP = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
DISTRIBUTED = ParallelConfig(use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True)


def config_of(folder: Path, name: str, **changes: Any) -> Any:
    """Five steps of a student with adapters; `changes` replace sections."""
    return run_config(folder, name, **{"lora": LORA, "parallel": TP2_SP, "model": str(folder / "deep"), **changes})


LAYOUTS = {"whole": TP2_SP, "distributed": DISTRIBUTED}


def run_whole(name: str, folder: Path) -> dict[str, Any]:
    """A run in one of `LAYOUTS`."""
    return run(config_of(folder, name, parallel=LAYOUTS[name]))


def run_cut_off(name: str, folder: Path) -> dict[str, Any]:
    """The same, stopped and gone on with."""
    config = config_of(folder, f"{name}, cut off", parallel=LAYOUTS[name])
    run(config, stop_before=4)
    return run(config)


def run_moved(folder: Path) -> dict[str, Any]:
    """A run that goes on in another layout, with recomputation."""
    train = train_config(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    config = config_of(folder, "moved", train=train)
    run(config, stop_before=4)
    return run(replace(config, parallel=layout_of(1, 2)))


def refused(folder: Path) -> dict[str, str]:
    adapters = CheckpointConfig(load=str(step_directory(folder / "whole" / "checkpoints", 2)))
    other = replace(LORA, r=2)
    messages = {
        "other rank": error_of(lambda: run(config_of(folder, "other rank", lora=other, checkpoint=adapters))),
        "no adapters": error_of(lambda: run(config_of(folder, "none", lora=LoraConfig(), checkpoint=adapters))),
    }
    messages["other base"] = _other_base(folder)
    run(config_of(folder, "dense", lora=LoraConfig()), stop_before=4)
    dense = CheckpointConfig(load=str(step_directory(folder / "dense" / "checkpoints", 2)))
    messages["whole model"] = error_of(lambda: run(config_of(folder, "of dense", checkpoint=dense)))
    return messages


def _other_base(folder: Path) -> str:
    """What a run says that is gone on with, after one number of one norm of the frozen model has changed."""
    model = folder / "base"
    if dist.get_rank() == 0:
        shutil.copytree(folder / "deep", model)
    dist.barrier()
    config = config_of(folder, "based", model=str(model))
    run(config, stop_before=4)
    dist.barrier()
    if dist.get_rank() == 0:
        weights = load_file(model / "model.safetensors")
        weights["model.layers.2.input_layernorm.weight"][5] += 0.25
        save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    dist.barrier()
    return error_of(lambda: run(config))


def self_teacher(folder: Path) -> dict[str, Any]:
    """Scores of the teacher that is the student without adapters, beside those of a second copy of the weights."""
    from renio_megatron.megatron.runtime.initialize import start
    from renio_megatron.runner.build import build_trainer
    from renio_megatron.runner.build_teachers import build_teacher
    from renio_megatron.runner.inputs import read_inputs

    config = config_of(
        folder,
        "self",
        teacher=TeacherConfig(kind="initial"),
        data=DataConfig(seed=5, teacher_template="{problem}{solution}"),
        lora=replace(LORA, alpha=60.0),
    )
    layout = start(config.parallel, seed=1)
    inputs = read_inputs(config)
    trainer = build_trainer(config, inputs, layout, folder / "self" / "checkpoints")
    algorithm, part = trainer.algorithm, trainer.algorithm.learner.part
    copy = build_teacher(config, inputs, layout)
    errors, seen = [], []
    score = algorithm.teacher.score

    def score_both(rollouts: Any, batches: Any) -> Any:
        mine, expected = score(rollouts, batches), copy.score(rollouts, batches)
        errors.append(float((mine.logp - expected.logp).abs().max()))
        errors.extend(float((a - b).abs().max()) for a, b in zip(mine.payload, expected.payload, strict=True))
        seen.append(float((algorithm.learner.score(batches)["student_logp"] - expected.logp).abs().max()))
        return mine

    algorithm.teacher.score = score_both
    trainer.save_interval = 0
    trainer.run()
    return {
        "is the student": algorithm.teacher._part is part and copy._part is not part,
        "errors": errors,
        "student differs": seen,
        "trained": sorted({name.rsplit(".", 1)[1] for name, _ in part.trained_parameters()}),
        "steps": trainer.step,
    }


def exported(folder: Path, prompts: list[list[int]]) -> dict[str, Any]:
    """The run `whole` exported both ways, what the adapter generates in PEFT and the merged model in transformers."""
    import peft
    from megatron.core import parallel_state
    from transformers import AutoModelForCausalLM

    from renio_megatron.runner import export

    # This rank's process group is still needed; Megatron's groups go, as they do in a process of its own.
    export.stop = parallel_state.destroy_model_parallel  # type: ignore[assignment]
    export.export_checkpoint(folder / "whole", folder / "adapter", None)
    export.export_checkpoint(folder / "whole", folder / "merged", None, merge=True)
    base = AutoModelForCausalLM.from_pretrained(folder / "deep", dtype=torch.float32)
    models = {
        "base": AutoModelForCausalLM.from_pretrained(folder / "deep", dtype=torch.float32),
        "adapter": peft.PeftModel.from_pretrained(base, folder / "adapter"),
        "merged": AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32),
    }
    tokens, logits = {}, {}
    for name, model in models.items():
        with torch.no_grad():
            logits[name] = [model(torch.tensor([ids])).logits[0] for ids in prompts]
            tokens[name] = [_greedy(model, ids) for ids in prompts]
    return {
        "files": {name: sorted(p.name for p in (folder / name).iterdir()) for name in ("adapter", "merged")},
        "tokens": tokens,
        "merged logits": max(
            float((a - b).abs().max()) for a, b in zip(logits["adapter"], logits["merged"], strict=True)
        ),
        "change": max(float((a - b).abs().max()) for a, b in zip(logits["adapter"], logits["base"], strict=True)),
        "other base": {
            merge: error_of(
                lambda merge=merge: export.export_checkpoint(folder / "based", folder / "y", None, merge=merge)
            )
            for merge in (False, True)
        },
        "not merged": error_of(lambda: export.export_checkpoint(folder / "dense", folder / "x", None, merge=True)),
    }


def generated(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    """What PEFT generates with the exported adapter."""
    import peft
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder / "deep", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, folder / "adapter")
    return [_greedy(model, ids) for ids in prompts]


def _greedy(model: Any, ids: list[int]) -> list[int]:
    """Six tokens, whatever they are."""
    with torch.no_grad():
        return model.generate(
            input_ids=torch.tensor([ids]), do_sample=False, max_new_tokens=6, min_new_tokens=None, eos_token_id=None
        )[0, len(ids) :].tolist()


def imported(folder: Path) -> dict[str, Any]:
    """A run that starts from the exported adapter: its adapters, and the greedy tokens that its sampler draws."""
    from renio_megatron.megatron.runtime.initialize import start
    from renio_megatron.runner.build import build_trainer
    from renio_megatron.runner.inputs import read_inputs
    from renio_megatron.types import SamplingParams

    found: dict[str, Any] = {}
    directory = str(folder / "adapter")
    for name, parallel in (("TP2 + SP", TP2_SP), ("PP2", layout_of(1, 2))):
        config = config_of(folder, "imported", parallel=parallel, lora=replace(LORA, adapter=directory))
        layout = start(config.parallel, seed=1)
        inputs = read_inputs(config)
        trainer = build_trainer(config, inputs, layout, folder / "unused")
        prompts = inputs.stream.batch(0, 4)
        rollouts = trainer.algorithm.sampler.sample(prompts, SamplingParams(0.0, None, None, 6), rng_stream=(1,))
        part = trainer.algorithm.learner.part
        found[name] = {
            "prompts": [list(prompt.student_ids) for prompt in prompts],
            "tokens": [list(rollout.completion_ids) for rollout in rollouts],
            "parameters": {n: p.detach().clone() for n, p in part.trained_parameters()},
        }
    dist.barrier()
    wrong = replace(LORA, adapter=directory, r=4, targets=["q_proj"])
    found["other"] = error_of(lambda: read_inputs(config_of(folder, "x", lora=wrong)))
    found["other model"] = error_of(
        lambda: run(config_of(folder, "y", model=str(folder / "student"), lora=replace(LORA, adapter=directory)))
    )
    nowhere = replace(LORA, adapter=str(folder / "deep"))
    found["nowhere"] = error_of(lambda: read_inputs(config_of(folder, "z", lora=nowhere)))
    return found
