"""Settings of the evaluation on held-out problems."""

from __future__ import annotations

from dataclasses import dataclass

from renio_megatron.config.validators import require_countable, require_positive
from renio_megatron.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Accuracy on held-out problems, greedy and sampled.

    Attributes:
        every: steps between evaluations; 0 never evaluates. The start and the end are evaluated as well.
        samples: number of problems.
        temperature: temperature of the sampled accuracy.
        max_completion_length: tokens after which an answer is cut; null: rollout.max_completion_length.
    """

    every: int = 0
    samples: int = 512
    temperature: float = 1.0
    max_completion_length: int | None = None

    def __post_init__(self) -> None:
        require_positive(
            "evaluate",
            samples=self.samples,
            temperature=self.temperature,
            max_completion_length=self.max_completion_length,
        )
        require_countable("evaluate", samples=self.samples)
        if self.every < 0:
            raise ConfigError(f"evaluate.every must be at least 0 (0: never); got {self.every}.")
