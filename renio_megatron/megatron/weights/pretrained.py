"""Loading of pretrained weights from a Hugging Face directory or a Megatron checkpoint.

A checkpoint of Megatron's format `torch_dist`, as Megatron-LM, other frameworks on megatron-core and this package write
it, holds each tensor once under a name of the whole model, so that it can be read in any layout.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import force_all_tensors_to_non_fp8
from torch.distributed.checkpoint import CheckpointException

from renio_megatron.errors import ConfigError, Scope
from renio_megatron.files import sampled
from renio_megatron.megatron.checkpoint.sharded_state import restore_weights, sharded_model
from renio_megatron.megatron.model.build import ModelPart
from renio_megatron.megatron.model.lora import is_adapter
from renio_megatron.megatron.model.te_modules import fill, is_quantized, values_of
from renio_megatron.megatron.weights.hf import Change, load_weights
from renio_megatron.models.architecture import Architecture
from renio_megatron.models.finite import require_finite
from renio_megatron.models.hf_weights import WeightFiles, hf_shapes
from renio_megatron.models.param_map import VOCABULARY, Slice
from renio_megatron.parallel.collectives import gather_objects

_OPTIMIZERS = ("optimizer.", "chained_")
_MAX_NAMED = 3
_SAMPLED_ROWS = 8
_BLOCKS = 64


def is_checkpoint(source: Path) -> bool:
    """Whether weights are in a checkpoint that Megatron wrote, not in Hugging Face's files."""
    return (source / "metadata.json").is_file()


def load_pretrained(
    part: ModelPart,
    source: Path,
    *,
    title: str = "model",
    report: Callable[[str], None] | None = None,
    change: Change | None = None,
) -> None:
    """Fills this rank's parameters; adapters are not changed. For a checkpoint every rank must call it.

    Args:
        part: the parameters, whatever they hold.
        source: a Hugging Face directory, or a checkpoint from `directory.find_pretrained`.
        title, report, change: for a Hugging Face directory alone, see `hf.load_weights`.

    Raises:
        ConfigError: tensors that are missing, surplus or of another shape, or files that cannot be read.
    """
    if not is_checkpoint(source):
        load_weights(part, source, title=title, report=report, change=change)
        return
    assert change is None  # checked in the recipe
    found = _tensors_of(source)
    layers = {"non_homogeneous_layers": any(key.startswith("decoder.layers.0.") for key in found)}
    layers["singleton_local_shards"] = any(key.endswith("linear_fc1.weight_w") for key in found)
    state = sharded_model(part, layers)
    _check(source, part, found, _wanted(state))
    force_all_tensors_to_non_fp8(state)  # newer versions quantize tensors to FP8 while reading
    try:
        loaded = dist_checkpointing.load({"model": state}, str(source))
    except (Exception, CheckpointException) as error:  # Megatron, torch and the disk; torch's is not an Exception
        raise ConfigError(f"the checkpoint {source} cannot be read ({type(error).__name__}: {error}).") from error
    restore_weights(part, loaded["model"])
    with torch.no_grad():
        for number, chunk in enumerate(part.chunks):
            for name, parameter in chunk.named_parameters():
                if is_quantized(parameter):  # and keeps its initial value, which the optimizer would start with
                    fill(parameter, loaded["model"][str(number)][name].to(parameter.dtype))
    _clear_padding(part)
    for name, parameter in part.named_parameters():
        if not is_adapter(name):
            require_finite(values_of(parameter), f"the checkpoint {source}: {name}")


def start_of(base: str | None) -> str | None:
    """The initialization whose initial adapters were subtracted, from a `fingerprint`; None: none were.

    >>> start_of("pissa:0123"), start_of("0123"), start_of(None)
    ('pissa', None, None)
    """
    start, colon, _ = (base or "").partition(":")
    return start if colon else None


def fingerprint(source: Path, architecture: Architecture, start: str | None = None) -> str:
    """A hash of a model's weights, which differs for weights that were trained, edited or quantized.

    From a Hugging Face directory: the values of every vector and of eight rows of every matrix, so a copy in other
    files or in a wider dtype has the same hash; a change in other rows alone is not detected. From a checkpoint: the
    files' sizes, the index, and 64 blocks of each file. A few megabytes are read.

    Args:
        source: as in `load_pretrained`.
        architecture: the model.
        start: initialization that is subtracted, as in `peft_config.PeftAdapter`; the hash begins with it.

    Raises:
        ConfigError: files that cannot be read.
    """
    digest = hashlib.sha256()
    for part in _blocks(source) if is_checkpoint(source) else _samples(source, architecture):
        digest.update(part)
    return f"{start}:{digest.hexdigest()[:32]}" if start else digest.hexdigest()[:32]


def _samples(directory: Path, architecture: Architecture) -> Iterator[bytes]:
    files = WeightFiles(directory)
    files.check(architecture)
    shapes = hf_shapes(architecture)
    digests = {}
    for file in sorted({files.file_of(name) for name in shapes}):
        with files.open(file) as handle:
            for name in (name for name in shapes if files.file_of(name) == file):
                digest = hashlib.sha256(f"{name} {shapes[name]}".encode())
                for start, stop in _rows(shapes[name]):
                    values = files.read(handle, Slice(name, start, stop))
                    digest.update(values.to(torch.float32).contiguous().numpy().tobytes())
                digests[name] = digest.digest()
    for name in sorted(digests):
        yield digests[name]


def _rows(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """[first, last) ranges: the whole of a vector; for a matrix, rows spread from the first to the last."""
    if len(shape) == 1:
        return [(0, shape[0])]
    count = min(_SAMPLED_ROWS, shape[0])
    starts = [number * (shape[0] - 1) // max(1, count - 1) for number in range(count)]
    return [(start, start + 1) for start in starts]


def _blocks(directory: Path) -> Iterator[bytes]:
    try:
        for file in sorted(directory.iterdir()):
            if file.name != ".metadata" and file.suffix != ".distcp":
                continue
            yield from sampled(file, _BLOCKS)
    except OSError as error:
        raise ConfigError(f"the checkpoint {directory} cannot be read: {error}. Check its files.") from error


def _tensors_of(source: Path) -> dict[str, tuple[int, ...]]:
    """Name and whole shape of every tensor of a model in a checkpoint, without those of optimizers."""
    try:
        found = dist_checkpointing.load_tensors_metadata(str(source))
    except (Exception, CheckpointException) as error:
        raise ConfigError(f"the checkpoint {source} cannot be read ({type(error).__name__}: {error}).") from error
    return {key: tuple(one.global_shape) for key, one in found.items() if not key.startswith(_OPTIMIZERS)}


def _wanted(state: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and whole shape of every tensor that any rank requests."""
    mine = {}
    for one in nested_values(state):
        for tensor in nested_values({"": one.build()}) if isinstance(one, ShardedTensorFactory) else [one]:
            if isinstance(tensor, ShardedTensor):
                mine[tensor.key] = tuple(tensor.global_shape)
    return {key: shape for one in gather_objects(mine) for key, shape in one.items()}


def _check(
    source: Path, part: ModelPart, found: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]
) -> None:
    """Raises `ConfigError` where a checkpoint's tensors are not those of the model; the same on every rank."""
    problem: str | None
    missing, surplus = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if any(is_adapter(key) for key in found):
        problem = "holds adapters and not the model beside them. Merge them with `renio export --merge`"
    elif missing:
        problem = f"lacks {_named(missing)}, which config.json asks for"
    elif surplus:
        problem = f"holds {_named(surplus)}, which config.json does not ask for: the model computes something else"
    else:
        shapes = ((key, found[key], wanted[key]) for key in sorted(wanted))
        problem = next(filter(None, (_shape_problem(*one, part.architecture.vocab_size) for one in shapes)), None)
    if problem is not None:
        raise ConfigError(
            f"the checkpoint {source} {problem}. Give the Hugging Face directory whose config.json describes this very "
            "model, or another checkpoint.",
            scope=Scope.ALL_RANKS,
        )


def _shape_problem(key: str, there: tuple[int, ...], here: tuple[int, ...], vocab_size: int) -> str | None:
    """Description of a mismatch in a tensor's shape; None where there is none.

    Megatron pads the vocabulary depending on its settings and layout; only the tokens' rows are required.
    """
    if key in VOCABULARY and there[1:] == here[1:]:
        enough = there[0] >= vocab_size
        return None if enough else f"has {there[0]} rows of {key!r}, and config.json a vocabulary of {vocab_size}"
    return None if there == here else f"holds {key!r} in the shape {there}, and config.json asks for {here}"


def _named(keys: list[str]) -> str:
    more = f" and {len(keys) - _MAX_NAMED} more" if len(keys) > _MAX_NAMED else ""
    return f"{', '.join(map(repr, keys[:_MAX_NAMED]))}{more}"


def _clear_padding(part: ModelPart) -> None:
    """Sets rows beyond the model's vocabulary to 0, as from a Hugging Face directory; a checkpoint has random values
    there."""
    tensor = part.layout.tensor
    for name, parameter in part.named_parameters():
        if name in VOCABULARY:
            num_rows = parameter.shape[0]
            parameter.detach()[max(0, part.architecture.vocab_size - tensor.rank * num_rows) :].zero_()
