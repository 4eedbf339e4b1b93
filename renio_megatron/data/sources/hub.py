"""Data sets of the library `datasets`: directories and names, from its cache or from the hub."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from renio_megatron.config import DataConfig
from renio_megatron.data.sources.places import given_path, path_key, path_of
from renio_megatron.errors import DataError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_SAVED = ("state.json", "dataset_dict.json")
"""Files of a directory that `save_to_disk` wrote."""
_NO_SPLIT = "nknown split"
"""Words of the library's error about a split that a data set does not have, the only one that the hub cannot mend."""


@dataclass(frozen=True)
class Place:
    """Where a split of a data set is found.

    Attributes:
        name: directory, or name on the hub.
        subset: name of one of several sets under this name; None: the only one, or the default.
        split: name of its split; None: `train` for training and `test` for evaluation.
        use: `train` or `eval`.
        key: the setting that names it.
        is_directory: whether it is a directory here.
    """

    name: str
    subset: str | None
    split: str | None
    use: str
    key: str
    is_directory: bool

    @property
    def wanted(self) -> str:
        """Name of the split that is read."""
        return self.split or ("train" if self.use == "train" else "test")

    @property
    def split_key(self) -> str:
        """The setting that names its split."""
        return "data.split" if self.use == "train" else "data.eval_split"

    @property
    def described(self) -> str:
        """For messages."""
        inside = [*([] if self.subset is None else [self.subset]), *([] if self.split is None else [self.split])]
        return f"{self.name} ({', '.join(inside)})" if inside else self.name


def place_of(config: DataConfig, split: str) -> Place:
    """Where a split of `data.source=datasets` is; raises `DataError` for a path that is no directory, and no name."""
    text, path = given_path(config, split), path_of(config, split)
    part = config.split if split == "train" else config.eval_split
    if not path.is_dir() and (path.exists() or not _NAME.fullmatch(text)):
        advice = " It is a file: data.source=jsonl reads JSON lines and parquet." if path.is_file() else ""
        raise DataError(f"{path_key(split)}: there is no directory {str(path)!r}.{advice}")
    name = str(path) if path.is_dir() else text
    return Place(name, config.subset, part, split, path_key(split), path.is_dir())


def load(place: Place) -> Any:
    """The rows of a place, a `datasets.Dataset`. A name is looked for in the cache first; only where it is not there,
    on the hub.

    Raises:
        DataError: it is neither here nor there, or has no such split.
    """
    import datasets

    if place.is_directory and any((Path(place.name) / name).is_file() for name in _SAVED):
        return _saved(place)

    def read() -> Any:
        return datasets.load_dataset(place.name, place.subset, split=place.wanted)

    advice = "Give a directory of parquet or JSON files, or one that datasets.save_to_disk wrote."
    if not place.is_directory:
        try:
            with offline():
                return read()
        except Exception as error:  # not in the cache, or another part of it
            if _NO_SPLIT in str(error):
                raise DataError(
                    f"{place.key}: {place.name}: {_words(error)} Set {place.split_key} to one of them."
                ) from error
        subset = "" if place.subset is None else f", {place.subset!r}"
        advice = (
            "Nor is it in the cache of the library datasets. Fetch it where there is a network: python -c "
            f'"import datasets; datasets.load_dataset({place.name!r}{subset})"; or give a directory or a file.'
        )
    try:
        return read()
    except Exception as error:  # no network, no such set or split, no rights, or whatever its readers raise
        raise DataError(
            f"{place.key}: {place.described}, split {place.wanted!r}, cannot be read: {_words(error)[:300]} {advice}"
        ) from error


def digest(data: Any) -> str:
    """A digest of a data set's rows, whatever pieces its files have."""
    total = hashlib.sha256()
    for row in data:
        total.update(json.dumps(row, sort_keys=True, default=str).encode())
    return total.hexdigest()


def _words(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _saved(place: Place) -> Any:
    import datasets

    try:
        data = datasets.load_from_disk(place.name)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{place.name}: not a directory written by datasets.save_to_disk ({error}).") from error
    if isinstance(data, datasets.DatasetDict):
        if place.wanted not in data:
            raise DataError(
                f"{place.name}: the data set has no split {place.wanted!r}, but {', '.join(data)}. Set "
                f"{place.split_key} to one of them, or point to its directory."
            )
        return data[place.wanted]
    return data


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Keeps `datasets` from the network. It has read the environment when it was imported, so its settings change."""
    import datasets
    import huggingface_hub

    modules = (datasets.config, huggingface_hub.constants)
    before = [module.HF_HUB_OFFLINE for module in modules]
    try:
        for module in modules:
            setattr(module, "HF_HUB_OFFLINE", True)  # noqa: B010  mypy takes the constant for final
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            setattr(module, "HF_HUB_OFFLINE", value)  # noqa: B010
