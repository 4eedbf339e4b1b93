"""Model weights of this package's checkpoints, and the check that a checkpoint is of the same model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NoReturn

from megatron.core import dist_checkpointing
from torch.distributed.checkpoint import CheckpointException

from renio_megatron.errors import CheckpointError, Scope
from renio_megatron.megatron.checkpoint.directory import advice
from renio_megatron.megatron.checkpoint.sharded_state import restore_weights, sharded_weights
from renio_megatron.megatron.model.build import ModelPart
from renio_megatron.megatron.model.lora import lora_form
from renio_megatron.models.param_map import VOCABULARY

_LOST_PEER_WORDS = ("gloo", "NCCL", "Connection closed", "Connection reset")


def load_model_weights(directory: Path, part: ModelPart, base: str | None = None) -> None:
    """Fills a model, in any layout, from the weights in a checkpoint.

    Raises:
        CheckpointError: a checkpoint of another model, or one that cannot be read.
    """
    check_same_model(directory, part, base)
    try:
        loaded = dist_checkpointing.load({"model": sharded_weights(part)}, str(directory))
    except (Exception, CheckpointException) as error:
        refuse(directory, error)
    restore_weights(part, loaded["model"])


def saved_base(directory: Path) -> str | None:
    """The fingerprint of the base weights of a checkpoint's adapters; None without one, or for other programs' files.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        base = dist_checkpointing.load_common_state_dict(str(directory)).get("base")
    except (Exception, CheckpointException) as error:
        refuse(directory, error)
    return base if isinstance(base, str) else None


def check_same_model(directory: Path, part: ModelPart, base: str | None = None) -> dict[str, Any]:
    """Checks that a checkpoint is of this model, and returns its state that is independent of ranks.

    Args:
        directory: the checkpoint.
        part: the model that it is for.
        base: fingerprint of the base weights of the adapters of `part`; None where it has none.

    Raises:
        CheckpointError: it was not written by this package, is of another architecture than `part`, of other adapters,
            or its adapters were trained on other base weights.
    """
    try:
        common = dist_checkpointing.load_common_state_dict(str(directory))
    except (Exception, CheckpointException) as error:
        refuse(directory, error)
    saved = common.get("architecture")
    if not isinstance(saved, dict) or "run" not in common:
        raise CheckpointError(
            f"the checkpoint {directory} was written by another program: it holds no `architecture` and `run`. "
            "To start from its weights, give it as `pretrained_checkpoint`.",
            scope=Scope.ALL_RANKS,
        )
    saved, wanted = _in_names_of_now(saved), dataclasses.asdict(part.architecture)
    differing = [
        f"{key}: {saved.get(key)} there, {wanted[key]} here" for key in wanted if saved.get(key) != wanted[key]
    ]
    if differing:
        raise CheckpointError(
            f"the checkpoint {directory} is of another architecture ({'; '.join(differing)}). "
            "Point `model` back to the model that the run started from, or start again with --fresh.",
            scope=Scope.ALL_RANKS,
        )
    lora, own_lora = common.get("lora"), lora_form(part.lora)
    if lora != own_lora:
        raise CheckpointError(
            f"the checkpoint {directory} holds {_what_is_trained(lora)}, and {_what_is_trained(own_lora)} would be "
            "read from it. Set `lora` as in the run that wrote it; or write its model with `renio export` (--merge for "
            "adapters), and give that directory as `model`.",
            scope=Scope.ALL_RANKS,
        )
    if common.get("base") != base:
        raise CheckpointError(
            f"the checkpoint {directory} holds adapters, which were trained beside other weights than those of `model` "
            "(or `pretrained_checkpoint`): these have changed, or are another model's. Point the setting to the "
            "weights that the run started from, unchanged, or start again with --fresh.",
            scope=Scope.ALL_RANKS,
        )
    _check_rows(directory, part)
    return common


def _check_rows(directory: Path, part: ModelPart) -> None:
    """Raises `CheckpointError` where a checkpoint lacks rows of the model's vocabulary, which would load as zeros."""
    try:
        found = dist_checkpointing.load_tensors_metadata(str(directory))
    except (Exception, CheckpointException) as error:
        refuse(directory, error)
    lacking = [key for key in VOCABULARY if key in found and found[key].global_shape[0] < part.architecture.vocab_size]
    if lacking:
        raise CheckpointError(
            f"the checkpoint {directory} holds {found[lacking[0]].global_shape[0]} rows of {lacking[0]!r}, and the "
            f"model has {part.architecture.vocab_size}: an earlier version of this package wrote it, which left out "
            "rows beyond the vocabulary that student and teacher share. Export it with that version, or start again "
            "with --fresh.",
            scope=Scope.ALL_RANKS,
        )


_RENAMED_OF_EXPERTS = {"count": "num_experts", "chosen": "top_k"}
"""Names of `Experts` in checkpoints that were written before 2026-11-27."""


def _in_names_of_now(architecture: dict[str, Any]) -> dict[str, Any]:
    """An architecture with the current names, as from `dataclasses.asdict`.

    >>> _in_names_of_now({"num_layers": 2, "experts": {"count": 8, "chosen": 2, "normalized": True}})["experts"]
    {'num_experts': 8, 'top_k': 2, 'normalized': True}
    """
    experts = architecture.get("experts")
    if not isinstance(experts, dict):
        return architecture
    return {**architecture, "experts": {_RENAMED_OF_EXPERTS.get(name, name): value for name, value in experts.items()}}


def _what_is_trained(lora: dict[str, Any] | None) -> str:
    if lora is None:
        return "a whole model (lora.r: null)"
    return f"adapters ({', '.join(f'lora.{key}: {value}' for key, value in lora.items())})"


def refuse(directory: Path, error: BaseException) -> NoReturn:
    """Raises `CheckpointError` about a checkpoint that cannot be read, unless a peer was lost."""
    if isinstance(error, RuntimeError) and any(word in str(error) for word in _LOST_PEER_WORDS):
        raise error
    raise CheckpointError(
        f"the checkpoint {directory} cannot be read ({reason(error)}). {advice(directory)}"
    ) from error


def reason(error: BaseException) -> str:
    """One line about the first cause; torch's own message contains the traceback of every rank."""
    if isinstance(error, CheckpointException):
        if not error.failures:
            return "a writer failed; the first rank says more"
        rank, (cause, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {type(cause).__name__}: {cause}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return f"{type(error).__name__}: {error}"
