"""Index of the tensors in a Hugging Face directory's safetensors files, under uniform names per family."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from renio_megatron.errors import ConfigError
from renio_megatron.models.families import experts_of

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_COMPARED_ROWS = 4096

_FUSED = re.compile(r"(model\.layers\.\d+)\.mlp\.experts\.(gate_up_proj|down_proj)")
_ROUTER = re.compile(r"(model\.layers\.\d+)\.mlp\.gate\.weight")
_FUSED_AS = {"gate_up_proj": "linear_fc1", "down_proj": "linear_fc2"}
"""Fused tensor of all experts -> Megatron's name of each expert's part, whose rows have the same order."""


@dataclass(frozen=True)
class View:
    """A tensor as a view of a (possibly fused) tensor in a file.

    Attributes:
        tensor: name in the file.
        expert: index of the matrix in a three-dimensional tensor; None: the tensor is not fused over experts.
        part: (index, number of equal parts) of that matrix's rows.
    """

    tensor: str
    expert: int | None = None
    part: tuple[int, int] = (0, 1)

    def shape(self, whole: Sequence[int]) -> tuple[int, ...]:
        """Shape of the view; `whole` is the shape in the file. Empty where that is not a valid shape for such a tensor.

        >>> View("a", 3, (1, 2)).shape((8, 6, 5))
        (3, 5)
        """
        if self.expert is None:
            return tuple(whole)
        if len(whole) != 3 or whole[0] <= self.expert or whole[1] % self.part[1]:
            return ()
        return whole[1] // self.part[1], whole[2]

    def read(self, handle: Any, rows: slice, columns: slice | None) -> torch.Tensor:
        """Reads rows of the view, and a range of columns unless None, from its open file."""
        tensor = handle.get_slice(self.tensor)
        if self.expert is None:
            return tensor[rows] if columns is None else tensor[rows, columns]
        first = self.part[0] * (tensor.get_shape()[1] // self.part[1])
        rows = slice(first + rows.start, first + rows.stop)
        return tensor[self.expert, rows] if columns is None else tensor[self.expert, rows, columns]


def has_weights(directory: Path) -> bool:
    """Whether there are files that `TensorIndex` reads; a model's weights may be elsewhere."""
    return (directory / SINGLE).is_file() or (directory / INDEX).is_file()


class TensorIndex:
    """The weight files of a directory. As in transformers, a single file takes precedence over an index of several.

    Attributes:
        files: tensor name in the file -> file.

    Raises:
        ConfigError: no file, or an index that cannot be read.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        if (directory / SINGLE).is_file():
            with self.open(SINGLE) as handle:
                self.files: dict[str, str] = dict.fromkeys(handle.keys(), SINGLE)
        elif (directory / INDEX).is_file():
            try:
                self.files = dict(json.loads((directory / INDEX).read_text(encoding="utf-8"))["weight_map"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise ConfigError(f"{directory / INDEX} cannot be read: {error!r}. Save the model again.") from error
        else:
            raise ConfigError(
                f"{directory} holds no {SINGLE} (nor an index of several). Save the model with save_pretrained; "
                "pytorch_model.bin is not read."
            )

    def open(self, file: str) -> Any:
        """Opens a file as a safetensors handle, which is a context manager."""
        try:
            return safe_open(self.directory / file, "pt")
        except (SafetensorError, OSError) as error:
            raise ConfigError(
                f"{self.directory / file} cannot be read: {error}. It may be truncated or missing; copy it again."
            ) from error

    def is_tied(self) -> bool:
        """Whether head and embedding are one matrix, for a model whose config.json ties them.

        transformers keeps both where both are there and differ.
        """
        if HEAD not in self.files or EMBEDDING not in self.files:
            return True
        with self.open(self.files[HEAD]) as one, self.open(self.files[EMBEDDING]) as other:
            head, embedding = one.get_slice(HEAD), other.get_slice(EMBEDDING)
            if head.get_shape() != embedding.get_shape() or head.get_dtype() != embedding.get_dtype():
                return False
            num_rows = head.get_shape()[0]
            return all(
                torch.equal(head[start : start + _COMPARED_ROWS], embedding[start : start + _COMPARED_ROWS])
                for start in range(0, num_rows, _COMPARED_ROWS)
            )

    def views(self, family: str, num_experts: int) -> dict[str, View]:
        """The directory's tensors by the names that this package reads: each expert's matrices separately, and the
        embedding also where only the head tied to it was saved.

        Args:
            family: the model's family.
            num_experts: experts of a layer; 0 for a dense model.
        """
        found = {name: View(name) for name in self.files}
        if num_experts:
            names = experts_of(family)
            router, experts, parts_of = names.router, names.experts, names.parts
            for name in self.files:
                if fused := _FUSED.fullmatch(name):
                    del found[name]
                    parts = parts_of[_FUSED_AS[fused[2]]]
                    for number, (place, part) in itertools.product(range(num_experts), enumerate(parts)):
                        view = View(name, number, (place, len(parts)))
                        found[f"{fused[1]}.{experts}.{number}.{part}.weight"] = view
                elif gate := _ROUTER.fullmatch(name):
                    found[f"{gate[1]}.{router}"] = found.pop(name)
        if HEAD in found and EMBEDDING not in found:
            found[EMBEDDING] = found.pop(HEAD)
        return found
