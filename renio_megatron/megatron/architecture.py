"""The architectures that can be read from Hugging Face directories: Llama, Qwen2, Qwen3, Qwen3-MoE and Mixtral."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from renio_megatron.errors import ConfigError
from renio_megatron.settings import ParallelConfig

_NEEDED = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
_NEEDED_OF_EXPERTS = {
    "qwen3_moe": ("num_experts_per_tok", "moe_intermediate_size"),
    "mixtral": ("num_experts_per_tok",),
}
FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe", "mixtral")


@dataclass(frozen=True)
class Experts:
    """The feed-forward networks of a layer with a router.

    Attributes:
        count: experts of a layer.
        chosen: of them, the ones that a token goes through: those with the largest router probabilities.
        ffn_hidden_size: of each.
        normalised: whether the probabilities of a token's chosen experts are divided by their sum.
    """

    count: int
    chosen: int
    ffn_hidden_size: int
    normalised: bool = True


@dataclass(frozen=True)
class Architecture:
    """What a model is made of, in Megatron's words.

    Attributes:
        family: one of `FAMILIES`.
        num_layers, hidden_size, ffn_hidden_size, num_attention_heads, num_query_groups, kv_channels, layernorm_epsilon,
            qk_layernorm, add_qkv_bias, init_method_std: as in Megatron's TransformerConfig.
        vocab_size: rows of the embedding, without padding.
        tied: whether the LM head is the embedding.
        rotary_base: rope theta.
        rope_scaling_factor: of Llama 3's scaled rope; None for plain rope.
        max_sequence_length: positions that the model was made for.
        experts: in every layer, each of `ffn_hidden_size`; None for a dense model.
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
    rotary_base: float
    rope_scaling_factor: float | None
    max_sequence_length: int
    experts: Experts | None = None

    @classmethod
    def from_directory(cls, directory: Path) -> Architecture:
        """Reads config.json of a Hugging Face model directory.

        Raises:
            ConfigError: a family or a feature that is not supported, named.
        """
        path = directory / "config.json"
        try:
            values = json.loads(path.read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise ConfigError(f"{path} cannot be read: {error}. Save the model again with save_pretrained.") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{path} should hold a JSON object; got {type(values).__name__}.")
        return cls.from_values(path, values)

    @classmethod
    def from_values(cls, path: Path, values: dict[str, Any]) -> Architecture:
        """The same, of what config.json holds; `path` is for the messages."""
        family = values.get("model_type")
        if family not in FAMILIES:
            raise ConfigError(f"{path}: model_type {family!r} is not supported; supported: {', '.join(FAMILIES)}.")
        needed = _NEEDED + _NEEDED_OF_EXPERTS.get(family, ())
        missing = [key for key in needed if key not in values]
        if missing:
            raise ConfigError(f"{path} lacks {', '.join(missing)}. Save the model again with save_pretrained.")
        _refuse_unsupported(path, values)
        heads = values["num_attention_heads"]
        experts = _experts(path, values) if family in _NEEDED_OF_EXPERTS else None
        rope_theta, scaling = _rope(path, values)
        return cls(
            family=family,
            num_layers=values["num_hidden_layers"],
            hidden_size=values["hidden_size"],
            ffn_hidden_size=values["intermediate_size"] if experts is None else experts.ffn_hidden_size,
            num_attention_heads=heads,
            num_query_groups=values.get("num_key_value_heads") or heads,
            kv_channels=values.get("head_dim") or values["hidden_size"] // heads,
            layernorm_epsilon=values.get("rms_norm_eps", 1e-6),
            qk_layernorm=family in ("qwen3", "qwen3_moe"),
            add_qkv_bias=family == "qwen2",
            init_method_std=values.get("initializer_range", 0.02),
            vocab_size=values["vocab_size"],
            tied=bool(values.get("tie_word_embeddings", False)),
            rotary_base=rope_theta,
            rope_scaling_factor=scaling,
            max_sequence_length=values.get("max_position_embeddings", 2048),
            experts=experts,
        )


def padded_vocab_size(vocab_size: int, parallel: ParallelConfig) -> int:
    """Columns of all shards together: the smallest multiple of the divisor times the tensor-parallel size.

    >>> padded_vocab_size(17, ParallelConfig(tensor_model_parallel_size=2, make_vocab_size_divisible_by=8))
    32
    """
    multiple = parallel.make_vocab_size_divisible_by * parallel.tensor_model_parallel_size
    return -(-vocab_size // multiple) * multiple


def _refuse_unsupported(path: Path, values: dict[str, Any]) -> None:
    """Raises `ConfigError` for what Megatron would silently compute otherwise than transformers."""
    wanted: dict[str, tuple[Any, ...]] = {
        "hidden_act": ("silu",),
        "mlp_bias": (False, None),
        "use_sliding_window": (False, None),
        "quantization_config": (None,),
        # Llama and Qwen3 put this bias on the output projection as well, which has no counterpart here.
        "attention_bias": (False, None),
        # Qwen3-MoE may mix layers with and without experts; the others have no such keys.
        "decoder_sparse_step": (1, None),
        "mlp_only_layers": ([], None),
        "router_jitter_noise": (0.0, None),
    }
    if values.get("model_type") == "mixtral":  # Qwen's have it beside use_sliding_window, which switches it on
        wanted["sliding_window"] = (None,)
    for key, allowed in wanted.items():
        value = values.get(key, allowed[0])
        if value not in allowed:
            raise ConfigError(
                f"{path}: {key}={value!r} is not supported (supported: {allowed[0]!r}). Choose another model."
            )


def _experts(path: Path, values: dict[str, Any]) -> Experts:
    """The experts of a layer; both of transformers' names for their number are read."""
    is_qwen = values["model_type"] == "qwen3_moe"
    count = values.get("num_experts", values.get("num_local_experts"))
    chosen = values["num_experts_per_tok"]
    if not isinstance(count, int) or count < 1:
        raise ConfigError(f"{path} needs num_experts (or num_local_experts), a whole number above 0; got {count!r}.")
    if not 1 <= chosen <= count:
        raise ConfigError(f"{path}: num_experts_per_tok={chosen} of {count} experts. Choose another model.")
    normalised = bool(values.get("norm_topk_prob", False)) if is_qwen else True
    if chosen == 1 and normalised:
        raise ConfigError(
            f"{path}: num_experts_per_tok=1 with normalised router probabilities: each is 1, and no gradient reaches "
            "the router. Choose another model."
        )
    return Experts(count, chosen, values["moe_intermediate_size" if is_qwen else "intermediate_size"], normalised)


def _rope(path: Path, values: dict[str, Any]) -> tuple[float, float | None]:
    """Rope theta and Llama 3's scaling factor, from either of transformers' ways to write them."""
    parameters = values.get("rope_parameters") or values.get("rope_scaling") or {}
    theta = parameters.get("rope_theta", values.get("rope_theta", 10000.0))
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return float(theta), None
    # Megatron's scaled rope has these three constants built in.
    constants = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    if kind == "llama3" and all(parameters.get(key) == value for key, value in constants.items()):
        return float(theta), float(parameters["factor"])
    raise ConfigError(
        f"{path}: rope scaling {kind!r} with {parameters} is not supported; supported are plain rope and Llama 3's "
        f"with {constants}."
    )
