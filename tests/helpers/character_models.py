"""Models whose tokens are single characters, small enough to train a step in no time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def save_character_model(folder: Path, tokenizer: Any, *, seed: int) -> None:
    """Writes a random model of one layer for a tokenizer, and the tokenizer, as a Hugging Face directory."""
    torch.manual_seed(seed)
    _model(len(tokenizer), 16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_successor_model(folder: Path, tokenizer: Any, followers: Mapping[str, str], *, sure: float = 12.0) -> None:
    """Writes a model that knows only which characters follow one, and the tokenizer, as a Hugging Face directory.

    Args:
        folder: where to.
        tokenizer: characters, and marks of more than one.
        followers: a token -> the characters behind it, alike likely; behind another token all are.
        sure: nats by which they are above the others.
    """
    size = len(tokenizer)
    model = _model(size, size)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()  # what a layer adds is nothing: a token's row goes on to the head
        model.get_input_embeddings().weight.copy_(torch.eye(size))
        head = model.get_output_embeddings().weight.zero_()
        for token, characters in followers.items():
            for character in characters:
                after, before = (tokenizer.convert_tokens_to_ids(one) for one in (character, token))
                head[after, before] = sure / size**0.5  # the norm before the head makes a row of 1 one of sqrt(size)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _model(vocab_size: int, hidden_size: int) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=2048,
    )
    return Qwen3ForCausalLM(config)
