"""PEFT adapters as people have them: every option of its LoraConfig, and what PEFT and this package make of each."""

from __future__ import annotations

import contextlib
import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tests.models.hf_config_cases import rows, save_family

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ABSENT = "(absent)"

FIELDS: dict[str, list[Any]] = {
    # Every field of peft's LoraConfig, and values that a file may have beside the default.
    "peft_type": ["LORA", "LOHA"],
    "auto_mapping": [None, {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers"}],
    "peft_version": [ABSENT, "0.11.0"],
    "base_model_name_or_path": [None, "somewhere/else"],
    "revision": ["main"],
    "task_type": [None, "CAUSAL_LM"],
    "inference_mode": [True, False],
    "r": [4],
    "target_modules": [
        TARGETS[::-1],
        r".*\.(q|k|v|o|gate|up|down)_proj",
        "all-linear",
        [f"self_attn.{name}" for name in TARGETS[:4]] + [f"mlp.{name}" for name in TARGETS[4:]],
        [*TARGETS, "c_attn"],
        [*TARGETS, "lm_head"],
        r".*\.(q|v)_proj",
        "[",
        ["c_attn"],
        [],
        None,
    ],
    "exclude_modules": [[], ["lm_head"], r".*lm_head", ["down_proj"]],
    "lora_alpha": [3, ABSENT],
    "lora_dropout": [0.5],
    "fan_in_fan_out": [None, False, True],
    "bias": ["all", "lora_only"],
    "use_rslora": [None, True],
    "modules_to_save": [[], ["lm_head"]],
    "init_lora_weights": [
        ABSENT,
        False,
        "gaussian",
        "Gaussian",
        "orthogonal",
        "eva",
        "mica",
        "pissa",
        "PISSA",
        "pissa_niter_4",
        "olora",
        "OLoRA",
        "corda",
        "loftq",
        "lora_ga",
        "something",
    ],
    "layers_to_transform": [[], [0, 1], 1],
    "layers_pattern": [[], "layers"],
    "rank_pattern": [None, {"q_proj": 2}],
    "alpha_pattern": [None, {"q_proj": 2}],
    "megatron_config": [None],
    "megatron_core": ["megatron.core", None],
    "trainable_token_indices": [[], [1, 2]],
    "loftq_config": [{}, {"loftq_bits": 4, "loftq_iter": 1}],
    "eva_config": [None, {"rho": 2.0}],
    "corda_config": [None],
    "lora_ga_config": [None],
    "use_dora": [None, True],
    "velora_config": [None, {}, {"num_groups": 4}],
    "alora_invocation_tokens": [None, [1, 2]],
    "use_qalora": [None, True],
    "qalora_group_size": [32],
    "monteclora_config": [None, {"monteclora_n": 4}],
    "layer_replication": [None, [], [[0, 3], [1, 3]]],
    "runtime_config": [None, {"ephemeral_gpu_offload": False}],
    "lora_bias": [None, True],
    "target_parameters": [None, [], ["mlp.gate_proj.weight"]],
    "use_bdlora": [None, {"target_modules_bd_a": ["q_proj"], "nblocks": 2}],
    "arrow_config": [None, {"top_k": 2}],
    "kasa_config": [None, {"beta": 0.001}],
    "ensure_weight_tying": [True],
}
UNKNOWN: list[tuple[str, Any]] = [("one_of_next_year", value) for value in (None, False, {}, [], 0, True, "new", [1])]


def changes() -> Iterator[tuple[str, str, Any]]:
    """(name, key, value) of every case."""
    for key, values in FIELDS.items():
        for value in values:
            yield f"{key}={value}", key, value
    for key, value in UNKNOWN:
        yield f"{key}={value}", key, value


def save_adapter(model: Path, directory: Path, init: Any = True, *, seed: int = 3, merged: Path | None = None) -> None:
    """An adapter of all targets by PEFT's own hand, r 4, alpha 8, every number of it random; and merged by PEFT."""
    import peft
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM", init_lora_weights=init)
    adapted = peft.get_peft_model(base, settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(directory)
    if merged is not None:
        adapted.merge_and_unload().save_pretrained(merged)


@torch.no_grad()
def by_peft(model: Path, adapter: Path, ids: list[list[int]] | None = None) -> torch.Tensor | str:
    """Logits of all rows, or why there are none."""
    import peft
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            adapted = peft.PeftModel.from_pretrained(base, adapter).eval()
            logits = torch.cat([adapted(torch.tensor([row])).logits[0] for row in ids or rows()])
    except Exception as error:  # whatever it raises
        return f"{type(error).__name__}: {error}"
    missing = [str(one.message) for one in told if "missing adapter keys" in str(one.message)]
    return missing[0] if missing else logits


@torch.no_grad()
def by_us(model: Path, adapter: Path, tensor: int = 1) -> dict[str, torch.Tensor | str]:
    """The same by this package, as a teacher's adapter that is merged and as the one that a student starts with."""
    from renio_megatron.config import ParallelConfig, TrainConfig
    from renio_megatron.errors import ConfigError
    from renio_megatron.megatron.model.build import build_model
    from renio_megatron.megatron.runtime.initialize import start
    from renio_megatron.megatron.weights.hf import load_weights
    from renio_megatron.megatron.weights.merge_adapter import Merger
    from renio_megatron.megatron.weights.peft import check_adapter, load_adapter, read_adapter_config
    from renio_megatron.megatron.weights.residual import residual_of
    from renio_megatron.models.architecture import Architecture
    from tests.megatron.test_hf import logits_of

    parallel = ParallelConfig(tensor_model_parallel_size=tensor, make_vocab_size_divisible_by=1)
    layout = start(parallel, seed=0)
    architecture = Architecture.from_directory(model)

    def built(lora: Any = None) -> Any:
        part = build_model(
            architecture,
            layout,
            parallel,
            TrainConfig(),
            lora=lora,
            vocab_size=architecture.vocab_size,
            trained=False,
            initialize=False,
        )
        part.train(False)
        return part

    def teacher() -> torch.Tensor:
        part, change = built(), Merger(adapter, architecture, model)
        load_weights(part, model, change=change)
        return logits_of(part, rows())

    def student() -> torch.Tensor:
        lora = read_adapter_config(adapter, "lora.adapter").lora
        found = check_adapter(adapter, lora)
        change = residual_of(found, model, architecture, layout.device)
        part = built(lora)
        load_weights(part, model, change=change)
        load_adapter(part, adapter)
        return logits_of(part, rows())

    found: dict[str, torch.Tensor | str] = {}
    for name, make in (("teacher", teacher), ("student", student)):
        try:
            found[name] = make()
        except ConfigError as error:
            found[name] = str(error)
        except Exception as error:
            found[name] = f"TRACEBACK: {type(error).__name__}: {error}"
    return found


def compare(model: Path, adapter: Path, tensor: int = 1) -> tuple[dict[str, float], str, dict[str, str]]:
    """(largest difference of the logits by role, what PEFT says, what we say by role)."""
    theirs, ours = by_peft(model, adapter), by_us(model, adapter, tensor)
    said = {role: one for role, one in ours.items() if isinstance(one, str)}
    if isinstance(theirs, str):
        return {}, theirs, said
    differences = {
        role: float((theirs - one).abs().max()) for role, one in ours.items() if isinstance(one, torch.Tensor)
    }
    return differences, "", said


def compare_all(folder: Path) -> dict[str, tuple[dict[str, float], str, dict[str, str]]]:
    """Every case, beside a Llama; PEFT's own words go nowhere."""
    with contextlib.redirect_stdout(None):
        save_family("llama", folder / "model")
        save_adapter(folder / "model", folder / "adapter")
        found = {}
        for number, (name, key, value) in enumerate(changes()):
            directory = folder / f"case-{number}"
            shutil.copytree(folder / "adapter", directory)
            config = json.loads((directory / "adapter_config.json").read_text())
            if value == ABSENT:
                config.pop(key)
            else:
                config[key] = value
            (directory / "adapter_config.json").write_text(json.dumps(config))
            found[name] = compare(folder / "model", directory)
            shutil.rmtree(directory)
        return found
