"""Settings of rollouts: how the student samples its completions."""

from __future__ import annotations

from dataclasses import dataclass

from renio_megatron.config.validators import require_choice, require_positive
from renio_megatron.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How the student samples its completions.

    Attributes:
        temperature: divides the logits before sampling.
        top_p: keep the smallest set of tokens with at least this probability; null keeps all.
        top_k: keep this many tokens; null keeps all.
        max_completion_length: tokens after which a completion is cut.
        completions_per_prompt: completions of each prompt; train.global_batch_size counts completions.
        prefix: the run trains on prefixes, completions that are cut on purpose; no warnings about cut completions.
        prefix_length: weights and loss read at most so many tokens of a completion, from its first on; verdicts and
            metrics of rollouts read all of it; null: all tokens.
        stop_token_ids, stop_strings: tokens, and texts inside a completion, that end it in addition to those of the
            model; null: none.
        student_scores: `sampler` takes the student's log-probabilities from sampling, `recompute` from a forward-only
            pass before the update.
        micro_batch_size: sequences sampled at a time, null: all of the rank's.
        log: write the first data-parallel rank's rollouts of each step to `rollouts.jsonl` in output_dir.
    """

    temperature: float = 1.0
    top_p: float | None = None
    top_k: int | None = None
    max_completion_length: int = 1024
    student_scores: str = "sampler"
    micro_batch_size: int | None = None
    log: bool = False
    completions_per_prompt: int = 1
    prefix: bool = False
    prefix_length: int | None = None
    stop_token_ids: list[int] | None = None
    stop_strings: list[str] | None = None

    def __post_init__(self) -> None:
        require_positive(
            "rollout",
            temperature=self.temperature,
            top_k=self.top_k,
            max_completion_length=self.max_completion_length,
            micro_batch_size=self.micro_batch_size,
            completions_per_prompt=self.completions_per_prompt,
            prefix_length=self.prefix_length,
        )
        if self.prefix_length is not None and self.prefix_length >= self.max_completion_length:
            raise ConfigError(
                f"rollout.prefix_length={self.prefix_length} has no effect: completions have at most "
                f"rollout.max_completion_length={self.max_completion_length} tokens. Leave it out; or raise the "
                "latter, where completions are to go on behind the prefix."
            )
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"rollout.top_p must lie in (0, 1], or be null; got {self.top_p}.")
        require_choice("rollout.student_scores", self.student_scores, ("sampler", "recompute"))
        if any(token < 0 for token in self.stop_token_ids or ()):
            raise ConfigError(f"rollout.stop_token_ids are token ids, from 0 on; got {self.stop_token_ids}.")
        if "" in (self.stop_strings or ()):
            raise ConfigError("rollout.stop_strings: an empty text ends every completion at once. Remove it.")
