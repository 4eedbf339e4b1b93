"""Settings that have no effect where they are written, as opposed to those that something else left without one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from renio_megatron.config.expand_views import expand_views
from renio_megatron.config.inheritance import files_of
from renio_megatron.config.parser import read_files
from renio_megatron.config.rules.ignored import ignored_settings
from renio_megatron.config.schema import JobConfig
from renio_megatron.errors import ConfigError

_PLAIN_KEYS = ("model", "pretrained_checkpoint", "algorithm", "init", "output_dir")
_File = tuple[str, Mapping[Any, Any]]


def mistakes_among(
    schema: type[JobConfig],
    path: str | Path,
    overrides: Sequence[str],
    ignored: Mapping[str, str],
    sources: Mapping[str, str],
) -> frozenset[str]:
    """Those of a recipe's keys without effect that are mistakes of the file that sets them.

    A key is one where it has no effect in that file with its own bases either, and had none with any of the files that
    come on top. A base that leaves keys to others, which no recipe can do without, is made whole by them; what would
    have no effect there for another reason than in the end is no mistake of it. Of the command line only top-level keys
    are applied.

    Args:
        schema: the recipe's class of settings.
        path: the recipe.
        overrides: its command line.
        ignored: keys that have no effect in the end, and why.
        sources: the file that each of them is in.
    """
    files = files_of(Path(path))
    plain = [text for text in overrides if text.partition("=")[0].strip() in _PLAIN_KEYS]
    levels = [_without_effect(schema, files[:count], files, plain) for count in range(1, len(files) + 1)]
    found = set()
    for number, (name, _) in enumerate(files):
        own = {key: because for key, because in ignored.items() if sources[key] == name}
        closure = files_of(Path(name))
        alone = _without_effect(schema, closure, files, plain) if own else None
        if alone is None:  # no recipe, even with what it leaves to others
            continue
        is_part = number < len(files) - 1 and bool(_left_out(schema, closure))
        later = [level for level in levels[number:] if level is not None]
        for key, because in own.items():
            if key in alone and all(key in level for level in later) and not (is_part and alone[key] != because):
                found.add(key)
    return frozenset(found)


def _left_out(schema: type[JobConfig], files: Sequence[_File]) -> list[str]:
    """Top-level keys that a recipe must have, and these files have not."""
    there = {key for _, content in files for key in content}
    fields = dataclasses.fields(schema)
    needed = [field.name for field in fields if field.default is field.default_factory is dataclasses.MISSING]
    return [name for name in needed if name not in there]


def _without_effect(
    schema: type[JobConfig], files: Sequence[_File], others: Sequence[_File], overrides: Sequence[str]
) -> dict[str, str] | None:
    """Keys without effect in these files, with the reason; what they leave to others is taken from those. None: even so
    they are no recipe."""
    for needed in (_left_out(schema, files), _left_out(schema, ())):
        complement = [(name, {key: content[key] for key in needed if key in content}) for name, content in others]
        try:
            read = read_files(schema, [*complement, *files], overrides, expand=expand_views)
            return {**read.misplaced, **ignored_settings(read.config, read.explicit)}
        except ConfigError:
            continue
    return None
