"""What config.json may leave out of what layouts depend on: the numbers of transformers' own classes.

Written down so that a recipe is checked against its models before torch and transformers are imported; a test compares
them with the classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_DENSE = {"num_attention_heads": 32, "num_hidden_layers": 32}

FAMILY_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": _DENSE,
    "qwen2": {**_DENSE, "num_key_value_heads": 32},
    "qwen3": {**_DENSE, "num_key_value_heads": 32},
    "qwen3_moe": {
        "num_attention_heads": 32,
        "num_hidden_layers": 24,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "moe_intermediate_size": 768,
    },
    "mixtral": {**_DENSE, "num_key_value_heads": 8, "num_local_experts": 8, "intermediate_size": 14336},
}
"""By family. A model without `num_key_value_heads`, there or here, has as many as attention heads."""
