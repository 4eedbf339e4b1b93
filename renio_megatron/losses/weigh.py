"""The weights of one strategy: its sums over context-parallel pieces, and the means that normalize them.

Strategies are plain mathematics on local tokens. The collectives over ranks that share a sequence or the batch are in
this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from renio_megatron.config import WeightingConfig
from renio_megatron.config.lazy import imported
from renio_megatron.errors import ConfigError, LayoutError
from renio_megatron.objective.normalize import divide_and_cap, moving_average
from renio_megatron.objective.weightings import INPUTS
from renio_megatron.objective.weightings.strategy import Strategy, WeightingInputs
from renio_megatron.parallel.reductions import batch_mean, gather_shares, group_means, sum_over_group

PER_TOKEN = INPUTS[: INPUTS.index("position") + 1]
"""Inputs per token: a piece of a sequence has only those of its own tokens."""


@dataclass(frozen=True)
class Groups:
    """Groups of ranks with other sequences of the batch, and with other pieces of the same ones; None: there are
    none."""

    batch: dist.ProcessGroup | None = None
    sequence: dist.ProcessGroup | None = None

    @property
    def has_pieces(self) -> bool:
        """Whether sequences are in pieces."""
        return self.sequence is not None and self.sequence.size() > 1


@dataclass(frozen=True)
class Finished:
    """Result of one strategy.

    Attributes:
        sequences: weights [B]; None: 1.
        tokens: weights of the local tokens [N]; None: 1.
        kept: which of them count, bool [N]; None: all.
        batch_size: sequences of the batch, fp64 scalar; None where it was not computed.
        state: state of a moving average, scalar; None where there is none.
    """

    sequences: torch.Tensor | None
    tokens: torch.Tensor | None
    kept: torch.Tensor | None
    batch_size: torch.Tensor | None = None
    state: torch.Tensor | None = None


def strategy_of(config: WeightingConfig) -> Strategy:
    """The strategy of these settings; it may wrap another one."""
    of = () if config.inner is None else (strategy_of(config.inner),)
    return imported(config.strategy)(config, *of)


class Weigher:
    """A strategy, its settings, and its inputs."""

    def __init__(self, config: WeightingConfig, given: WeightingInputs) -> None:
        """Raises `ConfigError` where an input that the strategy needs is missing."""
        if missing := sorted(config.needs - given.values.keys()):
            raise ConfigError(
                f"weighting '{config.name}' needs {', '.join(missing)}, and `inputs` has no such thing: give it as "
                f"inputs={{{missing[0]!r}: ...}}. objective.weightings.strategy.WeightingInputs says what each is."
            )
        self.config, self.strategy, self.inputs = config, strategy_of(config), given.only(config.needs)

    def finished(
        self, lengths: torch.Tensor, sums: Mapping[str, torch.Tensor], groups: Groups, state: torch.Tensor | None
    ) -> Finished:
        """The strategy's weights.

        Args:
            lengths: tokens of each whole sequence.
            sums: the strategy's sums over whole sequences, by name, where they are additive.
            groups: ranks with the other sequences, and with the other pieces of these.
            state: state of a moving average, before this step.
        """
        self.inputs.lengths = lengths
        if self.strategy.is_additive:
            return self._finished(self.inputs, sums, groups, state)
        if not groups.has_pieces:
            return self._finished(self.inputs, self.strategy.sums(self.inputs), groups, state)
        whole, mine = whole_sequences(self.inputs, groups)
        found = self._finished(whole, self.strategy.sums(whole), Groups(groups.batch), state)
        tokens, kept = (None if values is None else values[mine] for values in (found.tokens, found.kept))
        return Finished(found.sequences, tokens, kept, found.batch_size, found.state)

    def _finished(
        self, inputs: WeightingInputs, sums: Mapping[str, torch.Tensor], groups: Groups, state: torch.Tensor | None
    ) -> Finished:
        raw, size = self.strategy.weights(inputs, sums), None
        # A strategy may give counts or masks, and look at what carries a gradient.
        sequences, tokens = (
            None if one is None else one.detach().to(inputs.lengths.dtype) for one in (raw.sequences, raw.tokens)
        )
        kept = raw.kept
        if sequences is not None:
            sequences, size, state = self._divided(sequences, groups, state)
        if tokens is not None:
            tokens = self._tokens_divided(tokens, raw.kept, inputs, groups)
        if sequences is not None and self.strategy.rearranges:
            everyones, mine = gather_shares(sequences, groups.batch)
            numbers, _ = gather_shares(inputs.sequence, groups.batch)
            sequences = self.strategy.sequences(everyones, numbers, inputs)[mine]
        if tokens is not None and self.strategy.rearranges:
            tokens = self.strategy.tokens(tokens, inputs)
        if kept is not None and self.strategy.rearranges:
            kept = self.strategy.tokens(kept.to(inputs.lengths.dtype), inputs) > 0
        return Finished(sequences, tokens, kept, size, state)

    def _divided(
        self, raw: torch.Tensor, groups: Groups, state: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """(weights, sequences of the batch, the new state)."""
        settings: Any = self.config.normalized
        if settings.divisor == "group":
            means, size = group_means(raw, settings.group_size, groups.batch)
            return divide_and_cap(raw, means, settings.bound), size, state
        mean, size = batch_mean(raw, groups.batch)
        if settings.divisor == "ema":
            state = moving_average(mean, state, settings.ema_decay)
            return divide_and_cap(raw, state, None), size, state
        if settings.divisor == "batch":
            return divide_and_cap(raw, mean, settings.bound), size, state
        return self._undivided(raw), size, state

    def _tokens_divided(
        self, raw: torch.Tensor, kept: torch.Tensor | None, inputs: WeightingInputs, groups: Groups
    ) -> torch.Tensor:
        """Weights of tokens over their mean, of each sequence or of the batch; 1 where the mean is 0."""
        divisor = self.config.divisor
        if divisor not in ("batch", "unit_mean"):
            return self._undivided(raw)
        count = torch.ones_like(raw) if kept is None else kept.to(raw.dtype)
        totals = torch.stack((inputs.sum_of(raw * count), inputs.sum_of(count)), dim=1).double()
        totals = sum_over_group(totals, groups.sequence)
        if divisor == "batch":
            totals = sum_over_group(totals.sum(0, keepdim=True), groups.batch).expand(inputs.num_sequences, 2)
        mean_N = (totals[:, 0] / totals[:, 1].clamp(min=1.0)).to(raw.dtype)[inputs.owner]
        return torch.where(mean_N == 0, 1.0, raw / torch.where(mean_N == 0, 1.0, mean_N))

    def _undivided(self, raw: torch.Tensor) -> torch.Tensor:
        """The weights unnormalized; raises `ConfigError` where the settings name a mean that the strategy lacks."""
        if self.config.divisor != "none":
            raise ConfigError(
                f"weighting '{self.config.name}' gives weights that have no mean called {self.config.divisor!r}: that "
                f"is one of {'sequences' if self.config.divisor in ('group', 'ema') else 'tokens'} alone. Choose "
                "another weighting.normalize."
            )
        return raw


def whole_sequences(inputs: WeightingInputs, groups: Groups) -> tuple[WeightingInputs, slice]:
    """The tokens of all pieces of these sequences, rank after rank, and where this rank's are; two collectives.

    Raises:
        LayoutError: the position of tokens in their sequence is not given.
    """
    values = inputs.values
    if "position" not in values:
        raise LayoutError(
            "this weighting wants whole sequences, and they are in pieces: give inputs={'position': ...}, the place of "
            "each token in its completion."
        )
    names = [name for name in PER_TOKEN if name in values and name != "position"]
    dtype = torch.float64 if any(values[name].dtype == torch.float64 for name in names) else torch.float32
    places, mine = gather_shares(torch.stack((inputs.owner, values["position"]), dim=1), groups.sequence)
    columns = [values[name].to(dtype) for name in names]
    floats = torch.stack(columns, dim=1) if columns else places.new_zeros(len(inputs.owner), 0, dtype=dtype)
    everyones, _ = gather_shares(floats, groups.sequence)
    whole = {**values, **dict(zip(names, everyones.unbind(1), strict=True)), "position": places[:, 1]}
    found = WeightingInputs(places[:, 0], inputs.num_sequences, whole)
    found.lengths = inputs.lengths
    return found, mine
