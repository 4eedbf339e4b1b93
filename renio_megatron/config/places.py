"""The kinds of value that a dotted key of a recipe may hold, whichever classes its tags pick.

A schema is a dataclass whose fields are plain values (str, int, float, bool, or one of them or None), sections
(dataclasses of the same kind, maybe `Tagged`), tables of sections under names that the recipe chooses
(`dict[str, dataclass]`), or lists of sections (`tuple[dataclass, ...]`), whose keys are their numbers.

A field with the metadata `{"of": NAME}` is a key of sections in a field of that name alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args, get_origin, get_type_hints

from renio_megatron.config.tagged import Tagged


@dataclass(frozen=True)
class Place:
    """The kind of value that a key holds.

    Attributes:
        kind: `value`, `section`, `table` or `list`.
        hint: type of the value, class of the section, or of the sections of a table or a list.
        field: name of the field that it is, or that the table or list is.
    """

    kind: str
    hint: Any
    field: str

    def inside(self, name: str) -> Place | None:
        """The place of a key inside it; in a `Tagged` section, of a key that any of its classes has."""
        if self.kind in ("table", "list"):
            return Place("section", self.hint, self.field)
        for schema in self.classes():
            if name in keys_of(schema, self.field):
                return place_of_field(schema, name)
        return None

    def classes(self) -> Iterator[Any]:
        """The classes that a section may have."""
        if self.kind == "section":
            yield from self.hint.variants() if is_tagged(self.hint) else (self.hint,)


def place_of(schema: type, key: str) -> Place | None:
    """The place of a dotted key; None where the schema has no such key."""
    place: Place | None = Place("section", schema, "")
    for name in key.split("."):
        place = None if place is None else place.inside(name)
    return place


def place_of_field(schema: Any, name: str) -> Place:
    """The place of a field."""
    hint = _hints(schema)[name]
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return Place("section", hint, name)
    if get_origin(hint) is dict:
        return Place("table", get_args(hint)[1], name)
    if get_origin(hint) is tuple:
        return Place("list", get_args(hint)[0], name)
    return Place("value", hint, name)


def keys_of(schema: type, place: str) -> list[str]:
    """The fields of a section's class that are its keys in a field named `place`; those that are keys only there come
    last."""
    fields = sorted(dataclasses.fields(schema), key=lambda field: "of" in field.metadata)
    return [field.name for field in fields if field.metadata.get("of", place) == place]


def is_tagged(schema: Any) -> bool:
    """Whether a key picks the class of such a section."""
    return issubclass(schema, Tagged)


@functools.cache
def _hints(schema: type) -> dict[str, Any]:
    return get_type_hints(schema)
