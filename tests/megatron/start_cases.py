"""Runs whose student starts with a PEFT adapter that took a part of the weights, and runs with rows beyond V."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from renio_megatron.config import CheckpointConfig, EvaluateConfig, LoraConfig, ParallelConfig, TeacherConfig
from renio_megatron.megatron.checkpoint.directory import step_directory
from tests.helpers.resuming import error_of, rows, run, run_config, train_config
from tests.helpers.training_cases import VOCAB_SIZE, layout_of
from tests.megatron.peft_cases import by_peft, save_adapter

TP2_SP = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
STARTS = ("pissa", "olora")
MORE_ROWS = VOCAB_SIZE + 5


def save_starts(folder: Path) -> None:
    """Adapters of the model `deep` with each start, and the models into which PEFT merges them."""
    for start in STARTS:
        shutil.copytree(folder / "deep", folder / f"{start} merged")
        save_adapter(folder / "deep", folder / start, start, merged=folder / f"{start} merged")


def _config(folder: Path, name: str, start: str, **changes: Any) -> Any:
    sections = {
        "model": str(folder / "deep"),
        "teacher": TeacherConfig(model=str(folder / f"{start} merged")),
        "lora": LoraConfig(r=4, alpha=8.0, adapter=str(folder / start)),
        "parallel": TP2_SP,
        "evaluate": EvaluateConfig(),
    }
    return run_config(folder, name, **{**sections, **changes})


def _first_loss(folder: Path, name: str) -> float:
    return next(row["loss"] for row in rows(folder, name) if "loss" in row)


def losses_at_the_start(folder: Path, start: str) -> dict[str, float]:
    """First losses of a student and a teacher that are the same model, by adapter or merged by PEFT."""
    merged, plain = str(folder / f"{start} merged"), str(folder / "deep")
    adapted = TeacherConfig(model=plain, adapter=str(folder / start))
    found = {}
    for name, changes in {
        "student": {},
        "both": {"teacher": adapted},
        "teacher": {"model": merged, "lora": LoraConfig(), "teacher": adapted},
        "apart": {"teacher": TeacherConfig(model=plain)},
    }.items():
        label = f"{start}, {name}"
        run(_config(folder, label, start, train=train_config(train_iters=1), **changes))
        found[name] = _first_loss(folder, label)
    return found


def run_of_start(folder: Path, start: str) -> dict[str, Any]:
    """Five steps; the same cut off and gone on with; and what a run says that goes on without the adapter."""
    teacher = {"teacher": TeacherConfig(model=str(folder / "teacher"))}
    whole = run(_config(folder, f"{start} run", start, **teacher))
    config = _config(folder, f"{start} cut", start, **teacher)
    run(config, stop_before=4)
    again = run(config)
    load = CheckpointConfig(load=str(step_directory(folder / f"{start} run" / "checkpoints", 2)))
    plain = LoraConfig(r=4, alpha=8.0)
    message = error_of(lambda: run(_config(folder, f"{start} plain", start, lora=plain, checkpoint=load, **teacher)))
    return {"whole": whole, "again": again, "without": message}


def exports_of_start(folder: Path, start: str) -> dict[str, Any]:
    """The run exported as an adapter, read by PEFT, and merged, read by transformers."""
    from megatron.core import parallel_state
    from transformers import AutoModelForCausalLM

    from renio_megatron.runner import export

    # This rank's process group is still needed; Megatron's groups go, as they do in a process of its own.
    export.stop = parallel_state.destroy_model_parallel  # type: ignore[assignment]
    run_directory, adapter, merged = folder / f"{start} run", folder / f"{start} out", folder / f"{start} out merged"
    export.export_checkpoint(run_directory, adapter, None)
    export.export_checkpoint(run_directory, merged, None, merge=True)
    said = json.loads((adapter / "adapter_config.json").read_text())["init_lora_weights"]
    by_adapter = by_peft(folder / "deep", adapter, ids=prompts())
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    with torch.no_grad():
        by_merged = torch.cat([model(torch.tensor([row])).logits[0] for row in prompts()])
    before = by_peft(folder / "deep", folder / start, ids=prompts())
    assert isinstance(by_adapter, torch.Tensor) and isinstance(before, torch.Tensor)
    return {
        "start": said,
        "difference": float((by_adapter - by_merged).abs().max()),
        "trained": float((by_adapter - before).abs().max()),
    }


def prompts() -> list[list[int]]:
    """Token ids of every row."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist() for length in (9, 30)]


def save_rows(folder: Path) -> None:
    """Copies of `student` and `tied` with five more random rows of the vocabulary."""
    for name in ("student", "tied"):
        shutil.copytree(folder / name, folder / f"{name} more")
        path = folder / f"{name} more" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": MORE_ROWS}))
        file = folder / f"{name} more" / "model.safetensors"
        state, generator = load_file(file), torch.Generator().manual_seed(9)
        for key in ("model.embed_tokens.weight", "lm_head.weight"):
            if key in state:
                more = torch.randn(MORE_ROWS - VOCAB_SIZE, state[key].shape[1], generator=generator)
                state[key] = torch.cat([state[key], more])
        save_file(state, file, metadata={"format": "pt"})


DISTRIBUTED = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
LAYOUTS = {
    "TP2 + SP": TP2_SP,
    "DP2, distributed": ParallelConfig(**DISTRIBUTED),
    "PP2": layout_of(1, 2),
    "TP2, padded": replace(TP2_SP, make_vocab_size_divisible_by=16),
}


def rows_config(folder: Path, name: str, model: str, layout: str, **changes: Any) -> Any:
    """Five steps of a student with more rows than its teacher, under a weight decay that shows."""
    sections = {
        "model": str(folder / f"{model} more"),
        "parallel": LAYOUTS[layout],
        "evaluate": EvaluateConfig(),
        "train": train_config(weight_decay=0.5, lr=0.01, bf16=False),
    }
    return run_config(folder, name, **{**sections, **changes})


def run_with_rows(folder: Path, model: str, layout: str, bf16: bool) -> dict[str, Any]:
    """A run, cut off and gone on with; and one that starts from its last checkpoint."""
    name = f"{model}, {layout}, {bf16}"
    train = train_config(weight_decay=0.5, lr=0.01, bf16=bf16)
    config = rows_config(folder, name, model, layout, train=train)
    run(config, stop_before=4)
    run(config)
    last = step_directory(Path(config.output_dir) / "checkpoints", 5)
    same = TeacherConfig(model=config.model)
    load = CheckpointConfig(load=str(last), save_interval=2)
    # With this teacher every row is trained, at a rate that changes nothing: what is exported is what was loaded.
    more = replace(train, train_iters=6, lr=1e-30)
    run(rows_config(folder, f"{name}, loaded", model, layout, teacher=same, checkpoint=load, train=more))
    trained = TeacherConfig(model=config.model, pretrained_checkpoint=str(last))
    own = rows_config(folder, f"{name}, own", model, layout, teacher=trained, train=replace(more, train_iters=1))
    run(replace(own, pretrained_checkpoint=str(last)))
    return {"first losses": [_first_loss(folder, f"{name}, own")]}


def exports_with_rows(folder: Path, names: list[str]) -> None:
    """Runs and those that went on from them, exported."""
    from megatron.core import parallel_state

    from renio_megatron.runner import export

    export.stop = parallel_state.destroy_model_parallel  # type: ignore[assignment]
    for name in names:
        for run_name in (name, f"{name}, loaded", f"{name}, own"):
            export.export_checkpoint(folder / run_name, folder / f"{run_name} out", None)
