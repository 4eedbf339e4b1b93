"""Digests of files that a run reads: of data, of weights, and of what describes a model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from renio_megatron.files import sampled
from renio_megatron.models.description import description_files

_BLOCKS = 16  # of a weight file; edited, trained or quantized weights differ nearly everywhere
_MAX_BYTES_READ = 2**30  # bytes of a file that are read whole


def digest_of(parts: Iterable[bytes]) -> str:
    """SHA-256 of all parts behind each other, its first 32 hexadecimal digits."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:32]


def description_parts(directory: Path) -> Iterator[bytes]:
    """Contents of a model's files other than weights."""
    for file in description_files(directory):
        yield file.name.encode()
        yield file.read_bytes()


def weight_parts(directory: Path) -> Iterator[bytes]:
    """Samples of the weight files in Hugging Face, PEFT and Megatron directories."""
    for file in sorted(directory.iterdir()):
        if file.suffix in (".safetensors", ".distcp"):
            yield from sampled(file, _BLOCKS)


def file_parts(path: Path) -> Iterator[bytes]:
    """A file, or all files below a directory."""
    for file in [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file()):
        if file.stat().st_size > _MAX_BYTES_READ:
            yield from sampled(file, _BLOCKS)
            continue
        with file.open("rb") as stream:
            while block := stream.read(2**20):
                yield block
