"""Parser of a PEFT adapter's adapter_config.json, with errors for unsupported options."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from renio_megatron.config import LoraConfig
from renio_megatron.config.sections.lora import OF_ATTENTION, TARGETS
from renio_megatron.errors import ConfigError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_OTHERS = ("lm_head", "model.embed_tokens")
_REMEDY = "Merge the adapter with PEFT (merge_and_unload), and give the result as the model."

REMOVED_AT_START = ("pissa", "olora")
"""`init_lora_weights` that subtract the initial adapters from the weights whenever PEFT loads one: see `residual`."""

_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
"""`init_lora_weights` that do not change the weights when PEFT loads a trained adapter."""

_ANY_CASE = ("gaussian", "olora", "mica")
_READ = ("r", "lora_alpha", "use_rslora", "target_modules", "exclude_modules", "init_lora_weights")
_ONLY: dict[str, tuple[Any, ...]] = {"peft_type": ("LORA",), "bias": ("none", None)}
_WITHOUT_EFFECT = (
    # its origin, and how it is kept in memory
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "runtime_config",
    "megatron_config",
    "megatron_core",
    # used in training only
    "lora_dropout",
    # settings of its initialization, for values of `init_lora_weights`
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    # settings of another option, which is refused itself
    "qalora_group_size",
    "ensure_weight_tying",
)
"""Options without an effect on the output of a trained adapter. All others have to be null, false or empty."""


@dataclass(frozen=True)
class PeftAdapter:
    """Settings of an adapter that determine its output.

    Attributes:
        lora: rank, scale and targets.
        start: one of `REMOVED_AT_START`; None: the base weights are unchanged.
    """

    lora: LoraConfig
    start: str | None = None


def block_of(target: str) -> str:
    """The part of a Hugging Face layer that a target is in."""
    return "self_attn" if target in OF_ATTENTION else "mlp"


def read_adapter_config(directory: Path, setting: str) -> PeftAdapter:
    """The adapter in a directory, from PEFT's description. Options that it leaves out have PEFT's defaults.

    Raises:
        ConfigError: it holds no adapter, or one with unsupported options; the message names `setting`.
    """
    path = directory / CONFIG
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{setting}: {path} cannot be read as JSON: {error}. Give a directory that PEFT or `renio export` wrote."
        ) from error
    if not isinstance(values, dict):
        raise ConfigError(
            f"{setting}: {path} should hold a JSON object; got {type(values).__name__}. Give a directory that PEFT or "
            "`renio export` wrote."
        )
    if not (directory / WEIGHTS).is_file():
        raise ConfigError(f"{setting}: {directory} holds no {WEIGHTS}. Save the adapter again with save_pretrained.")
    for key, value in values.items():
        if key in _READ or key in _WITHOUT_EFFECT:
            continue
        if value not in _ONLY[key] if key in _ONLY else value:
            raise ConfigError(f"{setting}: {path} has {key}={value!r}, which these adapters do not know. {_REMEDY}")
    start = values.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower() in _ANY_CASE:
        start = start.lower()
    if start not in _PLAIN_STARTS and start not in REMOVED_AT_START:
        raise ConfigError(
            f"{setting}: {path} has init_lora_weights={start!r}, whose adapters stand beside other weights than the "
            "model's, which only the program that trained them had. Save the adapter there with "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...), or merge it there (merge_and_unload) "
            "and give the result as the model."
        )
    try:
        lora = LoraConfig(
            r=int(values.get("r", 8)),
            alpha=float(values.get("lora_alpha", 8)),
            use_rslora=bool(values.get("use_rslora")),
            targets=_targets(values.get("target_modules"), values.get("exclude_modules")),
        )
    except (TypeError, ValueError) as error:  # a ConfigError is a ValueError
        raise ConfigError(f"{setting}: {path} cannot be used: {error} {_REMEDY}") from error
    return PeftAdapter(lora, start if start in REMOVED_AT_START else None)


def _targets(given: Any, excluded: Any) -> list[str]:
    """The layers that `target_modules` selects and `exclude_modules` does not.

    Resolved in the first layer; the tensors show later whether the same holds in all.

    Raises:
        ValueError, TypeError: no layers, unsupported ones, or values that are not names.
    """
    places = {f"model.layers.0.{block_of(target)}.{target}": target for target in TARGETS}
    if given == "all-linear":
        given = list(TARGETS)
    meant = set(_meant(given, [*places, *_OTHERS])) - set(_meant(excluded or [], [*places, *_OTHERS]))
    if others := sorted(meant & set(_OTHERS)):
        raise ValueError(f"target_modules={given!r} means {', '.join(others)}, which cannot have an adapter here.")
    if not meant:
        raise ValueError(f"target_modules={given!r} means none of {', '.join(TARGETS)}.")
    return [target for place, target in places.items() if place in meant]


def _meant(given: Any, places: list[str]) -> list[str]:
    """The modules selected by PEFT's rule: a pattern for whole names, or names and suffixes of names."""
    if isinstance(given, str):
        try:
            return [place for place in places if re.fullmatch(given, place)]
        except re.error as error:
            raise ValueError(f"{given!r} is no pattern of modules ({error}).") from error
    if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
        raise TypeError(f"modules should be a list of names, or a pattern; got {given!r}.")
    ends = tuple(f".{name}" for name in given)
    return [place for place in places if f".{place}".endswith(ends)]
