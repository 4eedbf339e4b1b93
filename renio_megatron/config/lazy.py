"""Lazy import of table entries by `module:name`, so that a table's names are known without torch."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def imported(place: str) -> Any:
    """Imports the object that `module:name` names.

    >>> imported("math:floor")(2.5)
    2
    """
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)
