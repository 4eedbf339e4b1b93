"""Settings of low-rank adapters (LoRA), under PEFT's names."""

from __future__ import annotations

import math
from dataclasses import dataclass

from renio_megatron.config.validators import require_positive
from renio_megatron.errors import ConfigError

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers that can have an adapter, by their names in Hugging Face's Llama, Qwen2 and Qwen3."""


OF_ATTENTION = TARGETS[:4]
"""Targets in a layer's attention; the others are in its feed-forward network."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """A trained pair A [r, in] and B [out, r] for each chosen linear layer W, which computes W x + scale B A x.

    Everything else is frozen: only adapters have gradients and optimizer state, and only they are in checkpoints.

    Attributes:
        r: rank of the adapters; null: no adapters, the whole student is trained.
        alpha: numerator of the scale, PEFT's `lora_alpha`.
        dropout: PEFT's `lora_dropout`, the share of the adapters' input features that training steps set to 0, rounded
            to 1/65536; a function of the token and train.seed, the same in every layout.
        use_rslora: the scale is alpha / sqrt(r) in place of alpha / r.
        targets: which of `TARGETS` have an adapter, PEFT's `target_modules`; null: all of them.
        adapter: directory of a PEFT adapter whose weights the run starts with; null: A is random and B is 0.
    """

    r: int | None = None
    alpha: float = 16.0
    dropout: float = 0.0
    use_rslora: bool = False
    targets: list[str] | None = None
    adapter: str | None = None

    def __post_init__(self) -> None:
        require_positive("lora", r=self.r, alpha=self.alpha)
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"lora.dropout must lie in [0, 1); got {self.dropout}. PEFT's usual value is 0.05.")
        if self.targets is None:
            return
        unknown = [name for name in self.targets if name not in TARGETS]
        if unknown:
            raise ConfigError(
                f"lora.targets: {', '.join(map(repr, unknown))} cannot have an adapter; the targets are "
                f"{', '.join(TARGETS)}. Name some of these, or set null for all."
            )
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise ConfigError(
                f"lora.targets must name at least one target, and each once; got {list(self.targets)}. "
                "Set null for all."
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The chosen targets in the order of `TARGETS`; none without adapters."""
        if self.r is None:
            return ()
        return tuple(name for name in TARGETS if self.targets is None or name in self.targets)

    @property
    def scale(self) -> float:
        """Factor by which B A x is multiplied.

        >>> LoraConfig(r=4, alpha=8.0).scale, LoraConfig(r=4, alpha=8.0, use_rslora=True).scale
        (2.0, 4.0)
        """
        assert self.r is not None
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)
