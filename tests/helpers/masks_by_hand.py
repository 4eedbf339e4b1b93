"""Masks of dropout by numpy's unsigned integers: SplitMix64 as it is published, and the keys of tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

GAMMA = np.uint64(0x9E3779B97F4A7C15)
PLACES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def mixed(state: np.ndarray) -> np.ndarray:
    """SplitMix64's output for states, uint64."""
    with np.errstate(over="ignore"):
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def splitmix64(seed: np.ndarray, count: int) -> np.ndarray:
    """The first outputs of generators, uint64 [..., count]."""
    with np.errstate(over="ignore"):
        return mixed(seed[..., None] + GAMMA * np.arange(1, count + 1, dtype=np.uint64))


def mask_by_hand(p: float, prompt_index: int, length: int, stream: int, width: int) -> np.ndarray:
    """Where features of a sequence's tokens are dropped, bool [length, width].

    Four features of 16 bits, the lowest first, share an output; the lowest signed values are dropped.
    """
    with np.errstate(over="ignore"):
        keys = mixed(mixed(np.array([prompt_index], np.uint64)) + np.arange(length, dtype=np.uint64))
    words = splitmix64(keys ^ np.uint64(stream), -(-width // 4))
    lanes = np.stack([(words >> np.uint64(16 * k)) & np.uint64(0xFFFF) for k in range(4)], axis=-1)
    lanes = lanes.reshape(length, -1)[:, :width].astype(np.int64)
    return (lanes + 2**15) % 2**16 < round(p * 2**16)


def stream_of(seed: int, layer: int, target: str) -> int:
    """The stream of an adapter's masks."""
    sequence = np.random.SeedSequence((seed, layer, PLACES.index(target), 1))
    return int(sequence.generate_state(1, np.uint64)[0]) >> 1


class DropoutByHand(torch.nn.Module):
    """Takes the place of an adapter's dropout in PEFT; `number` is the prompt whose sequence is read next.

    Example: ``module.lora_dropout["default"] = DropoutByHand(0.05, seed, layer, "q_proj", state)``.
    """

    def __init__(self, p: float, seed: int, layer: int, target: str, state: dict[str, Any]) -> None:
        super().__init__()
        self._p, self._stream, self._state = p, stream_of(seed, layer, target), state

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        number = self._state.get("number")
        if number is None:
            return x
        mask = torch.from_numpy(mask_by_hand(self._p, number, x.shape[-2], self._stream, x.shape[-1]))
        return x.masked_fill(mask, 0.0) / (1.0 - round(self._p * 2**16) / 2**16)
