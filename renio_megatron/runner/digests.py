"""Digests of the files that a run reads, which must be unchanged when it resumes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from renio_megatron.config.schema import JobConfig
from renio_megatron.errors import ConfigError
from renio_megatron.files import sampled, user_path
from renio_megatron.models.hf_weights import description_files
from renio_megatron.runner.inputs import RunInputs
from renio_megatron.runner.run_directory import DATE

_BLOCKS = 16  # of a weight file; edited, trained or quantized weights differ nearly everywhere
_MAX_BYTES_READ = 2**30  # bytes of a file that are read whole


def origins(config: JobConfig, inputs: RunInputs) -> dict[str, str]:
    """Digests of all files and directories that the rest of a run depends on, by the setting that names them; and the
    date in its prompts, where they contain one.

    Contents of checkpoints are left out: the student's weights, their moving average, and adapters with the fingerprint
    of their base. Data files are read whole up to 1 GiB; of larger ones, and of weights, the size and evenly spaced
    blocks are read.

    Raises:
        ConfigError: a file that cannot be read.
    """
    places = {"model (its tokenizer and config)": _descriptions(inputs.model)}
    data = config.data
    for setting, path in (("data.path", data.path), ("data.eval_path", data.eval_path)):
        if path is not None:
            places[setting] = _files(user_path(path))
    if (contents := inputs.stream.source.contents) is not None:
        places["data.path"] = iter([contents().encode()])
    if config.evaluates_held_out and (contents := inputs.stream.evaluation_source.contents) is not None:
        places["data.eval_path" if data.eval_path is not None else "data.eval_split"] = iter([contents().encode()])
    for one in config.teachers:
        teacher, found = one.settings, inputs.teachers[one.name]
        is_copy = teacher.model is None and not one.shares_student
        if teacher.model is not None or is_copy:
            given = config.pretrained_checkpoint if is_copy else teacher.pretrained_checkpoint
            key = "model" if given is None else "pretrained_checkpoint"
            places[key if is_copy else one.setting(key)] = _weights(found.weights)
        if teacher.adapter is not None:
            places[one.setting("adapter")] = _weights(user_path(teacher.adapter))
    try:
        digests = {setting: _digest(parts) for setting, parts in places.items()}
        return digests if inputs.date is None else {**digests, DATE: inputs.date}
    except OSError as error:
        raise ConfigError(
            f"{error.filename} cannot be read: {error.strerror}. Check the file and its rights."
        ) from error


def _digest(parts: Iterator[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:32]


def _descriptions(directory: Path) -> Iterator[bytes]:
    """Contents of a model's files other than weights."""
    for file in description_files(directory):
        yield file.name.encode()
        yield file.read_bytes()


def _weights(directory: Path) -> Iterator[bytes]:
    """Samples of the weight files in Hugging Face, PEFT and Megatron directories."""
    for file in sorted(directory.iterdir()):
        if file.suffix in (".safetensors", ".distcp"):
            yield from sampled(file, _BLOCKS)


def _files(path: Path) -> Iterator[bytes]:
    """A file, or all files below a directory."""
    for file in [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file()):
        if file.stat().st_size > _MAX_BYTES_READ:
            yield from sampled(file, _BLOCKS)
            continue
        with file.open("rb") as stream:
            while block := stream.read(2**20):
                yield block
