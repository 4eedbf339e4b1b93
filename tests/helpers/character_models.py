"""Models whose tokens are single characters, small enough to train a step in no time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def save_character_model(folder: Path, tokenizer: Any, *, seed: int) -> None:
    """Writes a random model of one layer for a tokenizer, and the tokenizer, as a Hugging Face directory."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=2048,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
