"""Model directories, each with one thing wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from tests.helpers.training_cases import save_models


def save_broken_models(folder: Path) -> None:
    """`student`, `teacher`, a recipe that runs, and broken relatives of the student."""
    save_models(folder)
    recipe: dict[str, Any] = {
        "model": str(folder / "student"),
        "teacher": {"model": str(folder / "teacher")},
        "rollout": {"max_completion_length": 4},
        "train": {"train_iters": 1, "global_batch_size": 8, "micro_batch_size": 4},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "no_config").mkdir()
    for name, changes in CONFIG_CHANGES.items():
        _change(shutil.copytree(folder / "student", folder / name), **changes)
    (shutil.copytree(folder / "student", folder / "no_weights") / "model.safetensors").unlink()
    weights = shutil.copytree(folder / "student", folder / "cut_weights") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    _other_tokenizer(shutil.copytree(folder / "teacher", folder / "other_tokenizer"))
    odd = shutil.copytree(folder / "student", folder / "odd_generation") / "generation_config.json"
    odd.write_text("[2]")


CONFIG_CHANGES: dict[str, dict[str, Any]] = {
    "three_heads": {"num_attention_heads": 3, "num_key_value_heads": 3},
    "odd_groups": {"num_attention_heads": 6, "num_key_value_heads": 3},
    "three_layers": {"num_hidden_layers": 3, "layer_types": None},
    "mamba": {"model_type": "mamba"},
    "no_heads": {"num_attention_heads": 0},
    "no_hidden_size": {"hidden_size": None},
    "small_vocabulary": {"vocab_size": 12},
    "other_mlp": {"intermediate_size": 48},
    "other_groups": {"num_key_value_heads": 4},
    "other_vocabulary": {"vocab_size": 32},
    "short": {"max_position_embeddings": 16},
}


def _change(directory: Path, **changes: Any) -> None:
    """Changes config.json; None removes a key."""
    values = json.loads((directory / "config.json").read_text()) | changes
    kept = {key: value for key, value in values.items() if value is not None or key not in changes}
    (directory / "config.json").write_text(json.dumps(kept))


def _other_tokenizer(directory: Path) -> None:
    """A tokenizer of as many tokens, in another order."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({symbol: index for index, symbol in enumerate("$9876543210+-*=^#")}))
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="$", pad_token="#").save_pretrained(str(directory))
