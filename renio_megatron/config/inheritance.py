"""Recipes on top of others: `base: FILE`, or a list of files, of which a later one takes precedence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from renio_megatron.config.keys import first_line
from renio_megatron.errors import ConfigError
from renio_megatron.files import user_path

BASE = "base"
"""The key of a recipe that names others."""


def files_of(path: Path) -> list[tuple[str, Mapping[Any, Any]]]:
    """A recipe's bases, theirs before them, and the recipe last: each file's name and settings, without `base`.

    A file that several name comes once, where it is named first.

    Raises:
        ConfigError: a file cannot be read, or is a base of itself.
    """
    found: dict[Path, tuple[str, Mapping[Any, Any]]] = {}
    _add(path, (), found)
    return list(found.values())


def _add(path: Path, above: tuple[Path, ...], found: dict[Path, tuple[str, Mapping[Any, Any]]]) -> None:
    place = path.resolve()
    if place in above:
        names = " -> ".join(one.name for one in (*above[above.index(place) :], place))
        raise ConfigError(f"{path}: a recipe cannot be its own base: {names}. Remove one of these `base`.")
    if place in found:
        return
    content = dict(_load(path, f"; {above[-1]} names it as its base" if above else ""))
    given = _bases(content.pop(BASE, None), path)
    bases = [path.parent / user_path(name) for name in given]
    for name, base in zip(given, bases, strict=True):
        if sum(base.resolve() == other.resolve() for other in bases) > 1:
            raise ConfigError(
                f"{path}: base names {name} twice, and a file's settings can stand in one place only. Name it once, "
                "where its settings are to be put: a later file takes precedence."
            )
        _add(base, (*above, place), found)
    found[place] = (str(path), content)


def _bases(value: Any, path: Path) -> list[str]:
    names = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(f"{path}: base must be a file, or a list of files; got {value!r}.")
    return names


def _load(path: Path, named_by: str) -> Mapping[Any, Any]:
    """The file's mapping, with interpolations unresolved; `named_by` says which recipe needs it."""
    if path.is_dir():
        raise ConfigError(f"the recipe {str(path)!r} is a directory; give the YAML file.")
    if not path.is_file():
        raise ConfigError(
            f"there is no recipe {str(path)!r}{named_by}. Give the path of a YAML file, for example one of examples/."
        )
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError(f"{path}: {where}not valid YAML: {error.problem}.") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: cannot be read as a recipe: it is nested too deeply.") from error
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: cannot be read as a recipe: {first_line(error)}.") from error
    if (content == {} or content is None) and named_by:
        raise ConfigError(f"{path}: this base is empty{named_by}. Write a setting into it, or leave it out there.")
    if content == {} or content is None:
        raise ConfigError(f"{path}: the recipe is empty. It needs at least `model` and `output_dir`.")
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of keys to values; got a {type(content).__name__}.")
    return content
