"""Mistakes that adapters could have, made on purpose in a part: each has to show in a case of `lora_cases`."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from tests.megatron.lora_cases import CASES, FOUR_RANKS, run_case


def _pass_on(low: torch.Tensor, group: Any) -> torch.Tensor:
    return low


def _each_parameter(change: Callable[[torch.Tensor], None]) -> Callable[[Any], Any]:
    """A mutation that changes the adapters' marks after the model is built."""

    @contextlib.contextmanager
    def mutate(part: Any) -> Iterator[None]:
        for _, parameter in part.trained_parameters():
            change(parameter)
        yield

    return mutate


def _each_module(**attributes: Any) -> Callable[[Any], Any]:
    @contextlib.contextmanager
    def mutate(part: Any) -> Iterator[None]:
        from renio_megatron.megatron.model.lora import Adapters

        for module in [m for chunk in part.chunks for m in chunk.modules() if isinstance(m, Adapters)]:
            vars(module).update(attributes)
        yield

    return mutate


def _between(*, is_column: bool, sequence_parallel: bool, does: Callable[..., Any]) -> Callable[[Any], Any]:
    @contextlib.contextmanager
    def mutate(part: Any) -> Iterator[None]:
        from renio_megatron.megatron.model import lora

        key, before = (is_column, sequence_parallel), dict(lora._BETWEEN)
        lora._BETWEEN[key] = functools.partial(before[key], tensor_parallel_output_grad=False) if does is None else does
        try:
            yield
        finally:
            lora._BETWEEN.update(before)

    return mutate


@contextlib.contextmanager
def _no_hook(part: Any) -> Iterator[None]:
    for chunk in part.chunks:
        if chunk.pre_process:
            chunk.embedding._forward_hooks.clear()
    yield


@contextlib.contextmanager
def _one_mask(part: Any) -> Iterator[None]:
    """Every target of every layer has the same masks."""
    linear = part.dropout.linear
    part.dropout.linear = lambda x, weight, keys, stream, first: linear(x, weight, keys, 5, first)
    yield


@contextlib.contextmanager
def _first_features(part: Any) -> Iterator[None]:
    """Every rank draws the first features' masks."""
    linear = part.dropout.linear
    part.dropout.linear = lambda x, weight, keys, stream, first: linear(x, weight, keys, stream, 0)
    yield


@contextlib.contextmanager
def _first_tokens(part: Any) -> Iterator[None]:
    """Every rank of a sequence-parallel group draws the first piece's masks."""
    linear = part.dropout.linear

    def with_first(x: torch.Tensor, weight: torch.Tensor, keys: torch.Tensor, stream: int, first: int) -> torch.Tensor:
        if keys.shape[0] < whole["length"]:  # a piece
            keys = whole["keys"][: keys.shape[0]]
        return linear(x, weight, keys, stream, first)

    whole: dict[str, Any] = {}
    read = part.dropout.keys

    def remember(layer: Any) -> torch.Tensor | None:
        if (keys := read(layer)) is not None:
            whole.update(keys=keys, length=keys.shape[0])
        return keys

    part.dropout.keys, part.dropout.linear = remember, with_first
    yield


@contextlib.contextmanager
def _last_micro_batch(part: Any) -> Iterator[None]:
    """A recomputed layer takes the micro-batch that was begun last."""
    passes = part.dropout._passes
    passes.read = lambda layer: (passes._current, False)
    yield


MUTANTS: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    # name -> (case, what is undone, the figure that must show it)
    "no gradient at the embedding": ("TP2, tied, recompute full", _no_hook, "gradient"),
    "no gradient at the embedding, SP": ("TP2 + SP, tied, recompute full", _no_hook, "gradient"),
    "no mark for SP": ("TP2 + SP", _each_parameter(lambda p: setattr(p, "sequence_parallel", False)), "gradient"),
    "no mark of shards": ("TP2", _each_parameter(lambda p: setattr(p, "tensor_model_parallel", False)), "grad_norm"),
    "not interleaved": ("TP1 (DP2)", _each_module(_num_groups=1), "logits"),
    "no scale": ("TP1 (DP2)", _each_module(_scale=1.0), "logits"),
    "column: not copied": ("TP2", _between(is_column=True, sequence_parallel=False, does=_pass_on), "gradient"),
    "column: gathered otherwise": ("TP2 + SP", _between(is_column=True, sequence_parallel=True, does=None), "gradient"),  # type: ignore[arg-type]
    "row: not summed": ("TP2", _between(is_column=False, sequence_parallel=False, does=_pass_on), "logits"),
    "switched off": ("TP1 (DP2)", _each_module(is_on=False), "logits"),
    "dropout: none": ("CP2, dropout", _each_module(_dropout=None), "gradient"),
    "dropout: one mask for all": ("DP2, dropout", _one_mask, "gradient"),
    "dropout: features of the first rank": ("TP2 + SP, dropout, recompute full", _first_features, "gradient"),
    "dropout: tokens of the first rank": ("TP2 + SP, dropout, packed", _first_tokens, "gradient"),
    "dropout: recomputed as the last one": ("PP2, dropout, recompute full", _last_micro_batch, "gradient"),
}
MUTANTS_OF_FOUR: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "no mark for SP, PP2": ("TP2 x PP2 + SP", MUTANTS["no mark for SP"][1], "gradient"),
    "no gradient at the embedding, PP2": ("TP2 x PP2 + SP, tied, recompute full", _no_hook, "gradient"),
    "no mark for SP, distributed optimiser": (
        "DP2 x TP2 + SP, distributed optimiser, packed",
        MUTANTS["no mark for SP"][1],
        "gradient",
    ),
    "column: not copied, DP2": (
        "DP2 x TP2, distributed optimiser, overlap",
        MUTANTS["column: not copied"][1],
        "gradient",
    ),
}


def run_named(name: str, folder: Path) -> dict[str, float]:
    """Errors on this rank of one of `CASES` or `FOUR_RANKS`, or of one of the mutants."""
    cases, mutants = {**CASES, **FOUR_RANKS}, {**MUTANTS, **MUTANTS_OF_FOUR}
    if name in cases:
        return run_case(cases[name], folder)
    case_name, mutate, _ = mutants[name]
    return run_case(cases[case_name], folder, mutate)
