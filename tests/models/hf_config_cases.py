"""Descriptions of tiny models as people have them, and what transformers and this package make of each.

A family's model has every parameter random; a case changes its config.json, and sometimes its weights, and nothing
else. Both readers then compute logits of the same rows in one process, or say why they do not.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

VOCAB = 61
LENGTHS = (40, 300)
ABSENT = "(absent)"

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
_YARN = {"factor": 4.0, "original_max_position_embeddings": 256}
_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128}
_LONG = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 256}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "linear, old key": {"type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", **_YARN},
    "yarn, old key": {"type": "yarn", **_YARN},
    "yarn, attention_factor": {"rope_type": "yarn", **_YARN, "attention_factor": 0.7},
    "yarn, attn_factor": {"rope_type": "yarn", **_YARN, "attn_factor": 0.8782488562869419},
    "yarn, mscale": {"rope_type": "yarn", **_YARN, "mscale": 0.7, "mscale_all_dim": 1.3},
    "yarn, betas": {"rope_type": "yarn", **_YARN, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
    "yarn, no factor": {"rope_type": "yarn", "original_max_position_embeddings": 256},
    "llama3": {"rope_type": "llama3", **_LLAMA3},
    "llama3, other constants": {"rope_type": "llama3", **_LLAMA3, "low_freq_factor": 2.0, "high_freq_factor": 5.0},
    "llama3, no factor": {"rope_type": "llama3", **{k: v for k, v in _LLAMA3.items() if k != "factor"}},
    "longrope": {"rope_type": "longrope", **_LONG},
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.5},
    "unknown": {"rope_type": "spiral", "factor": 2.0},
}
_OF_ALL: dict[str, list[Any]] = {
    "hidden_act": [ABSENT, None, "swish", "gelu"],
    "max_position_embeddings": [ABSENT, 2048],
    "initializer_range": [ABSENT, None, 0.5],
    "rms_norm_eps": [ABSENT, 1e-3],
    "num_key_value_heads": [ABSENT, None, 4],
    "head_dim": [ABSENT, None, 12],
    "num_attention_heads": [ABSENT],
    "tie_word_embeddings": [ABSENT, None, True],
    "attention_bias": [ABSENT, None, False, True],
    "attention_dropout": [ABSENT, None, 0.5],
    "mlp_bias": [None, True],
    "rope_theta": [None, 5e5],
    "partial_rotary_factor": [None, 1.0, 0.5],
    "use_sliding_window": [None, False, True],
    "sliding_window": [None, 8, 4096],
    "pretraining_tp": [2],
    "dtype": [ABSENT, "bfloat16"],
    "use_cache": [ABSENT, False],
    "vocab_size": [None, "many"],
    "model_type": [None, "mistral"],
    "architectures": [ABSENT, None],
    "bos_token_id": [None, 7],
    "eos_token_id": [None, [3, 4]],
}
_OF_EXPERTS: dict[str, list[Any]] = {
    "num_experts_per_tok": [ABSENT, 1, 3, 5],
    "norm_topk_prob": [ABSENT, None, True, False],
    "decoder_sparse_step": [ABSENT, 2],
    "mlp_only_layers": [ABSENT, None, [], [1]],
    "router_jitter_noise": [ABSENT, 0.1],
    "output_router_logits": [True],
    "router_aux_loss_coef": [0.5],
    "num_experts": [4, 8],
    "num_local_experts": [4, 8],
}
_TOGETHER: list[dict[str, Any]] = [
    {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 28},
    {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["full_attention"] * 3},
    {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 0},
    {"layer_types": ["sliding_attention", "full_attention", "full_attention"], "sliding_window": 8},
    {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    {"rope_parameters": {"rope_theta": None, "rope_type": "default"}},
    {"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 1e4},
    {"rope_parameters": {"rope_theta": 1e5}, "rope_scaling": {"rope_type": "yarn", **_YARN}},
    {"rope_parameters": {"rope_theta": 1e5}, "rope_scaling": {"rope_type": "yarn", **_YARN}, "rope_theta": 1e6},
    {"rope_parameters": ABSENT, "rope_theta": 1e6},
    {"rope_parameters": ABSENT, "rope_scaling": None, "rope_theta": 1e6},
    {"rope_parameters": None},
    {"rope_parameters": {}},
    {"rope_parameters": ABSENT},
]

_QWEN25 = {"rope_theta": 1e6, "max_position_embeddings": 32768, "use_sliding_window": False, "max_window_layers": 28}
_QWEN3 = {
    "rope_theta": 1e6,
    "rope_scaling": None,
    "max_position_embeddings": 40960,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "use_sliding_window": False,
    "sliding_window": None,
    "max_window_layers": 36,
    "tie_word_embeddings": False,
}
_LLAMA31_ROPE = {**_LLAMA3, "rope_type": "llama3", "original_max_position_embeddings": 8192}
_R1_0528_YARN = {**_YARN, "rope_type": "yarn", "original_max_position_embeddings": 32768}
RELEASED: dict[str, tuple[str, dict[str, Any]]] = {
    # What the config.json of released models says beside sizes, as it is written there: (family, keys).
    "Llama-3-8B": ("llama", {"rope_theta": 5e5, "rope_scaling": None, "max_position_embeddings": 8192}),
    "Llama-3.1-8B-Instruct": (
        "llama",
        {
            "rope_theta": 5e5,
            "rope_scaling": _LLAMA31_ROPE,
            "max_position_embeddings": 131072,
            "attention_bias": False,
            "mlp_bias": False,
            "pretraining_tp": 1,
            "eos_token_id": [128001, 128008, 128009],
        },
    ),
    "Llama-3.2-1B": (
        "llama",
        {
            "rope_theta": 5e5,
            "rope_scaling": {**_LLAMA31_ROPE, "factor": 32.0},
            "max_position_embeddings": 131072,
            "tie_word_embeddings": True,
            "head_dim": 8,
        },
    ),
    "R1-Distill-Llama-8B": (
        "llama",
        {"rope_theta": 5e5, "rope_scaling": _LLAMA31_ROPE, "max_position_embeddings": 131072},
    ),
    "Qwen2.5-1.5B-Instruct": ("qwen2", {**_QWEN25, "sliding_window": 32768, "tie_word_embeddings": True}),
    "Qwen2.5-7B": (
        "qwen2",
        {**_QWEN25, "sliding_window": 131072, "max_position_embeddings": 131072, "use_mrope": False},
    ),
    "Qwen2.5-Math-7B": (
        "qwen2",
        {**_QWEN25, "rope_theta": 10000, "sliding_window": 4096, "max_position_embeddings": 4096, "use_mrope": False},
    ),
    "R1-Distill-Qwen-7B": (
        "qwen2",
        {**_QWEN25, "rope_theta": 10000, "sliding_window": 4096, "max_position_embeddings": 131072, "use_mrope": False},
    ),
    "R1-Distill-Qwen-32B": (
        "qwen2",
        {**_QWEN25, "sliding_window": 131072, "max_window_layers": 64, "max_position_embeddings": 131072},
    ),
    "Qwen3-4B": ("qwen3", {**_QWEN3, "tie_word_embeddings": True}),
    "Qwen3-8B": ("qwen3", _QWEN3),
    "Qwen3-8B with YaRN": (
        "qwen3",
        {**_QWEN3, "rope_scaling": _R1_0528_YARN, "max_position_embeddings": 131072},
    ),
    "R1-0528-Qwen3-8B": (
        "qwen3",
        {
            **_QWEN3,
            "rope_scaling": {**_R1_0528_YARN, "attn_factor": 0.8782488562869419},
            "max_position_embeddings": 131072,
        },
    ),
    "Qwen3-30B-A3B": (
        "qwen3_moe",
        {
            **_QWEN3,
            "max_window_layers": 48,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.001,
        },
    ),
    "Mixtral-8x7B-Instruct-v0.1": (
        "mixtral",
        {
            "rope_theta": 1e6,
            "sliding_window": None,
            "max_position_embeddings": 32768,
            "attention_dropout": 0.0,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.02,
        },
    ),
}


def changes_of(family: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, what is changed in config.json) of each case of a family."""
    keys = {**_OF_ALL, **(_OF_EXPERTS if family in ("qwen3_moe", "mixtral") else {})}
    for key, values in keys.items():
        for value in values:
            yield f"{key}={value}", {key: value}
    for name, rope in ROPES.items():
        yield f"rope_parameters: {name}", {"rope_parameters": {"rope_theta": 1e5, **rope}}
        yield f"rope_scaling: {name}", {"rope_parameters": ABSENT, "rope_theta": 1e5, "rope_scaling": rope}
        yield f"both ropes: {name}", {"rope_scaling": rope}
    for change in _TOGETHER:
        yield json.dumps(change), change
    for name, (of, released) in RELEASED.items():
        if of == family:
            yield f"released: {name}", {"rope_parameters": ABSENT, **released}


def save_family(family: str, folder: Path, seed: int = 0) -> None:
    """The family's model, by transformers' own hand."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(
        family,
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        **FAMILIES[family],
    )
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.normal_(0.0, 0.3)
    model.save_pretrained(folder)


def change(source: Path, target: Path, changes: dict[str, Any]) -> None:
    """A copy of a model's directory with another config.json."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    for key, value in changes.items():
        if value == ABSENT:
            config.pop(key, None)
        else:
            config[key] = value
    (target / "config.json").write_text(json.dumps(config))


def rows() -> list[list[int]]:
    """Token ids of every row."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCAB, (length,), generator=generator).tolist() for length in LENGTHS]


def by_transformers(directory: Path) -> torch.Tensor | str:
    """Logits of all rows, or why there are none."""
    from transformers import AutoModelForCausalLM

    try:
        model, info = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
        if info["missing_keys"]:
            return f"weights that are drawn at random: {sorted(info['missing_keys'])[:2]}"
        with torch.no_grad():
            return torch.cat([model.eval()(torch.tensor([row])).logits[0] for row in rows()])
    except Exception as error:  # whatever it raises
        return f"{type(error).__name__}: {error}"


def by_us(directory: Path, tensor: int = 1) -> torch.Tensor | str:
    """The same by this package, on `tensor` ranks of a tensor-parallel group."""
    from renio_megatron.config import ParallelConfig, TrainConfig
    from renio_megatron.errors import ConfigError
    from renio_megatron.megatron.model.build import build_model
    from renio_megatron.megatron.runtime.initialize import start
    from renio_megatron.megatron.weights.hf import load_weights
    from renio_megatron.models.architecture import Architecture
    from tests.megatron.test_hf import logits_of

    parallel = ParallelConfig(tensor_model_parallel_size=tensor, make_vocab_size_divisible_by=1)
    layout = start(parallel, seed=0)
    try:
        architecture = Architecture.from_directory(directory)
        part = build_model(
            architecture,
            layout,
            parallel,
            TrainConfig(),
            vocab_size=architecture.vocab_size,
            trained=False,
            initialize=False,
        )
        load_weights(part, directory)
    except ConfigError as error:
        return str(error)
    except Exception as error:
        return f"TRACEBACK: {type(error).__name__}: {error}"
    part.train(False)
    return logits_of(part, rows())


def compare(directory: Path, tensor: int = 1) -> tuple[float | None, str, str]:
    """(largest difference of the logits where both have some, what transformers says, what we say)."""
    theirs, ours = by_transformers(directory), by_us(directory, tensor)
    if isinstance(theirs, str) or isinstance(ours, str):
        return None, theirs if isinstance(theirs, str) else "", ours if isinstance(ours, str) else ""
    if theirs.shape != ours.shape:
        return float("inf"), "", ""
    return float((theirs - ours).abs().max()), "", ""


def compare_family(family: str, folder: Path) -> dict[str, tuple[float | None, str, str]]:
    """Every case of a family; transformers' own words go nowhere."""
    from transformers.utils import logging

    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    save_family(family, folder / family)
    found = {}
    for number, (name, changes) in enumerate(changes_of(family)):
        directory = folder / f"{family}-{number}"
        change(folder / family, directory, changes)
        found[name] = compare(directory)
        shutil.rmtree(directory)
    return found
