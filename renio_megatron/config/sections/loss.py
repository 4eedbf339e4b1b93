"""Settings of the divergence between teacher and student."""

from __future__ import annotations

from dataclasses import dataclass

from renio_megatron.config.validators import require_choice
from renio_megatron.errors import ConfigError
from renio_megatron.objective.divergences import DIVERGENCE_INFO


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The divergence of a token, D(teacher, student).

    Attributes:
        beta: 0 is forward KL(T||S), 1 is reverse KL(S||T), between them the generalized Jensen-Shannon divergence with
            the mixture (1 - beta) S + beta T.
        divergence: name of a divergence in `objective.divergences`; null: the one that `beta` selects.
        temperature: divides both models' logits; also the temperature of the log ratios.
        entry_clip: upper bound, in nats, of every vocabulary entry of the divergence before the sum over the
            vocabulary; None disables both bounds. The authors' release uses 0.05.
        entry_floor: lower bound of every entry, used together with `entry_clip`; None bounds from above only. The
            release uses 0, which also drops the entries where the student is surer than the teacher (forward KL).

    Raises:
        ConfigError: a value out of its range.
    """

    beta: float = 0.0
    divergence: str | None = None
    temperature: float = 1.0
    entry_clip: float | None = None
    entry_floor: float | None = 0.0

    def __post_init__(self) -> None:
        info = DIVERGENCE_INFO.get(self.divergence or "")  # an unknown name is refused together with the others
        if info is not None and info.takes_beta and self.beta in (0.0, 1.0):
            raise ConfigError(
                f"loss.divergence={self.divergence} needs loss.beta strictly between 0 and 1; got {self.beta}."
            )
        if not 0.0 <= self.beta <= 1.0:
            raise ConfigError(f"loss.beta must lie in [0, 1] (0: forward KL, 1: reverse KL); got {self.beta}.")
        if not 0.0 < self.temperature < float("inf"):
            raise ConfigError(f"loss.temperature must be positive and finite; got {self.temperature}.")
        if self.entry_clip is not None and not self.entry_clip > 0.0:
            raise ConfigError(
                f"loss.entry_clip must be positive, or null for no bounds; got {self.entry_clip}. "
                "The paper's recipes use 0.05."
            )
        if self.entry_clip is not None and self.entry_floor is not None and not self.entry_floor <= 0.0:
            raise ConfigError(
                f"loss.entry_floor must be at most 0, or null for no lower bound; got {self.entry_floor}. "
                "A positive floor would add to the divergence of equal distributions."
            )


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """How logits are computed from hidden states and LM heads, a chunk of tokens at a time.

    Attributes:
        logits_dtype: `fp32`, or `bf16` for half the memory where the models are bf16. Rounded logits cost a loss with
            `entry_clip` much of its gradient's precision.
        chunk_size: tokens whose logits are in memory at a time; null: as many as 1 GiB holds, at least 2048.

    Raises:
        ConfigError: a value out of its range.
    """

    logits_dtype: str = "fp32"
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        require_choice("head.logits_dtype", self.logits_dtype, ("fp32", "bf16"))
        if self.chunk_size is not None and self.chunk_size < 1:
            raise ConfigError(f"head.chunk_size must be at least 1, or null; got {self.chunk_size}.")
