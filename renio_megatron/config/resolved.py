"""A recipe as one file: with its bases, views and command line, without what has its default."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from omegaconf import OmegaConf

from renio_megatron.config.keys import as_recipe, as_tree
from renio_megatron.config.parser import literal
from renio_megatron.config.resume import default_of
from renio_megatron.config.schema import SECTIONS, Recipe


def resolved_yaml(recipe: Recipe) -> str:
    """The settings that a recipe, its bases and the command line give, as a recipe of the same command.

    What fell away, or has its default although nothing says so, is left out.
    """
    config = recipe.config

    def is_given(key: str, value: Any) -> bool:
        if key in recipe.explicit:
            return key not in recipe.dropped
        return value is None and default_of(config, key) is not None  # null, where that is no default

    values = _kept(as_recipe(config), "", is_given)
    ordered = {key: values[key] for key in SECTIONS if key in values}
    return OmegaConf.to_yaml(OmegaConf.create(literal(ordered)))


def _kept(tree: Any, prefix: str, is_given: Callable[[str, Any], bool]) -> dict[str, Any]:
    """The given settings of a section, as nested mappings; a list of sections stays a list."""
    found: dict[str, Any] = {}
    for name, value in as_tree(tree).items():
        key = f"{prefix}{name}"
        is_list = isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)
        if isinstance(value, dict) or is_list:
            inner = _kept(value, f"{key}.", is_given)
            if inner:
                found[name] = list(inner.values()) if is_list else inner
        elif is_given(key, value):
            found[name] = value
    return found
