"""The architectures that can be read from Hugging Face directories: Llama, Qwen2, Qwen3, Qwen3-MoE and Mixtral."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from renio_megatron.errors import ConfigError
from renio_megatron.models.families import FAMILIES, MOE_FAMILIES
from renio_megatron.models.rope import KINDS, Rope

_ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}
"""Rope kind -> the entries of `rope_parameters` that transformers reads in addition to theta."""


@dataclass(frozen=True)
class Experts:
    """The feed-forward networks of a layer with a router.

    Attributes:
        num_experts: experts of a layer.
        top_k: experts that a token is routed to: those with the largest router probabilities.
        ffn_hidden_size: feed-forward width of each expert.
        normalized: whether the probabilities of a token's top-k experts are divided by their sum.
    """

    num_experts: int
    top_k: int
    ffn_hidden_size: int
    normalized: bool = True


@dataclass(frozen=True)
class ModelShape:
    """Model dimensions that parallel layouts depend on, read without torch and transformers.

    Attributes:
        file: path of config.json, for messages.
        family: one of `FAMILIES`.
        num_layers, num_attention_heads, num_query_groups: as in Megatron's TransformerConfig.
        num_experts, expert_width: experts of a layer and feed-forward width of each; None for a dense model, and where
            config.json holds no whole number, which `Architecture` reports.
    """

    file: Path
    family: str
    num_layers: int
    num_attention_heads: int
    num_query_groups: int
    num_experts: int | None = None
    expert_width: int | None = None

    @property
    def has_experts(self) -> bool:
        """Whether its layers have experts."""
        return self.family in MOE_FAMILIES

    @classmethod
    def from_directory(cls, directory: Path, setting: str) -> ModelShape:
        """Reads config.json of a Hugging Face model directory; `setting` names the model in messages.

        Raises:
            ConfigError: it cannot be read, is of another family, or lacks a number.
        """
        file = directory / "config.json"
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"{setting}: {file} cannot be read as JSON: {error}.") from error
        name: Any = content.get("model_type") if isinstance(content, dict) else None
        if not isinstance(name, str) or name not in FAMILIES:
            raise ConfigError(
                f"{setting}: {file} has model_type {name!r}; supported are {', '.join(FAMILIES)}. "
                "Choose a model of one of these types."
            )
        values = _with_defaults(content)

        def number(key: str) -> int:
            value = values.get(key)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{setting}: {file} needs {key}, a whole number above 0; got {value!r}.")
            return value

        heads, layers = number("num_attention_heads"), number("num_hidden_layers")
        groups = heads if values.get("num_key_value_heads") is None else number("num_key_value_heads")
        count = width = None
        if (experts := FAMILIES[name].experts) is not None:
            count = values.get("num_experts", values.get("num_local_experts"))
            width = values.get(experts.width)
        return cls(
            file,
            name,
            layers,
            heads,
            groups,
            num_experts=count if isinstance(count, int) else None,
            expert_width=width if isinstance(width, int) else None,
        )


def _with_defaults(content: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of config.json, with defaults for missing ones; the number of experts has either of two names."""
    defaults = FAMILIES[content["model_type"]].defaults
    names = {"num_experts", "num_local_experts"}
    is_counted = bool(names & content.keys())
    return {key: value for key, value in defaults.items() if not (is_counted and key in names)} | dict(content)


@dataclass(frozen=True)
class Architecture:
    """A model's architecture, in Megatron's terms.

    Attributes:
        family: one of `FAMILIES`.
        num_layers, hidden_size, ffn_hidden_size, num_attention_heads, num_query_groups, kv_channels, layernorm_epsilon,
            qk_layernorm, add_qkv_bias, init_method_std: as in Megatron's TransformerConfig.
        vocab_size: rows of the embedding, without padding.
        tied: whether the LM head is the embedding.
        rope: its rotary position embeddings.
        max_sequence_length: maximum number of positions of the model.
        experts: the experts of every layer, each of `ffn_hidden_size`; None for a dense model.
    """

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    layernorm_epsilon: float
    qk_layernorm: bool
    add_qkv_bias: bool
    init_method_std: float
    vocab_size: int
    tied: bool
    rope: Rope
    max_sequence_length: int
    experts: Experts | None = None

    @classmethod
    def from_directory(cls, directory: Path) -> Architecture:
        """Reads config.json of a Hugging Face model directory; where it ties the head, the weight files are read too.

        Raises:
            ConfigError: a family or a feature that is not supported, named.
        """
        from renio_megatron.models.hf_index import TensorIndex, has_weights  # which bring torch

        architecture = cls.from_description(directory)
        if architecture.tied and has_weights(directory) and not TensorIndex(directory).is_tied():
            return replace(architecture, tied=False)
        return architecture

    @classmethod
    def from_description(cls, directory: Path) -> Architecture:
        """Reads config.json alone, without the weight files."""
        return cls.from_values(directory / "config.json", _values(directory))

    @classmethod
    def from_values(cls, path: Path, values: dict[str, Any]) -> Architecture:
        """The architecture of the values of config.json, as transformers reads them; `path` is for messages."""
        family: Any = values.get("model_type")
        if not isinstance(family, str) or family not in FAMILIES:
            raise ConfigError(f"{path}: model_type {family!r} is not supported; supported: {', '.join(FAMILIES)}.")
        config = _read_by_transformers(path, values)
        _refuse_unsupported(path, config)
        experts = _experts(path, config) if family in MOE_FAMILIES else None
        heads = config.num_attention_heads
        return cls(
            family=family,
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            ffn_hidden_size=config.intermediate_size if experts is None else experts.ffn_hidden_size,
            num_attention_heads=heads,
            num_query_groups=config.num_key_value_heads or heads,
            kv_channels=getattr(config, "head_dim", None) or config.hidden_size // heads,
            layernorm_epsilon=config.rms_norm_eps,
            qk_layernorm=FAMILIES[family].qk_layernorm,
            add_qkv_bias=FAMILIES[family].add_qkv_bias,
            init_method_std=config.initializer_range,
            vocab_size=config.vocab_size,
            tied=bool(config.tie_word_embeddings),
            rope=_rope(path, config),
            max_sequence_length=config.max_position_embeddings,
            experts=experts,
        )


def notices(directory: Path) -> list[str]:
    """One sentence per entry of a supported model's config.json that other programs may read differently."""
    path, values = directory / "config.json", _values(directory)
    found, old, new = [], values.get("rope_scaling"), values.get("rope_parameters")
    if old and new and old != new:
        found.append(
            f"{path} has rope_parameters beside rope_scaling: as in transformers, rope_scaling={old} is used, and "
            "the other is not read. Remove one of them."
        )
    parameters = _read_by_transformers(path, values).rope_parameters
    kind = parameters.get("rope_type", "default")
    known = ("rope_type", "type", "rope_theta", "partial_rotary_factor", *_ROPE_KEYS.get(kind, ()))
    for key, value in parameters.items():
        if key not in known and value is not None:
            found.append(
                f"{path}: transformers does not read {key}={value!r} of rope of the kind {kind!r}, and neither does "
                "this run. A server that reads it computes another model."
            )
    return found


def padded_vocab_size(vocab_size: int, *, divisible_by: int, tensor_size: int) -> int:
    """Columns of all shards together: the smallest multiple of the divisor times the tensor-parallel size.

    >>> padded_vocab_size(17, divisible_by=8, tensor_size=2)
    32
    """
    multiple = divisible_by * tensor_size
    return -(-vocab_size // multiple) * multiple


def _values(directory: Path) -> dict[str, Any]:
    """Contents of config.json."""
    path = directory / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {error}. Save the model again with save_pretrained.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} should hold a JSON object; got {type(values).__name__}.")
    return values


def _read_by_transformers(path: Path, values: dict[str, Any]) -> Any:
    """The family's config class, with its defaults and its checks."""
    from transformers import CONFIG_MAPPING

    if values.get("quantization_config") is not None:
        raise ConfigError(f"{path}: quantization_config is set; quantized weights are not read. Choose another model.")
    try:
        with _silence():
            return CONFIG_MAPPING[values["model_type"]].from_dict(copy.deepcopy(values))
    except Exception as error:  # whatever transformers raises for a wrong value: there is no common class
        raise ConfigError(
            f"{path}: transformers refuses it ({' '.join(str(error).split())}). Fix it, or save the model again with "
            "save_pretrained."
        ) from error


def _refuse_unsupported(path: Path, config: Any) -> None:
    """Raises `ConfigError` for features that Megatron would silently compute differently from transformers."""
    family = config.model_type
    refused: dict[str, bool] = {
        "hidden_act": config.hidden_act not in ("silu", "swish"),
        # A bias on the output projection has no counterpart here.
        "attention_bias": FAMILIES[family].reads_attention_bias and bool(config.attention_bias),
        "mlp_bias": FAMILIES[family].reads_mlp_bias and bool(config.mlp_bias),
        # Layers with experts mixed with layers without.
        "decoder_sparse_step": family == "qwen3_moe" and config.decoder_sparse_step != 1,
        "mlp_only_layers": family == "qwen3_moe" and bool(config.mlp_only_layers),
        "router_jitter_noise": family == "mixtral" and config.router_jitter_noise != 0.0,
        "sliding_window": _has_window(config),
        "layer_types": config.model_type != "llama"  # transformers fails on it
        and config.sliding_window is None
        and "sliding_attention" in (getattr(config, "layer_types", None) or ()),
        # Its attention derives a width from null, its rope does not.
        "head_dim": family == "qwen2" and hasattr(config, "head_dim") and config.head_dim is None,
    }
    for key, is_refused in refused.items():
        if is_refused:
            raise ConfigError(f"{path}: {key}={getattr(config, key)!r} is not supported. Choose another model.")


def _has_window(config: Any) -> bool:
    """Whether some layer sees fewer tokens than the model has positions."""
    window = None if config.model_type == "llama" else config.sliding_window
    if window is None or window >= config.max_position_embeddings:
        return False
    # Qwen3-MoE and Mixtral have no such list: all their layers have the window.
    return config.model_type in MOE_FAMILIES or "sliding_attention" in config.layer_types


def _experts(path: Path, config: Any) -> Experts:
    """The experts of a layer."""
    is_qwen = config.model_type == "qwen3_moe"
    num_experts, top_k = config.num_local_experts if not is_qwen else config.num_experts, config.num_experts_per_tok
    if num_experts < 1:
        raise ConfigError(
            f"{path} needs num_experts (or num_local_experts), a whole number above 0; got {num_experts!r}."
        )
    if not 1 <= top_k <= num_experts:
        raise ConfigError(f"{path}: num_experts_per_tok={top_k} of {num_experts} experts. Choose another model.")
    normalized = bool(config.norm_topk_prob) if is_qwen else True
    if top_k == 1 and normalized:
        raise ConfigError(
            f"{path}: num_experts_per_tok=1 with normalized router probabilities: each is 1, and no gradient reaches "
            "the router. Choose another model."
        )
    ffn_hidden_size = config.moe_intermediate_size if is_qwen else config.intermediate_size
    return Experts(num_experts, top_k, ffn_hidden_size, normalized)


def _rope(path: Path, config: Any) -> Rope:
    """Rotary embeddings from either of transformers' formats, after transformers has normalized it."""
    parameters = config.rope_parameters
    kind, theta = parameters.get("rope_type", "default"), parameters.get("rope_theta")
    if kind not in KINDS:
        raise ConfigError(f"{path}: rope of the kind {kind!r} is not supported; supported are {', '.join(KINDS)}.")
    if not isinstance(theta, (int, float)) or isinstance(theta, bool) or theta <= 0:
        raise ConfigError(f"{path}: rope_theta should be a number above 0; got {theta!r}.")
    if kind != "default":
        if parameters.get("partial_rotary_factor", 1.0) != 1.0:  # plain rope does not read it
            raise ConfigError(f"{path}: partial_rotary_factor beside rope of the kind {kind!r} is not supported.")
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        try:
            ROPE_INIT_FUNCTIONS[kind](config)
        except (ArithmeticError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{path}: transformers cannot make rope of the kind {kind!r} of {parameters}: {error!r}."
            ) from error
    read = {key: parameters[key] for key in _ROPE_KEYS[kind] if parameters.get(key) is not None}
    return Rope(float(theta), kind, tuple(sorted(read.items())))


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Silences transformers' own messages about a config; the relevant ones are reported here."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)
