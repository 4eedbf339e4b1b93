"""Dropout whose mask is a function of the token: the same in every layout, and found again without being kept.

A generator's state follows the order of the calls, so its masks depend on how a batch is cut into micro-batches, ranks
and pieces of sequences. Here each token has a key, made of its prompt's place in the run and its position, and each
place of the network a stream; SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014)
counts from there. A shard of the features draws its own part of the row.
"""

from __future__ import annotations

from typing import Any

import torch

from renio_megatron.types import MicroBatch

_GAMMA, _FIRST, _SECOND = (
    value - 2**64 if value >= 2**63 else value for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)
"""SplitMix64's increment and multipliers; int64 wraps around."""
_LANES, _LEVELS = 4, 2**16
"""Features that share a word of 64 bits, and the values that each of them has in it."""


def token_keys(micro_batch: MicroBatch) -> torch.Tensor:
    """A key for each of the tokens that a rank reads, int64 [S, B]; that of padding is not defined."""
    number = micro_batch.prompt_index[micro_batch.sequence_of.clamp(min=0)]
    return _mixed(_mixed(number) + micro_batch.position_ids).transpose(0, 1)


class TokenDropout:
    """Zeroes features of tokens, and scales the others up.

    Attributes:
        keep: probability with which a feature is kept: 1 - p, rounded to 1 / 65536.
    """

    def __init__(self, p: float) -> None:
        """`p` is the probability with which a feature becomes 0, in (0, 1)."""
        dropped = min(max(round(p * _LEVELS), 1), _LEVELS - 1)
        self.keep = 1.0 - dropped / _LEVELS
        self._below = dropped - _LEVELS // 2

    def mask(self, keys: torch.Tensor, stream: int, features: range) -> torch.Tensor:
        """Where features are dropped, bool [..., len(features)].

        Args:
            keys: of the tokens, int64 [...].
            stream: number of the place in the network, below 2**63.
            features: those of this rank, of all of the row's.
        """
        first, last = features.start // _LANES, -(-features.stop // _LANES)
        counter = torch.arange(first + 1, last + 1, device=keys.device).mul_(_GAMMA)
        words = _mixed_((keys ^ stream).unsqueeze(-1) + counter)
        lanes = words.view(torch.int16)[..., features.start - first * _LANES :][..., : len(features)]
        return lanes < self._below

    def linear(
        self, x: torch.Tensor, weight: torch.Tensor, keys: torch.Tensor, stream: int, first_feature: int = 0
    ) -> torch.Tensor:
        """Product of the tokens' features, some of them dropped: [..., in] -> [..., out].

        The mask is drawn once more in backward; of the forward pass x alone is kept, as without dropout.

        Args:
            x: features [..., in], of which the row has others on other ranks.
            weight: [out, in].
            keys: of the tokens, int64 [...].
            stream: number of the place in the network.
            first_feature: the number of the first of x's features in the row.
        """
        features = range(first_feature, first_feature + x.shape[-1])
        return _Linear.apply(x, weight, keys, self, stream, features)


class _Linear(torch.autograd.Function):
    """The product of `TokenDropout.linear`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        keys: torch.Tensor,
        dropout: TokenDropout,
        stream: int,
        features: range,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight, keys)
        ctx.drawn = (dropout, stream, features)
        kept = x.masked_fill(dropout.mask(keys, stream, features), 0.0)
        return torch.nn.functional.linear(kept, weight).div_(dropout.keep)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, keys = ctx.saved_tensors
        dropout, stream, features = ctx.drawn
        mask = dropout.mask(keys, stream, features)
        gradient = gradients[0] / dropout.keep
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            of_x = (gradient @ weight).masked_fill_(mask, 0.0)
        if ctx.needs_input_grad[1]:
            of_weight = gradient.flatten(0, -2).t() @ x.masked_fill(mask, 0.0).flatten(0, -2)
        return of_x, of_weight, None, None, None, None


def _mixed(values: torch.Tensor) -> torch.Tensor:
    """SplitMix64's output for a state, int64."""
    return _mixed_(values.clone())


def _mixed_(values: torch.Tensor) -> torch.Tensor:
    """The same in place."""
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        values.bitwise_xor_(_shifted(values, shift)).mul_(factor)
    return values.bitwise_xor_(_shifted(values, 31))


def _shifted(values: torch.Tensor, by: int) -> torch.Tensor:
    """Shifted right, with zeros from the left."""
    return (values >> by).bitwise_and_((1 << (64 - by)) - 1)
